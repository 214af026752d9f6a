"""`trajectory`: the paper's offline policy γ[T,N], one policy per training step, held between replays of the run."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.base import PAGE_EXAMPLES, RuleError, Scalars, Statistics, TableState
from equipoise_server.rules.rule import Rule
from equipoise_server.rules.settings import RuleSettings, flag, integer, number
from equipoise_server.rules.signals import check_finite, check_length, check_signals
from equipoise_server.rules.simplex import MAX_EXAMPLES, project_simplex
from equipoise_server.rules.slices import Slices, fill

WEIGHT = "weight"
"""Column of served weights N·γ, float32 [T, N]."""
UPDATES = "updates"
"""Column of u_t, how often a row was moved, int32 [T]."""
EFFECTIVE = "effective"
"""Column of 1/Σγ_t², float32 [T]."""

MEAN_TOLERANCE = 1e-6
"""How far the mean of a row's float32 weights may be from 1."""

LEAST_LOG_BYTES = 1 << 20
"""No sweep is worth it for less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectorySettings(RuleSettings):
    """Settings of `trajectory`."""

    guard: bool = flag(False)
    """Off: the run is replayed again and again, and a guard loss at its start says nothing of the one before."""

    rows: float = integer(None, low=1, high=1e7)
    """T, training steps of the run whose policy is searched."""

    learning_rate: float = number(None, low=1e-30, high=1e30)
    """ε₀, step size in the units of the paper's Eq. 6: γ_t ← Proj(γ_t + ε_t·c), γ_t a point of the simplex (sum 1), c
    exactly as the trainer sent it. The paper's text has 5e-6 for J = Σ_t L(θ_t); for a mean over t multiply by T."""

    policy_epochs: float = integer(0, low=1, high=1e9, or_zero=True)
    """E, updates of a row over which its step size falls linearly to 0: ε_t = ε₀·max(0, 1 − u_t/E), u_t updates the
    row has had. 0: the step size stays ε₀."""


