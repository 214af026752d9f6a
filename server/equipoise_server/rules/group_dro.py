"""`group_dro`: sources by exponentiated ascent on their losses, so that the worst one gets better."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.arrays import Array, here, there
from equipoise_server.rules.base import Scalars, TableState
from equipoise_server.rules.settings import MIN_FLOOR, RuleSettings, number
from equipoise_server.rules.sources import Columns, Nats, SourceRule, latest
from equipoise_server.rules.table import RAW

ROWS = "rows"
"""Column of how many rows of a source there were, int32; 0: none."""

MAX_ROWS = 2**31 - 1
"""Where counting ends: int32 holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDroSettings(RuleSettings):
    """Settings of `group_dro`."""

    learning_rate: float = number(0.01, low=1e-6, high=10.0)
    """η, per nat: what a loss adds to the log weight of its source in a step."""

    adjustment: float = number(0.0, low=0.0, high=1e6)
    """C, nats: C/√n is added to the loss of a source with n rows so far, since what is small generalises worse."""

    floor: float = number(0.01, low=MIN_FLOOR, high=1.0)
    """ε, smallest weight. The paper has none: there, a source that lost all weight takes as long to come back."""


class GroupDro(SourceRule):
    """w ← w·exp(η·(loss + C/√n)) for the sources in a step, w ← w/mean(w), w ← (1-ε)·w + ε.

    Algorithm 1 of Sagawa et al. 2020 (arXiv 1911.08731), of which q = w/K, with the group adjustment of its section
    3.3; n is the number of rows that were reported so far, in the first pass the size of what was seen. Sources that
    are not in a step keep their weight, up to the mean. It is the losses' differences that add up, step after step: the
    highest loss gets all in the end, unless it falls.
    """

    def __init__(self, settings: GroupDroSettings) -> None:
        super().__init__(
            settings,
            scale=Nats(rule="group_dro"),
            advance=latest,
            rate=settings.learning_rate,
            floor=settings.floor,
            statistic="loss",
            ascends=True,
            absent_stay=True,
        )
        self._adjustment = settings.adjustment

    @property
    def columns(self) -> Mapping[str, torch.dtype]:
        """Also the number of rows."""
        return {**super().columns, ROWS: torch.int32}

    def visit(
        self, old: Columns, signal: NDArray[np.float64], counts: NDArray[np.int64], scalars: Scalars
    ) -> dict[str, Array]:
        """loss + C/√n, and n."""
        rows = np.minimum(here(old[ROWS]).astype(np.int64) + counts, MAX_ROWS)
        adjusted = signal + self._adjustment / np.sqrt(rows.astype(np.float64))
        return {**super().visit(old, adjusted, counts, scalars), ROWS: there(old[RAW], rows.astype(np.int32))}

    def _check_span(self, state: TableState, span: slice) -> None:
        super()._check_span(state, span)
        raw, rows = state.columns[RAW][span], state.columns[ROWS][span]
        self._check_rows(ROWS, rows, torch.where(raw < 0, rows == 0, rows >= 1), span.start)
