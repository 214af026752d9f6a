"""What table rules and batch rules have in common: one policy for all training steps, no trajectory."""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import PAGE_EXAMPLES, RuleError, Statistics, TableState
from equipoise_server.rules.composed import ComposedRule


class OnlineRule(ComposedRule):
    """Base of the rules that work inside one training run (see `Rule` for what each method promises)."""

    touches_all_rows: ClassVar[bool] = False
    trajectory_rows: ClassVar[int] = 0

    def touched_pages(self, state: TableState, statistics: Statistics) -> NDArray[np.int64] | slice:
        """The pages of the step's examples."""
        if self.touches_all_rows or statistics.ids is None:
            return slice(None)
        return statistics.ids // PAGE_EXAMPLES

    def max_log_bytes(self, state: TableState) -> int | None:
        """None: a step dirties pages all over the tables."""
        return None

    def trajectory_weights(self, state: TableState, rows: slice, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Raises RuleError."""
        raise RuleError("first_row", f"first_row = {rows.start}: rule {self.name} has no trajectory rows")
