"""A policy as a deterministic machine: steps in, answers and log entries out, no I/O."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.engine import tables
from equipoise_server.engine.codec import LoggedStep, decode, encode
from equipoise_server.engine.header import Header
from equipoise_server.engine.progress import Progress
from equipoise_server.engine.snapshot import Snapshot
from equipoise_server.engine.spec import PolicySpec
from equipoise_server.engine.status import PolicyStatus, RuleKind
from equipoise_server.engine.step import Answer, Kind, Outcome, Step
from equipoise_server.engine.trainers import Trainers
from equipoise_server.errors import Code, ServiceError, invalid
from equipoise_server.rules import (
    Evidence,
    LoggedStatistics,
    Rule,
    RuleError,
    Scalars,
    Slices,
    Statistics,
    TableState,
    evidence,
    exhaust,
)
from equipoise_server.store import LogEntry, LogLost
from equipoise_server.values import value

REPLAY_ENTRY_S = 4e-5
"""Time to replay a log entry, without its rows, on a core of 2020: read, decoded, applied."""
REPLAY_ROW_S = 1.5e-7
"""Time to replay a row of it."""
REPLAY_ENTRIES, REPLAY_ROWS = 512, 65_536
"""Most entries, and about how many rows, that are replayed in one piece."""


@value
class Taken:
    """What became of a step or read.

    Attributes:
        answer: to its caller.
        entry: what to keep of it; None: nothing changed.
        replay_s: about how long a replay of the entry will take, seconds.
    """

    answer: Answer
    entry: LogEntry | None = None
    replay_s: float = 0.0


class Policy:
    """Applies steps to a rule's tables. Not thread-safe: one thread calls it at a time.

    The same steps in the same order give the same state, bit for bit, whether they arrive live or from the log.
    """

    def __init__(self, spec: PolicySpec, uid: str, *, rule: Rule, state: TableState, trainers: Trainers) -> None:
        self.spec = spec
        self.uid = uid
        self.rule = rule
        self.state = state
        self.trainers = trainers
        self.progress = Progress()
        settings = rule.settings
        self._guard_stretch = float(settings["guard_stretch"]) if settings["guard"] else None
        self._changed_at: NDArray[np.int64] = np.zeros(state.num_pages, dtype=np.int64)
        """Version of the last step that changed each page."""
        self.stored_at: NDArray[np.int64] = np.zeros(state.num_pages, dtype=np.int64)
        """Version at which the store holds each page; -1: not known."""
        self._snapshots: list[Snapshot] = []

    @property
    def version(self) -> int:
        """Steps applied or refused so far."""
        return self.progress.version

    def apply(self, step: Step, *, now: float, with_evidence: bool = True) -> Taken:
        """Takes one step or read.

        Raises ServiceError, with nothing changed: on a sequence gap, and on a refused step outside of a stream.
        """
        if step.kind is Kind.READ:
            return Taken(answer=self._answer(step, Outcome.REFUSED if step.error else Outcome.READ))
        if step.sequence and self.trainers.is_duplicate(step.trainer_id, step.sequence):
            return Taken(answer=self._answer_duplicate(step))
        scalars: Scalars = {}
        found: Evidence | None = None
        started = perf_counter()
        if step.kind is Kind.STEP:
            try:
                scalars, found = self._update(step, with_evidence=with_evidence)
            except RuleError as error:
                refusal = invalid("UNUSABLE_STATISTICS", error.field, str(error))
                if not (step.sequence and step.in_stream):
                    raise refusal from error
                step = replace(step, kind=Kind.REFUSED, error=refusal)
        seconds = perf_counter() - started
        refused = step.error.reason if step.kind is Kind.REFUSED and step.error else None
        if refused:
            self.progress = self.progress.after_refusal()
        if step.sequence:
            self.trainers.record(step.trainer_id, step.sequence, now, refused=refused)
        entry = LogEntry(
            version=self.version, fields=encode(LoggedStep(step=step, scalars=scalars, evidence=found, at=now))
        )
        return Taken(
            answer=self._answer(step, Outcome.REFUSED if refused else Outcome.APPLIED),
            entry=entry,
            replay_s=self._replay_seconds(step, seconds),
        )

    def replay(self, entries: Sequence[LogEntry]) -> Slices[float]:
        """Applies log entries to every page that does not hold them yet; about how long it will take another time.

        Raises LogLost when entries are missing.
        """
        started = perf_counter()
        estimate = 0.0
        for chunk in _chunks(entries):
            self._replay(chunk)
            estimate += sum(self._replay_seconds(logged.step, 0.0) for _, logged in chunk)
            yield
        return perf_counter() - started if self._replays_slowly else estimate

    def load(self, header: Header, pages: Mapping[int, int]) -> Slices[None]:
        """Takes over what was stored, after the pages were put into the tables; `pages` gives each page's version.

        Raises RuleError when the tables hold what the rule can never write.
        """
        header.put_into(self.state, self.trainers)
        self.progress = header.progress
        for index, version in pages.items():
            self.stored_at[index] = self._changed_at[index] = version
        self.state.ahead = max([version - header.version for version in pages.values()] + [0])
        self.state = yield from self.rule.restore_slices(self.state)
        self.state.ahead = 0

    def drop(self) -> None:
        """Lets go of the tables at once; nothing works afterwards."""
        device = self.state.device
        self.state.columns.clear()
        for snapshot in self._snapshots:
            snapshot.drop()
        self._snapshots.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def dirty_pages(self) -> NDArray[np.bool_]:
        """Which pages the store does not hold as they are now, bool [P]."""
        return self._changed_at > self.stored_at

    def weights(self, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Served weights; see `Rule.weights`."""
        return self.rule.weights(self.state, ids)

    def status(self) -> PolicyStatus:
        """The picture of now."""
        return PolicyStatus(
            name=self.spec.name,
            rule=self.spec.rule,
            rule_kind=self._rule_kind,
            num_examples=self.spec.num_examples,
            reference_nats=self.spec.reference_nats,
            progress=self.progress,
            scored_examples=self.state.scored,
            effective_examples=self.rule.effective_examples(self.state),
            effective_ratio=self.rule.effective_ratio(self.state),
            keeps_scores=bool(self.rule.columns),
            guard_strength=self.state.guard_strength,
            guard_trials=(self.state.guard.trials_won, self.state.guard.trials_lost),
            table_bytes=self.state.nbytes,
            read_strata=partial(self.rule.strata, replace(self.state, columns={})),
        )

    @property
    def _rule_kind(self) -> RuleKind:
        if self.rule.trajectory_rows:
            return "trajectory"
        return "table" if self.rule.columns else "batch"

    @property
    def header(self) -> Header:
        """What belongs to no page, as of now."""
        return Header(
            progress=self.progress,
            trainers=self.trainers.to_json(),
            scalars=dict(self.state.scalars),
            guard=self.state.guard,
        )

    def snapshot(self) -> Snapshot:
        """The policy as it is now, for reading while steps go on; to be closed."""
        snapshot = Snapshot(self.spec.name, self.rule, self.state, self.header)
        self._snapshots.append(snapshot)
        return snapshot

    @property
    def has_snapshots(self) -> bool:
        """Whether a step may have to copy pages before it changes them."""
        return bool(self._snapshots)

    def close_snapshot(self, snapshot: Snapshot) -> None:
        """No page of it will be read again."""
        if snapshot in self._snapshots:
            self._snapshots.remove(snapshot)

    def preserve(self, steps: Sequence[Statistics | None]) -> Slices[None]:
        """Gives every open snapshot a copy of the pages that these steps are about to change."""
        for statistics in steps:
            if statistics is None:
                continue
            touched = self.rule.touched_pages(self.state, statistics)
            for snapshot in tuple(self._snapshots):
                for index in snapshot.lacks(touched).tolist():
                    self._copy_page(index)
                    yield

    def _copy_page(self, index: int) -> None:
        """One copy of a page for all snapshots that lack it: to them it is the same."""
        copy = {name: values.clone() for name, values in tables.page_columns(self.state, index).items()}
        for snapshot in self._snapshots:
            if len(snapshot.lacks(np.array([index]))):
                snapshot.keep(index, copy)

    def capture_page(self, index: int) -> tuple[int, dict[str, bytes]]:
        """A page's version and columns."""
        return self.version, tables.capture_page(self.state, index)

    def _update(self, step: Step, *, with_evidence: bool) -> tuple[Scalars, Evidence | None]:
        statistics = step.statistics
        scalars: Scalars = {}
        found = None
        if statistics is not None:
            scalars = self.rule.prepare(self.state, statistics)
            if with_evidence:
                found = evidence(self.rule, self.state, statistics, scalars)
            if self._snapshots:
                exhaust(self.preserve([statistics]))
            self.state = self.rule.apply(self.state, statistics, scalars)
            self._mark(statistics, version=self.version + 1)
        self._watch_guard(step)
        self.progress = self.progress.after(step, found)
        return scalars, found

    def _replay(self, chunk: Sequence[tuple[int, LoggedStep]]) -> None:
        applied = []
        for version, logged in chunk:
            if (statistics := logged.step.statistics) is not None:
                behind = self.stored_at < version
                pages = None if behind.all() else behind
                applied.append(LoggedStatistics(statistics=statistics, scalars=logged.scalars, pages=pages))
                self._mark(statistics, version=version, among=pages)
        self.state = self.rule.replay(self.state, applied)
        for version, logged in chunk:
            self._follow(version, logged)

    @property
    def _replays_slowly(self) -> bool:
        """Whether a step costs more than its rows."""
        keeps_more = len(self.state.sizes) > 0 or len(self.state.moments) > 0
        return self.rule.touches_all_rows or self.rule.trajectory_rows > 0 or keeps_more

    def _replay_seconds(self, step: Step, applied_in_s: float) -> float:
        rows = REPLAY_ROW_S * (step.statistics.size if step.statistics is not None else 0)
        return REPLAY_ENTRY_S + (max(rows, applied_in_s) if self._replays_slowly else rows)

    def _follow(self, version: int, logged: LoggedStep) -> None:
        """What a replayed step changes beside the tables."""
        if version <= self.version:
            return
        if version != self.version + 1:
            raise LogLost(self.spec.name, last_version=self.version)
        step = logged.step
        self._watch_guard(step)
        if step.kind is Kind.REFUSED:
            self.progress = self.progress.after_refusal()
        else:
            self.progress = self.progress.after(step, logged.evidence)
        if step.sequence:
            refused = step.error.reason if step.error else None
            self.trainers.record(step.trainer_id, step.sequence, logged.at, refused=refused)

    def _watch_guard(self, step: Step) -> None:
        if step.guard_loss is not None and self._guard_stretch is not None:
            self.state.guard = self.state.guard.after(step.guard_loss, stretch=self._guard_stretch)
            self.state.guard_strength = self.state.guard.strength

    def _mark(self, statistics: Statistics, *, version: int, among: NDArray[np.bool_] | None = None) -> None:
        if len(self._changed_at):
            touched = self.rule.touched_pages(self.state, statistics)
            self._changed_at[touched] = (
                version if among is None else np.where(among, version, self._changed_at)[touched]
            )

    def _answer_duplicate(self, step: Step) -> Answer:
        """A step that is sent again has no effect; one that was refused then is refused again."""
        if step.error is None:
            reason = self.trainers.refusal(step.trainer_id, step.sequence)
            if reason is None:
                return self._answer(step, Outcome.DUPLICATE)
            text = f"step {step.sequence} was refused when it came first"
            refusal = ServiceError(Code.INVALID_ARGUMENT, reason, text)
            if not step.in_stream:
                raise refusal
            step = replace(step, error=refusal)
        return self._answer(step, Outcome.REFUSED)

    def _answer(self, step: Step, outcome: Outcome) -> Answer:
        wanted = step.wants_weights and outcome is not Outcome.REFUSED
        return Answer(
            sequence=step.sequence,
            version=self.version,
            outcome=outcome,
            weights=self.rule.answer(self.state, step.statistics, step.weights_for) if wanted else None,
            error=step.error,
            last_sequence=self.trainers.last_sequence(step.trainer_id) if step.trainer_id else 0,
        )


def _chunks(entries: Sequence[LogEntry]) -> Iterator[list[tuple[int, LoggedStep]]]:
    """The versions and steps of log entries, in pieces."""
    chunk: list[tuple[int, LoggedStep]] = []
    rows = 0
    for entry in entries:
        logged = decode(entry.fields)
        chunk.append((entry.version, logged))
        rows += logged.step.statistics.size if logged.step.statistics is not None else 0
        if len(chunk) >= REPLAY_ENTRIES or rows >= REPLAY_ROWS:
            yield chunk
            chunk, rows = [], 0
    if chunk:
        yield chunk
