"""`excess_loss`: sources by how far the model is behind a reference model; DoReMi."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.arrays import Array, gather, here, namespace, rows_of, table
from equipoise_server.rules.base import Scalars, Statistics, TableState
from equipoise_server.rules.settings import MIN_FLOOR, RuleSettings, number
from equipoise_server.rules.signals import reducible_losses
from equipoise_server.rules.sources import TIME, Columns, Nats, SourceRule, latest
from equipoise_server.rules.table import RAW
from equipoise_server.rules.weights import ONE

MEAN_WEIGHT = "mean_weight"
"""Column of the mean weight over all steps, float32; 0 where a source never reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcessLossSettings(RuleSettings):
    """Settings of `excess_loss`."""

    learning_rate: float = number(1.0, low=1e-6, high=10.0)
    """η, per nat: what an excess loss adds to the log weight of its source in each step."""

    floor: float = number(1e-3, low=MIN_FLOOR, high=1.0)
    """c, smallest weight."""


class ReducibleNats(Nats):
    """loss - reference_loss, as it is, in nats."""

    signals = ("losses", "reference_losses")
    signal_name = "losses - reference_losses"

    def read(self, statistics: Statistics) -> NDArray[np.float32] | None:
        """loss - reference_loss, float32 [B]."""
        return reducible_losses(statistics)


class ExcessLoss(SourceRule):
    """w ← w·exp(η·λ), w ← w/mean(w), w ← (1-c)·w + c; λ = max(0, loss - reference_loss), the latest of each source.

    Algorithm 1 of Xie et al. 2023, DoReMi (arXiv 2305.10429), of which α = w/K. A source that is not in a step counts
    with its latest excess loss, as in the authors' code. The paper takes the maximum token by token, before the mean
    over the tokens of a source: a trainer that does the same sends that mean as losses, with reference losses of 0. The
    score is the mean weight over all steps, which is what the paper trains the large model with.
    """

    def __init__(self, settings: ExcessLossSettings) -> None:
        super().__init__(
            settings,
            scale=ReducibleNats(rule="excess_loss"),
            advance=latest,
            rate=settings.learning_rate,
            floor=settings.floor,
            statistic="excess",
            ascends=True,
        )

    @property
    def columns(self) -> Mapping[str, torch.dtype]:
        """Also the mean weight."""
        return {**super().columns, MEAN_WEIGHT: torch.float32}

    def visit(
        self, old: Columns, signal: NDArray[np.float64], counts: NDArray[np.int64], scalars: Scalars
    ) -> dict[str, Array]:
        """max(0, loss - reference_loss)."""
        return super().visit(old, signal.clip(min=0.0), counts, scalars)

    def scores(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The mean weight over all steps, without the guard; NaN where a source never reported."""
        raw, means = (table(state.columns[name]) for name in (RAW, MEAN_WEIGHT))
        rows = rows_of(raw, ids)
        return np.where(here(gather(raw, rows)) < 0, np.float32(np.nan), here(gather(means, rows)))

    def _weighed(self, visited: Columns, told: Array, scalars: Scalars) -> dict[str, Array]:
        """Also the mean weights: before its first step a source had weight 1."""
        weighed = super()._weighed(visited, told, scalars)
        before, after = visited[RAW], weighed[RAW]
        xp = namespace(after)
        old = xp.where(before < 0, 1.0, xp.asarray(visited[MEAN_WEIGHT], dtype=xp.float64))
        moved = old + (xp.asarray(after, dtype=xp.float64) * (1.0 / ONE) - old) * (1.0 / scalars[TIME])
        means = xp.asarray(xp.where(after < 0, 0.0, moved), dtype=xp.float32)
        return {**weighed, MEAN_WEIGHT: means}

    def _check_span(self, state: TableState, span: slice) -> None:
        super()._check_span(state, span)
        excess, means = state.columns[self.statistic][span], state.columns[MEAN_WEIGHT][span]
        self._check_rows(self.statistic, excess, excess >= 0.0, span.start)
        self._check_rows(MEAN_WEIGHT, means, torch.isfinite(means) & (means >= 0.0), span.start)
