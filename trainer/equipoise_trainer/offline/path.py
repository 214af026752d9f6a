"""A training run forwards: its parameters at every step, all kept, or some kept and the others run again."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.offline.problem import Problem, Segment, V
from equipoise_trainer.offline.rows import Weights

MEMORY_BYTES = 1 << 30
"""Memory for parameters that are kept, unless told otherwise."""

BATCH = 64
"""Steps of a segment where all parameters are kept: enough for efficient matrix products."""


@dataclass(slots=True, kw_only=True)
class RunPath(Generic[V]):
    """θ_0 … θ_T under given rows.

    Attributes:
        problem: what was learned.
        weights: the rows, [T, N].
        segment: steps that are looked at together; where not all is kept, θ is kept at the start of each.
        keeps_all: whether every θ is kept.
        norms: [T], what each gradient was rescaled to; None: to nothing.
        gradient_norms: [T], of the gradients that were followed.
        last: θ_T.
    """

    problem: Problem[V]
    weights: Weights
    segment: int
    keeps_all: bool
    norms: NDArray[np.float64] | None
    gradient_norms: NDArray[np.float64]
    last: V
    _kept: dict[int, V] = field(default_factory=dict)

    @classmethod
    def run(
        cls,
        problem: Problem[V],
        weights: Weights,
        *,
        norms: NDArray[np.float64] | None = None,
        memory_bytes: int = MEMORY_BYTES,
        on_step: Callable[[int], None] | None = None,
    ) -> "RunPath[V]":
        """Trains T steps.

        Args:
            problem: what is learned.
            weights: the rows, [T, N].
            norms: [T]; where given, the gradient of each step is rescaled to its norm.
            memory_bytes: memory for parameters. Where T of them do not fit, √T are kept and a backward pass runs the
                steps between them once more.
            on_step: called after each step with the number of steps done.
        """
        steps = len(weights)
        keeps_all = steps * problem.vector_bytes <= memory_bytes
        path = cls(
            problem=problem,
            weights=weights,
            segment=BATCH if keeps_all else math.isqrt(steps - 1) + 1,
            keeps_all=keeps_all,
            norms=norms,
            gradient_norms=np.zeros(steps),
            last=problem.initial(),
        )
        for step in range(steps):
            if keeps_all or step % path.segment == 0:
                path._kept[step] = path.last
            path.last, path.gradient_norms[step] = path._descend(path.last, step)
            if on_step is not None:
                on_step(step + 1)
        return path

    @property
    def steps(self) -> int:
        """T."""
        return len(self.weights)

    def segments(self) -> list[range]:
        """The steps of each segment, in order."""
        edges = range(0, self.steps, self.segment)
        return [range(first, min(first + self.segment, self.steps)) for first in edges]

    def parameters(self, steps: range) -> list[V]:
        """θ at the steps of a segment."""
        if self.keeps_all:
            return [self._kept[step] for step in steps]
        found = [self._kept[steps.start]]
        for step in steps[:-1]:
            found.append(self._descend(found[-1], step)[0])
        return found

    def replay(self, steps: range) -> Segment[V]:
        """A segment, ready to be pulled back."""
        return self.problem.replay(self.parameters(steps), self.weights[steps.start : steps.stop])

    def _descend(self, parameters: V, step: int) -> tuple[V, float]:
        norm = None if self.norms is None else float(self.norms[step])
        return self.problem.descend(parameters, self.weights[step], norm=norm)
