"""Contributions as comparisons: relative to their batch, and smaller by what chance explains.

What all rows share, as how frequent tokens are in text, dominates plain contributions, and its sign swings with every
few steps of the model: a direction some steps old then calls everything harmful, or everything useful. Where ids stand
for sources or other groups, a policy must know one thing: does a row do more for the target than the usual one?

Shape legend: B rows of a batch, G groups among them.
"""

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.torch.errors import CaptureError
from equipoise.wire import StepFields

FARTHEST: Final = 2.0
"""Where relative contributions are cut off, in spreads."""
NORMAL_SPREAD: Final = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation: 1/Φ⁻¹(3/4)."""


def relative(contributions: ArrayLike) -> NDArray[np.float64]:
    """Distances from the median in spreads, cut off at 2, less their mean.

    With m the median and s = 1.4826·median|c − m|, a spread that few rows cannot move: `r = clip((c − m)/s, −2, 2)`,
    and `r − mean(r)` is returned. They have no unit, and none outweighs a hundred others, as a single rare token may
    under Adam's scaling.

    Example:
        >>> relative([3.0, 1.0, 2.0]).round(3).tolist()
        [0.674, -0.674, 0.0]

    Args:
        contributions: finite numbers [B], in any unit.

    Returns:
        float64 [B], with mean 0, in [−4, 4]; zeros where the spread is 0, since then there is no usual distance.

    Raises:
        CaptureError: they are not one finite number for each row.
    """
    values = _finite(contributions)
    if not len(values):
        return values
    distances = values - np.median(values)
    spread = NORMAL_SPREAD * np.median(np.abs(distances))
    if not spread > 0:
        return np.zeros_like(values)
    cut = np.clip(distances, -FARTHEST * spread, FARTHEST * spread) / spread  # in this order nothing overflows
    centred: NDArray[np.float64] = cut - cut.mean()
    return centred


def shrunk(contributions: ArrayLike, groups: ArrayLike) -> NDArray[np.float64]:
    """Contributions times 1 − 1/F, or times 0 where F is below 1.

    F is the ratio of one-way analysis of variance: `Σ_g n_g·(c̄_g − c̄)²/(G − 1)` between groups, over
    `Σ_i (c_i − c̄_g(i))²/(B − G)` within them. 1/F is the share of what parts the groups' means that chance within the
    groups explains; without any difference F is about 1, and nothing is left to learn from noise. The factor is that of
    the positive-part James-Stein estimator towards the mean (Efron and Morris, 1973), with the variance estimated from
    the same batch; rows within a group are scaled alike.

    Example:
        >>> shrunk([2.0, 4.0, -2.0, -4.0], [0, 0, 1, 1]).round(3).tolist()
        [1.889, 3.778, -1.889, -3.778]

    Args:
        contributions: finite numbers [B].
        groups: the group of each row, integers [B], as ids of sources.

    Returns:
        float64 [B]. As given where rows are all of one group, or each of its own: nothing is known of chance then.

    Raises:
        CaptureError: they are not one finite number, and one group, for each row.
    """
    values = _finite(contributions)
    labels = np.asarray(groups)
    if labels.shape != values.shape:
        raise CaptureError(f"groups of shape {labels.shape}: must be one for each of {len(values)} contributions")
    found, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if not 1 < len(found) < len(values):
        return values
    means = np.bincount(place, weights=values) / counts
    between = float((counts * np.square(means - values.mean())).sum()) / (len(found) - 1)
    within = float(np.square(values - means[place]).sum()) / (len(values) - len(found))
    return values * (max(0.0, 1.0 - within / between) if between > 0 else 0.0)


def compared(ids: NDArray[np.uint64], fields: StepFields) -> NDArray[np.float32]:
    """The contributions of a step as comparisons among its scored rows: `shrunk(relative(c), ids)`.

    Args:
        ids: of the rows, [B].
        fields: with contributions and scored.

    Returns:
        float32 [B]; as they were where rows are not scored.
    """
    values = np.array(fields["contributions"], dtype=np.float32)
    scored = np.asarray(fields["scored"], dtype=np.bool_)
    values[scored] = shrunk(relative(values[scored]), ids[scored])
    return values


def _finite(contributions: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(contributions, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        what = f"of shape {values.shape}" if values.ndim != 1 else f"{values[~np.isfinite(values)][0]} among them"
        raise CaptureError(f"contributions {what}: must be one finite number for each row")
    return values
