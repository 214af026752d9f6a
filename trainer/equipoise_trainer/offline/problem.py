"""What is learned, as the search sees it: training runs that can be run forwards and pulled back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.offline.rows import Weights

V = TypeVar("V")
"""Parameters, gradients and adjoints of a problem: vectors of length P."""

Statistics: TypeAlias = NDArray[np.floating]
"""One number per example."""

Split: TypeAlias = Literal["target", "test"]
"""Examples of the desired distribution: A, whose loss the search lowers, and those it never sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What every example looks like at one step.

    Attributes:
        losses: float [N], nats.
        contributions: float [N], ∇L_A(θ_t)·∇l_n(θ_t): the paper's CT.
    """

    losses: Statistics
    contributions: Statistics


class Segment(Protocol[V]):
    """k successive steps of a training run, ready to be pulled back; `index` counts from the first of them."""

    def pull(self, index: int, adjoint: V) -> tuple[Statistics, V]:
        """Pulls an adjoint back through a step.

        Args:
            index: of the step t.
            adjoint: λ_{t+1}.

        Returns:
            λ_{t+1}·∇l_n(θ_t) for all examples, [N], in the problem's own precision, and
            λ_t = ∇L_A(θ_t) + (I − ηH_γ(θ_t))·λ_{t+1}.
        """
        ...

    def look(self, index: int) -> Look:
        """Losses and contributions of all examples."""
        ...


class Problem(Protocol[V]):
    """A model, its examples, and full-batch gradient descent on them."""

    @property
    def num_examples(self) -> int:
        """N."""
        ...

    @property
    def vector_bytes(self) -> int:
        """Memory of one vector of parameters."""
        ...

    @property
    def reference_nats(self) -> float:
        """Loss of a uniform guess, ln|V|."""
        ...

    def initial(self) -> V:
        """θ_0."""
        ...

    def descend(self, parameters: V, weights: Weights, *, norm: float | None = None) -> tuple[V, float]:
        """One step θ_{t+1} = θ_t − η·∇mean_n(w_n·l_n).

        Args:
            parameters: θ_t.
            weights: [N], mean 1.
            norm: where given, the gradient is rescaled to this norm.

        Returns:
            θ_{t+1}, and the norm of the gradient that was followed.
        """
        ...

    def target_gradient(self, parameters: V) -> V:
        """∇L_A."""
        ...

    def replay(self, parameters: Sequence[V], weights: Weights) -> Segment[V]:
        """The steps that start at these k parameters under these weights [k, N]."""
        ...

    def mean_losses(self, parameters: Sequence[V], split: Split) -> NDArray[np.float64]:
        """Mean loss on a split at each of the parameters, [k]."""
        ...