class Trajectory(Rule):
    """γ_t ← projection of γ_t + ε_t·c onto the simplex, as the contributions c = λ_{t+1}·∇l_n of row t arrive.

    arXiv 2402.17759, Eq. 6, with the linear decay of the paper's code. A step moves one row, which its contributions
    must cover wholly: a row moved in pieces would be projected between them, which is another point. Weights become
    exactly zero and can come back: trainers measure the unweighted loss of those examples too (see `Rule` for what
    each public method promises).
    """

    name = "trajectory"
    signals = ("contributions",)

    def __init__(self, settings: TrajectorySettings) -> None:
        super().__init__(settings)
        self._settings = settings

    @property
    def columns(self) -> Mapping[str, torch.dtype]:
        """Weights, and per row its updates and its effective examples."""
        return {WEIGHT: torch.float32, UPDATES: torch.int32, EFFECTIVE: torch.float32}

    @property
    def trajectory_rows(self) -> int:
        """T."""
        return int(self._settings.rows)

    def init_slices(self, num_examples: int, *, device: torch.device) -> Slices[TableState]:
        """Every row uniform, in slices. Raises RuleError when a row would be longer than a projection can be."""
        if num_examples > MAX_EXAMPLES:
            message = f"num_examples = {num_examples}: rule {self.name} projects at most {MAX_EXAMPLES} examples"
            raise RuleError("num_examples", message)
        rows = self.trajectory_rows
        columns = {
            WEIGHT: torch.empty(rows, num_examples, dtype=torch.float32, device=device),
            UPDATES: torch.empty(rows, dtype=torch.int32, device=device),
            EFFECTIVE: torch.empty(rows, dtype=torch.float32, device=device),
        }
        yield from fill(columns[WEIGHT], 1.0)
        yield from fill(columns[UPDATES], 0)
        yield from fill(columns[EFFECTIVE], float(num_examples))
        return TableState(num_examples=num_examples, columns=columns, page_rows=max(1, PAGE_EXAMPLES // num_examples))

    def touched_pages(self, state: TableState, statistics: Statistics) -> NDArray[np.int64] | slice:
        """The one page that holds the step's row."""
        return slice(0, 0) if not statistics.size else np.array([self._row(statistics) // state.page_rows])

    def max_log_bytes(self, state: TableState) -> int:
        """A quarter of a policy epoch: with what arrives during a sweep the log stays below one."""
        return max(state.nbytes // 4, LEAST_LOG_BYTES)

    def check(self, statistics: Statistics) -> None:
        """Raises RuleError when the row is not in [0, T), or the step has rows but no contributions."""
        self._row(statistics)
        check_signals(statistics, signals=self.signals, rule=self.name)

    def prepare(self, state: TableState, statistics: Statistics) -> Scalars:
        """None: the row itself knows its step size."""
        self._contributions(state, statistics)
        return {}

    def apply(
        self, state: TableState, statistics: Statistics, scalars: Scalars, *, pages: NDArray[np.bool_] | None = None
    ) -> TableState:
        """Moves and projects the step's row."""
        contributions = self._contributions(state, statistics)
        row = self._row(statistics)
        if contributions is not None and (pages is None or pages[row // state.page_rows]):
            weights = state.columns[WEIGHT][row]
            updates = int(state.columns[UPDATES][row])
            step_size = state.num_examples * self.step_size(updates)
            if step_size:
                moved = project_simplex(weights.cpu().numpy() + step_size * contributions).astype(np.float32)
                weights.copy_(torch.from_numpy(moved))
                state.columns[EFFECTIVE][row] = _effective(moved)
            state.columns[UPDATES][row] = updates + 1
            state.scored = state.num_examples
        state.scalars = dict(scalars)
        return state

    def restore_slices(self, state: TableState) -> Slices[TableState]:
        """Checks the tables and recomputes what follows from the weights, row by row."""
        fresh = self.init(state.num_examples, device=torch.device("meta"))
        for name, expected in fresh.columns.items():
            column = state.columns.get(name)
            if column is None or column.dtype != expected.dtype or column.shape != expected.shape:
                shape = list(expected.shape)
                raise RuleError(f"state.{name}", f"state.{name}: rule {self.name} needs {expected.dtype} {shape}")
        for row, weights in enumerate(state.columns[WEIGHT]):
            values = weights.cpu().numpy()
            if not (values.min() >= 0.0 and abs(values.mean(dtype=np.float64) - 1.0) <= MEAN_TOLERANCE):
                where = f"state.{WEIGHT}[{row}]"
                raise RuleError(f"state.{WEIGHT}", f"{where}: rule {self.name} only writes weights >= 0 with mean 1")
            state.columns[EFFECTIVE][row] = _effective(values)
            yield
        updates = state.columns[UPDATES]
        if int(updates.min()) < 0:
            raise RuleError(f"state.{UPDATES}", f"state.{UPDATES}: rule {self.name} never writes a negative number")
        state.scored = state.num_examples if int(updates.max()) > 0 else 0
        return state

    def weights(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The mean over the rows."""
        return _served(self._means(state, ids), state)

    def trajectory_weights(self, state: TableState, rows: slice, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The rows. Raises RuleError when they are not in [0, T)."""
        if not 0 <= rows.start < rows.stop <= self.trajectory_rows:
            what = f"first_row = {rows.start}, num_rows = {rows.stop - rows.start}"
            raise RuleError("first_row", f"{what}: rule {self.name} has rows [0, {self.trajectory_rows})")
        return _served(self._columns_of(state.columns[WEIGHT][rows], ids), state)

    def answer(
        self, state: TableState, statistics: Statistics | None, ids: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """The row of the step or read; without one the mean over the rows."""
        if statistics is None or statistics.trajectory_row is None:
            return self.weights(state, ids)
        row = self._row(statistics)
        return _served(self._columns_of(state.columns[WEIGHT][row : row + 1], ids)[0], state)

    def scores(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """The mean weight over the rows, before the guard; NaN before the first step."""
        if not state.scored:
            return np.full(state.num_examples if ids is None else len(ids), np.nan, np.float32)
        return self._means(state, ids).astype(np.float32)

    def above_floor(
        self, state: TableState, ids: NDArray[np.int64] | None, *, trajectory_row: int | None = None
    ) -> NDArray[np.bool_]:
        """Whether the weight in the row (without one: in any row) is above 0."""
        rows = slice(None) if trajectory_row is None else slice(trajectory_row, trajectory_row + 1)
        return np.asarray((self._columns_of(state.columns[WEIGHT][rows], ids) > 0.0).any(axis=0))

    def effective_examples(self, state: TableState) -> float:
        """The mean over the rows of 1/Σγ_t², with the guard's mix expanded."""
        guard, size = state.guard_strength, float(state.num_examples)
        effective = state.columns[EFFECTIVE].cpu().numpy().astype(np.float64)
        if guard:
            kept = 1.0 - guard
            effective = size / (kept * kept * size / effective + (2.0 * kept + guard) * guard)
        return min(max(float(effective.mean()), 1.0), size)

    def step_size(self, updates: int) -> float:
        """ε_t of a row that has had so many updates."""
        epochs = self._settings.policy_epochs
        return self._settings.learning_rate * (max(0.0, 1.0 - updates / epochs) if epochs else 1.0)

    def _row(self, statistics: Statistics) -> int:
        row = statistics.trajectory_row
        if row is None or not 0 <= row < self.trajectory_rows:
            raise RuleError("step", f"step = {row}: rule {self.name} has rows [0, {self.trajectory_rows})")
        return row

    def _contributions(self, state: TableState, statistics: Statistics) -> NDArray[np.float64] | None:
        """The contributions of all examples in order, float64 [N]; None where the step has none."""
        given, name = statistics.contributions, self.signals[0]
        if given is None or not statistics.size:
            return None
        ids, size = statistics.ids, state.num_examples
        check_length(given, statistics, num_examples=size, name=name, rule=self.name)
        if ids is not None and not 0 <= ids.min() <= ids.max() < size:
            raise IndexError(f"ids must be in [0, {size})")
        if len(given) != size:
            message = f"{name} of {len(given)} of {size} examples: a step of rule {self.name} needs all, each scored"
            raise RuleError(name, message)
        check_finite(given, name=name, rule=self.name)
        ordered = given.astype(np.float64)
        if ids is not None:
            ordered[ids] = given
        return ordered

    def _means(self, state: TableState, ids: NDArray[np.int64] | None) -> NDArray[np.float64]:
        """Mean weights over the rows: numpy adds row after row, whatever the number of threads."""
        return np.asarray(self._columns_of(state.columns[WEIGHT], ids).mean(axis=0, dtype=np.float64))

    def _columns_of(self, weights: torch.Tensor, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Weights [rows, N] of some examples, on the host."""
        if ids is not None:
            index = torch.from_numpy(ids if ids.flags.writeable else ids.copy()).to(weights.device)
            weights = weights.index_select(1, index)
        return np.asarray(weights.cpu().numpy(), dtype=np.float32)


def _effective(weights: NDArray[np.float32]) -> float:
    """(Σw)²/Σw², in [1, N]: one numpy thread adds, whatever the machine has."""
    values = weights.astype(np.float64)
    return min(max(float(values.sum() ** 2 / np.square(values).sum()), 1.0), float(len(values)))


def _served(weights: NDArray[np.float32] | NDArray[np.float64], state: TableState) -> NDArray[np.float32]:
    guard = state.guard_strength
    mixed = weights.astype(np.float64) * (1.0 - guard) + guard if guard else weights
    return mixed.astype(np.float32)  # a copy: the table goes on changing
