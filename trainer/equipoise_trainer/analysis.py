"""Numbers about runs: how well flips were found, how much faster a run was, how even the contributions are."""

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.perceptron import Array


def effective_examples(weights: Array) -> float:
    """1/Σγ² for weights [N] with γ = w/Σw; in [1, N]."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


def similarity(contributions: Array, weights: Array, *, floor: float = 0.05) -> float:
    """SIM of arXiv 2402.17759, section 4: the weighted mean of contributions [B] over their deviation from it.

    Examples at the rule's floor count as unweighted: those below `floor` times the largest weight are left out. NaN
    for fewer than two examples, or when the contributions do not differ.
    """
    kept = weights > floor * weights.max()
    values, masses = contributions[kept], weights[kept]
    if len(values) < 2 or values.min() == values.max():
        return float("nan")
    mean = float(masses @ values / masses.sum())
    return mean / float(np.sqrt(np.square(values - mean).sum() / (len(values) - 1)))


def detection_auroc(scores: Array, flipped: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of finding flipped examples by a low score; ties count half. In [0, 1].

    NaN when there are only flipped or only clean examples. Examples that were never scored (NaN) count as unsuspicious.
    """
    positives = int(flipped.sum())
    negatives = len(flipped) - positives
    if not positives or not negatives:
        return float("nan")
    suspicion = np.where(np.isnan(scores), -np.inf, -scores)
    _, inverse, counts = np.unique(suspicion, return_inverse=True, return_counts=True)
    midranks = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(midranks[inverse][flipped].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def first_reaching(steps: NDArray[np.int64], losses: Array, level: float) -> int | None:
    """First logged step with a loss of at most `level`; None: never."""
    reached = np.flatnonzero(losses <= level)
    return int(steps[reached[0]]) if len(reached) else None


def chosen_index(guard_losses: Array) -> int:
    """Where a run is read off: the first minimum of the guard loss [L]. Losses that are not finite are passed over."""
    return int(np.where(np.isfinite(guard_losses), guard_losses, np.inf).argmin())
