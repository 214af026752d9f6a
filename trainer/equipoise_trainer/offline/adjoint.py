"""The backward pass: what a change of each weight would do to the whole training run.

J(γ) = Σ_{t=1..T} L_A(θ_t). With λ_T = ∇L_A(θ_T) and λ_t = ∇L_A(θ_t) + (I − ηH_γ(θ_t))·λ_{t+1}, λ_t = dJ/dθ_t where
only the steps from t on count, and ∂J/∂γ_{n,t} = −η·λ_{t+1}·∇l_n(θ_t). What is sent is λ_{t+1}·∇l_n(θ_t), so that a
rule's learning rate ε₀ is η times the ε of the paper's Eq. 6.
"""

from collections.abc import Callable, Iterator

import numpy as np

from equipoise_trainer.offline.path import RunPath
from equipoise_trainer.offline.problem import Statistics, V
from equipoise_trainer.offline.rows import RowHolder

Stop = Callable[[], bool]
"""Says whether to stop here."""


class StoppedError(Exception):
    """A search was asked to stop; the same command goes on with it."""


def pull_back(path: RunPath[V]) -> Iterator[tuple[int, Statistics]]:
    """Every step t, from the last to the first, with its contributions λ_{t+1}·∇l_n(θ_t), [N]."""
    adjoint = path.problem.target_gradient(path.last)
    for steps in reversed(path.segments()):
        segment = path.replay(steps)
        for step in reversed(steps):
            contributions, adjoint = segment.pull(step - steps.start, adjoint)
            yield step, contributions


def move_rows(
    path: RunPath[V],
    holder: RowHolder,
    *,
    scale: float = 1.0,
    done: int = 0,
    stop: Stop = lambda: False,
    on_row: Callable[[int, Statistics], None] = lambda step, contributions: None,
) -> None:
    """Moves every row by its contributions, the last row first.

    Args:
        path: the run under the rows as they were before the first move.
        holder: whose rows move.
        scale: what contributions are multiplied by before they are sent; this scales ε.
        done: how many rows were moved already.
        stop: asked after each row but the last.
        on_row: called with every row and its contributions, those that were moved already included.

    Raises:
        StoppedError: `stop` said so; all moves made so far are applied and kept.
    """
    for step, contributions in pull_back(path):
        on_row(step, contributions)
        if path.steps - 1 - step >= done:
            holder.move(step, (scale * contributions).astype(np.float32))
        if step and stop():
            holder.flush()
            raise StoppedError(f"stopped after row {step}")
    holder.flush()
