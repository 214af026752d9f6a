"""What every rule does with its own parts in the same way."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.base import LoggedStatistics, RuleError, Scalars, Statistics, StrataReport, TableState
from equipoise_server.rules.slices import Slices, exhaust


class ComposedRule(ABC):
    """Base of all rules: the methods that are made of others (see `Rule` for what each public method promises)."""

    name: ClassVar[str]
    sparse_contributions: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def init_slices(self, num_examples: int, *, device: torch.device) -> Slices[TableState]:
        """The uniform policy, in slices."""

    @abstractmethod
    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the step lacks what the rule needs."""

    @abstractmethod
    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """The step's scalars."""

    @abstractmethod
    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """The step's row updates."""

    @abstractmethod
    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks the tables and recomputes the exact sums, in slices."""

    @abstractmethod
    def effective_examples(self, state: TableState) -> float:
        """1/Σγ²."""

    def effective_ratio(self, state: TableState) -> float:
        """Effective examples over N."""
        return self.effective_examples(state) / state.num_examples

    def read_kept(self, state: TableState, name: str, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Raises RuleError: nothing is kept but weights and scores."""
        raise RuleError("field", f"field = {name}: rule {self.name} keeps no such values")

    def strata(self, state: TableState) -> StrataReport | None:
        """None."""
        return None

    def init(self, num_examples: int, *, device: torch.device) -> TableState:
        """The uniform policy."""
        return exhaust(self.init_slices(num_examples, device=device))

    def update(self, state: TableState, statistics: Statistics) -> TableState:
        """The next policy."""
        self.check(statistics)
        return self.apply(state, statistics, self.prepare(state, statistics))

    def replay(self, state: TableState, steps: Sequence[LoggedStatistics]) -> TableState:
        """The policy after these steps, one after another."""
        for step in steps:
            state = self.apply(state, step.statistics, step.scalars, pages=step.pages)
        return state

    def restore(self, state: TableState) -> TableState:
        """Checks the tables and recomputes the exact sums."""
        return exhaust(self.restore_slices(state))
