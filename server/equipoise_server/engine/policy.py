"""A policy as a deterministic machine: steps in, answers and log entries out, no I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from equipoise_server.engine import tables
from equipoise_server.engine.codec import LoggedStep, decode, encode
from equipoise_server.engine.progress import Progress
from equipoise_server.engine.spec import PolicySpec
from equipoise_server.engine.step import Answer, Kind, Outcome, Step
from equipoise_server.engine.trainers import Trainers
from equipoise_server.errors import invalid
from equipoise_server.rules import Evidence, Rule, RuleError, Scalars, Statistics, TableState, evidence
from equipoise_server.store import LogEntry, LogLost


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """A consistent picture of a policy between two steps; see `equipoise.v1.PolicyStatus` for units.

    Attributes:
        progress: version, losses, evidence.
        scored_examples: K.
        effective_examples: 1/Σγ².
        guard_strength: g.
        table_bytes: memory of the tables.
    """

    progress: Progress
    scored_examples: int
    effective_examples: float
    guard_strength: float
    table_bytes: int


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
        self.dirty_pages: NDArray[np.bool_] = np.zeros(state.num_pages, dtype=np.bool_)
        """Pages that changed since they were last captured for the store."""
        self._page_versions: NDArray[np.int64] = np.zeros(state.num_pages, dtype=np.int64)

    @property
    def version(self) -> int:
        """Steps applied or refused so far."""
        return self.progress.version

    def apply(self, step: Step, *, now: float, with_evidence: bool = True) -> tuple[Answer, LogEntry | None]:
        """Takes one step or read; the log entry is what to keep of it (None: nothing changed).

        Raises ServiceError, with nothing changed, on a sequence gap and on a refused step that has no sequence.
        """
        if step.kind is Kind.READ:
            return self._answer(step, Outcome.REFUSED if step.error else Outcome.READ), None
        if step.sequence and self.trainers.is_duplicate(step.trainer_id, step.sequence):
            return self._answer(step, Outcome.REFUSED if step.error else Outcome.DUPLICATE), None
        if step.kind is Kind.STEP:
            try:
                scalars, found = self._update(step, with_evidence=with_evidence)
            except RuleError as error:
                refusal = invalid("UNUSABLE_STATISTICS", error.field, str(error))
                if not step.sequence:
                    raise refusal from error
                step = replace(step, kind=Kind.REFUSED, error=refusal)
        if step.kind is Kind.REFUSED:
            scalars, found = {}, None
            self.progress = self.progress.after_refusal()
        if step.sequence:
            self.trainers.record(step.trainer_id, step.sequence, now)
        logged = LoggedStep(step=step, scalars=scalars, evidence=found, at=now)
        entry = LogEntry(version=self.version, fields=encode(logged))
        return self._answer(step, Outcome.REFUSED if step.kind is Kind.REFUSED else Outcome.APPLIED), entry

    def replay(self, entry: LogEntry) -> None:
        """Applies a log entry to every page that does not hold it yet. Raises LogLost when entries are missing."""
        logged = decode(entry.fields)
        step = logged.step
        if step.statistics is not None:
            behind = self._page_versions < entry.version
            self.state = self.rule.apply(
                self.state, step.statistics, logged.scalars, pages=None if behind.all() else behind
            )
            self._mark(step.statistics, among=behind)
        if entry.version <= self.version:
            return
        if entry.version != self.version + 1:
            raise LogLost(self.spec.name, last_version=self.version)
        self._watch_guard(step)
        refused = step.kind is Kind.REFUSED
        self.progress = self.progress.after_refusal() if refused else self.progress.after(step, logged.evidence)
        if step.sequence:
            self.trainers.record(step.trainer_id, step.sequence, logged.at)

    def load(self, progress: Progress, pages: Mapping[int, int]) -> None:
        """Takes over stored facts, after the pages were put into the tables; `pages` gives each page's version.

        Raises RuleError when the tables hold what the rule can never write.
        """
        self.progress = progress
        for index, version in pages.items():
            self._page_versions[index] = version
        self.state = self.rule.restore(self.state)

    def weights(self, ids: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Served weights; see `Rule.weights`."""
        return self.rule.weights(self.state, ids)

    def status(self) -> PolicyStatus:
        """The picture of now."""
        return PolicyStatus(
            progress=self.progress,
            scored_examples=self.state.scored,
            effective_examples=self.rule.effective_examples(self.state),
            guard_strength=self.state.guard_strength,
            table_bytes=self.state.nbytes,
        )

    def capture_page(self, index: int) -> tuple[int, dict[str, bytes]]:
        """A page's version and columns; the page is clean from now on."""
        self.dirty_pages[index] = False
        return self.version, tables.capture_page(self.state, index)

    def _update(self, step: Step, *, with_evidence: bool) -> tuple[Scalars, Evidence | None]:
        statistics = step.statistics
        scalars: Scalars = {}
        found = None
        if statistics is not None:
            scalars = self.rule.prepare(self.state, statistics)
            if with_evidence:
                found = evidence(self.rule, self.state, statistics, scalars)
            self.state = self.rule.apply(self.state, statistics, scalars)
            self._mark(statistics)
        self._watch_guard(step)
        self.progress = self.progress.after(step, found)
        return scalars, found

    def _watch_guard(self, step: Step) -> None:
        if step.guard_loss is not None and self._guard_stretch is not None:
            self.state.guard = self.state.guard.after(step.guard_loss, stretch=self._guard_stretch)
            self.state.guard_strength = self.state.guard.strength

    def _mark(self, statistics: Statistics, among: NDArray[np.bool_] | None = None) -> None:
        if len(self.dirty_pages):
            touched = self.rule.touched_pages(self.state, statistics)
            self.dirty_pages[touched] = True if among is None else self.dirty_pages[touched] | among[touched]

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
