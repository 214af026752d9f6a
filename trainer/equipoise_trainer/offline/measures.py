"""What is measured of a training run under a policy: the definitions of arXiv 2402.17759, sections 2 to 4.

Losses are in nats. Shape legend: T steps, S steps that are looked at closely, N examples.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.analysis import similarity
from equipoise_trainer.offline.path import RunPath
from equipoise_trainer.offline.planted import Planted
from equipoise_trainer.offline.problem import Look, Split, V
from equipoise_trainer.offline.rows import Weights
from equipoise_trainer.perceptron import Array

LEARNED_NATS = 1e-6
"""Below this loss an example is learned perfectly."""

LOOKS = 100
"""About how many steps are looked at closely."""

BINS = 50
"""Of a weight over the largest weight of its row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """A training run under the policy as it is after some policy epochs. Arrays may be NaN where not defined.

    Attributes:
        epoch: how many policy epochs; 0: the policy is uniform.
        target_loss: [T+1], nats, on A at θ_0 … θ_T.
        test_loss: the same on unseen examples; empty: not measured.
        gradient_norms: [T], of the weighted gradients.
        looked: [S], the steps below.
        sim: [S], SIM_t: the contributions' weighted mean over their deviation, over examples with weight.
        adjoint_sim: [S], the same with λ_{t+1} in place of ∇L_A(θ_t); NaN until a backward pass has told.
        effective: [S], effective examples 1/Σγ², in [1, N].
        zero: [S], share of weights that are exactly 0.
        zero_nonpositive: [S], share of zero weights among examples with CT ≤ 0.
        zero_positive: [S], share of zero weights among examples with CT > 0.
        zero_flipped: [S], share of zero weights among flipped examples.
        zero_clean: [S], share of zero weights among the others.
        learned: [50], histogram of weight / largest weight of the row, of examples learned perfectly, over all steps
            that are looked at; the last bin ends at 1.
        unlearned: [50], the same of the others.
        easy_weight: [S], mean weight of planted easy examples; plain ones: `plain_weight`.
        plain_weight: [S], mean weight of examples that nothing was planted in.
        group_weight: [S], mean over planted groups of equal examples of their summed weight.
        group_zero: [S], share of zero weights among the planted duplicates with CT > 0.
        mean_weight: [N], over all steps.
    """

    epoch: int
    target_loss: Array
    test_loss: Array
    gradient_norms: Array
    looked: NDArray[np.int64]
    sim: Array
    adjoint_sim: Array
    effective: Array
    zero: Array
    zero_nonpositive: Array
    zero_positive: Array
    zero_flipped: Array
    zero_clean: Array
    learned: Array
    unlearned: Array
    easy_weight: Array
    plain_weight: Array
    group_weight: Array
    group_zero: Array
    mean_weight: Array

    @property
    def area(self) -> float:
        """J/T: mean target loss over θ_1 … θ_T, nats."""
        return float(self.target_loss[1:].mean())

    def save(self, path: Path) -> None:
        """Writes a .npz file."""
        np.savez_compressed(path, allow_pickle=False, **{each.name: getattr(self, each.name) for each in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Measures":
        """Reads a file that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            values: dict[str, Any] = {each.name: file[each.name] for each in fields(cls)}
        return cls(**values | {"epoch": int(values["epoch"])})


def looked_steps(steps: int, *, count: int = LOOKS) -> NDArray[np.int64]:
    """Steps that are looked at closely: about `count`, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, steps - 1, min(count, steps)).round().astype(np.int64))


def losses_along(path: RunPath[V], split: Split) -> Array:
    """Mean loss on a split at θ_0 … θ_T, [T+1], nats."""
    parts = [path.problem.mean_losses(path.parameters(steps), split) for steps in path.segments()]
    return np.concatenate([*parts, path.problem.mean_losses([path.last], split)])


def measure(
    path: RunPath[V],
    *,
    epoch: int,
    planted: Planted,
    looks: int = LOOKS,
    test: bool = True,
) -> Measures:
    """Measures a run, but for what needs the adjoint.

    Args:
        path: the run.
        epoch: of the policy.
        planted: what is known of the examples.
        looks: about how many steps are looked at closely.
        test: whether unseen examples are measured too.
    """
    looked = looked_steps(path.steps, count=looks)
    collected: dict[str, list[Any]] = {}
    for steps in path.segments():
        chosen = [int(step) for step in looked if step in steps]
        if not chosen:
            continue
        segment = path.replay(steps)
        for step in chosen:
            seen = _see(segment.look(step - steps.start), path.weights[step], planted)
            for name, value in seen.items():
                collected.setdefault(name, []).append(value)
    histograms = {name: np.sum(collected.pop(name), axis=0) for name in ("learned", "unlearned")}
    return Measures(
        epoch=epoch,
        target_loss=losses_along(path, "target"),
        test_loss=losses_along(path, "test") if test else np.zeros(0),
        gradient_norms=path.gradient_norms,
        looked=looked,
        adjoint_sim=np.full(len(looked), np.nan),
        mean_weight=path.weights.mean(axis=0, dtype=np.float64),
        **histograms,
        **{name: np.array(values, dtype=np.float64) for name, values in collected.items()},
    )


def _see(look: Look, weights: Weights, planted: Planted) -> dict[str, Any]:
    zero = weights == 0
    positive = look.contributions > 0
    learned = look.losses < LEARNED_NATS
    relative = weights / weights.max()
    members = planted.groups.ravel()
    duplicated = np.zeros(len(weights), dtype=np.bool_)
    duplicated[members] = True
    return {
        "sim": similarity(look.contributions.astype(np.float64), weights.astype(np.float64), floor=0.0),
        "effective": float(weights.sum(dtype=np.float64) ** 2 / np.square(weights, dtype=np.float64).sum()),
        "zero": float(zero.mean()),
        "zero_nonpositive": _share(zero, ~positive),
        "zero_positive": _share(zero, positive),
        "zero_flipped": _share(zero, planted.flipped),
        "zero_clean": _share(zero, ~planted.flipped),
        "learned": np.histogram(relative[learned], bins=BINS, range=(0, 1))[0],
        "unlearned": np.histogram(relative[~learned], bins=BINS, range=(0, 1))[0],
        "easy_weight": _mean(weights, planted.easy),
        "plain_weight": _mean(weights, planted.plain),
        "group_weight": float(weights[planted.groups].sum(axis=1).mean()) if len(planted.groups) else np.nan,
        "group_zero": _share(zero, duplicated & positive),
    }


def _share(what: NDArray[np.bool_], among: NDArray[np.bool_]) -> float:
    return float(what[among].mean()) if among.any() else float("nan")


def _mean(weights: Weights, among: NDArray[np.bool_]) -> float:
    return float(weights[among].mean(dtype=np.float64)) if among.any() else float("nan")
