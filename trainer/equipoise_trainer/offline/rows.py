"""Who holds the rows of the policy: the interface, and a holder in this process."""

import math
import secrets
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.offline.simplex import project

Weights: TypeAlias = NDArray[np.float32]
"""Served weights N·γ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """What the policy is.

    Attributes:
        num_examples: N ≥ 2.
        rows: T ≥ 1, one row per training step.
        policy_epochs: how often each row will be moved; the step size falls linearly to 0 over them.
        learning_rate: ε₀ > 0, of contributions as they are sent. In the units of the paper's J this is η·ε.
    """

    num_examples: int
    rows: int
    policy_epochs: int
    learning_rate: float

    def __post_init__(self) -> None:
        for name, least in (("num_examples", 2), ("rows", 1), ("policy_epochs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}, must be at least {least}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate: {self.learning_rate}, must be a positive number")

    def step_size(self, moves: int) -> float:
        """ε of a row's next move, after `moves` of them."""
        return self.learning_rate * max(0.0, 1.0 - moves / self.policy_epochs)


class RowHolder(Protocol):
    """Holds γ[T, N], all 1/N at first: gives rows out, and moves them one by one."""

    @property
    def settings(self) -> RowSettings:
        """What the policy is."""
        ...

    @property
    def identity(self) -> str:
        """Tells this policy from every other."""
        ...

    def moves(self) -> int:
        """How many moves have been applied, over all rows."""
        ...

    def fetch(self, first: int, count: int) -> Weights:
        """Rows `first` to `first + count`, float32 [count, N], as of all moves made before."""
        ...

    def move(self, row: int, contributions: NDArray[np.float32]) -> None:
        """Moves a row by its contributions [N] and projects it onto the simplex; may return before that is done."""
        ...

    def flush(self) -> None:
        """Waits until all moves are applied and kept."""
        ...


class LocalRows:
    """Rows in this process: what any other holder is compared with. Kept as weights are served, float32."""

    def __init__(self, settings: RowSettings) -> None:
        self._settings = settings
        self._identity = f"local-{secrets.token_hex(8)}"
        self._table = np.ones((settings.rows, settings.num_examples), dtype=np.float32)
        self._moved = np.zeros(settings.rows, dtype=np.int64)

    @property
    def settings(self) -> RowSettings:
        """What the policy is."""
        return self._settings

    @property
    def identity(self) -> str:
        """Random: these rows end with the process."""
        return self._identity

    def moves(self) -> int:
        """How many moves have been applied, over all rows."""
        return int(self._moved.sum())

    def fetch(self, first: int, count: int) -> Weights:
        """Rows `first` to `first + count`, float32 [count, N]."""
        return self._table[first : first + count].copy()

    def move(self, row: int, contributions: NDArray[np.float32]) -> None:
        """Moves a row at once."""
        step = self._settings.step_size(int(self._moved[row]))
        gamma = self._table[row].astype(np.float64) / self._settings.num_examples
        self._table[row] = project(gamma + step * contributions) * self._settings.num_examples
        self._moved[row] += 1

    def flush(self) -> None:
        """Does nothing: moves are applied at once."""
