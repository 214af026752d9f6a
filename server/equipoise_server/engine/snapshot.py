"""A whole policy at one version, apart from the tables in use: what forks, exports and re-publications need."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from equipoise_server.engine import tables
from equipoise_server.engine.policy import Policy
from equipoise_server.engine.progress import Progress
from equipoise_server.engine.trainers import Trainers
from equipoise_server.rules import Guard, Scalars, TableState
from equipoise_server.store import Page


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a policy keeps beside its tables, as of one version.

    Attributes:
        progress: version, losses, evidence.
        trainers: deduplication table, as JSON.
        scalars: of the last step.
        guard: what g follows from.
    """

    progress: Progress
    trainers: str
    scalars: Scalars
    guard: Guard

    @classmethod
    def of(cls, policy: Policy) -> "Facts":
        """The facts of now."""
        return cls(
            progress=policy.progress,
            trainers=policy.trainers.to_json(),
            scalars=dict(policy.state.scalars),
            guard=policy.state.guard,
        )

    def put_into(self, state: TableState, trainers: Trainers) -> None:
        """Gives the facts back to a state and a deduplication table."""
        state.scalars = dict(self.scalars)
        state.guard, state.guard_strength = self.guard, self.guard.strength
        trainers.load_json(self.trainers)

    def to_fields(self) -> dict[str, bytes]:
        """As stored."""
        return {
            "progress": self.progress.to_json().encode(),
            "trainers": self.trainers.encode(),
            "scalars": json.dumps(self.scalars).encode(),
            "guard": json.dumps(self.guard.to_scalars()).encode(),
        }

    @classmethod
    def from_fields(cls, fields: dict[str, bytes]) -> "Facts":
        """As they were stored; a policy that was never swept has none."""
        return cls(
            progress=Progress.from_json(fields.get("progress", b"{}")),
            trainers=fields.get("trainers", b"{}").decode(),
            scalars=json.loads(fields.get("scalars", b"{}")),
            guard=Guard.from_scalars(json.loads(fields["guard"])) if "guard" in fields else Guard(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Facts and a copy of every table.

    Attributes:
        facts: see `Facts`.
        columns: little-endian bytes of each table, by name.
        row_bytes: bytes per row of each table.
        num_rows: rows of every table.
        page_rows: rows per page.
    """

    facts: Facts
    columns: dict[str, bytes]
    row_bytes: dict[str, int]
    num_rows: int
    page_rows: int

    @classmethod
    def of(cls, policy: Policy) -> "Snapshot":
        """A copy of now."""
        state = policy.state
        columns = {name: tables.slice_bytes(column, 0, state.num_rows) for name, column in state.columns.items()}
        return cls.shaped(state, facts=Facts.of(policy), columns=columns)

    @classmethod
    def shaped(cls, state: TableState, *, facts: Facts, columns: dict[str, bytes]) -> "Snapshot":
        """A snapshot whose tables have the shapes of a state's; `columns` holds their bytes."""
        return cls(
            facts=facts,
            columns=columns,
            row_bytes={name: tables.row_bytes(column) for name, column in state.columns.items()},
            num_rows=state.num_rows,
            page_rows=state.page_rows,
        )

    def pages(self) -> Iterator[tuple[int, Page]]:
        """Every page, as the store takes them; none of a policy without tables."""
        for index, start in enumerate(range(0, self.num_rows, self.page_rows)):
            stop = min(start + self.page_rows, self.num_rows)
            columns = {
                name: data[start * self.row_bytes[name] : stop * self.row_bytes[name]]
                for name, data in self.columns.items()
            }
            yield index, Page(version=self.facts.progress.version, columns=columns)
