"""The history checker: replays what was sent in the order of the log, and tells what does not fit.

The log is what Redis took; the model is the reference rule in this process. What the checker finds is a sentence each:
a durable step that is missing, applied twice or out of order; an answer that an orderly stop did not write; an (epoch,
version) that went back; a weight that is not finite, negative, or not the model's.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise import Outcome
from equipoise_server.rules import Rule, RuleError, TableState
from tests.e2e.faults.aof import Log, LoggedVersion
from tests.e2e.faults.history import Answered, History, Sent

NOT_SERVED = (Outcome.PENDING, Outcome.DROPPED)
"""Outcomes of answers that the client gave without the server."""


@dataclass(slots=True)
class Model:
    """The policy as it must be.

    Attributes:
        rule: reference rule.
        state: its tables.
        version: steps it has seen.
    """

    rule: Rule
    state: TableState
    version: int = 0

    @classmethod
    def of(cls, rule: Rule, num_examples: int) -> "Model":
        """At version 0."""
        return cls(rule, rule.init(num_examples, device=torch.device("cpu")))

    def take(self, step: Sent) -> bool:
        """Applies a step; whether the rule takes it."""
        self.version += 1
        try:
            self.rule.check(step.statistics)
            self.state = self.rule.update(self.state, step.statistics)
        except RuleError:
            return False
        return True


@dataclass(slots=True)
class Findings:
    """What the checker found, and the model at the end.

    Attributes:
        violations: what does not fit, in words; empty when all is well.
        model: the policy after the whole log.
        compared: weights that were compared with the model's.
        forgone: answers from versions that never reached the log: they were not durable, and are gone.
    """

    model: Model
    violations: list[str] = field(default_factory=list)
    compared: int = 0
    forgone: int = 0


def check(
    history: History,
    log: Log,
    *,
    rule: Rule,
    num_examples: int,
    orderly: Collection[int] = frozenset(),
    begun: Model | None = None,
) -> Findings:
    """Replays the log on a model; see the module.

    Args:
        history: what was sent and answered.
        log: what Redis took.
        rule: the reference.
        num_examples: N.
        orderly: epochs that ended with an orderly stop of their owner.
        begun: a model that has taken the first steps of the log already, of which no answer shows weights.
    """
    findings = Findings(copy.deepcopy(begun) if begun else Model.of(rule, num_examples))
    known = findings.model.version
    findings.violations += _order(log.entries)
    findings.violations += _missing(history, log.entries)
    findings.violations += _going_back(history)
    due = _due(findings, history, log, orderly)
    _compare(findings, history, due.pop(0, ()))
    for position, entry in enumerate(log.entries, start=1):
        sent = history.sent[entry.trainer_id]
        if not 0 < entry.sequence <= len(sent):
            findings.violations.append(f"version {entry.version}: {entry} was never sent")
            continue
        if position <= known:
            continue
        taken = findings.model.take(sent[entry.sequence - 1])
        if taken is entry.refused:
            findings.violations.append(f"version {entry.version}: {entry}, but the model took it: {taken}")
        _compare(findings, history, due.pop(entry.version, ()))
    findings.violations += [f"answers of version {version}, which is not in the log" for version in sorted(due)]
    return findings


def _due(
    findings: Findings, history: History, log: Log, orderly: Collection[int]
) -> dict[int, list[tuple[str, Answered]]]:
    """The server's answers by the version of the log that they must show."""
    due: dict[int, list[tuple[str, Answered]]] = defaultdict(list)
    for trainer_id, answers in history.answered.items():
        for answer in answers:
            if answer.outcome is None or answer.outcome in NOT_SERVED:
                continue
            if not np.isfinite(answer.weights).all() or (answer.weights < 0).any():
                what = f"{trainer_id}, step {answer.sequence}, version {answer.version}"
                findings.violations.append(f"{what}: a weight is not finite or negative: {answer.weights}")
            if log.keeps(answer.epoch, answer.version):
                due[answer.version].append((trainer_id, answer))
            elif answer.epoch in orderly:
                what = f"{trainer_id}, step {answer.sequence}, epoch {answer.epoch}, version {answer.version}"
                findings.violations.append(f"{what}: was answered before an orderly stop, and is not in the log")
            else:
                findings.forgone += 1
    return due


def _order(log: Sequence[LoggedVersion]) -> Iterator[str]:
    """Versions without gaps; each trainer's sequences once each, in order."""
    last: Counter[str] = Counter()
    for position, entry in enumerate(log, start=1):
        if entry.version != position:
            yield f"entry {position} of the log has version {entry.version}"
        expected = last[entry.trainer_id] + 1
        if entry.sequence < expected:
            yield f"version {entry.version}: step {entry.sequence} of {entry.trainer_id} was applied twice"
        elif entry.sequence > expected:
            yield f"version {entry.version}: step {entry.sequence} of {entry.trainer_id} comes before {expected}"
        last[entry.trainer_id] = max(last[entry.trainer_id], entry.sequence)


def _missing(history: History, log: Sequence[LoggedVersion]) -> Iterator[str]:
    """Every step that was called durable is there."""
    logged = defaultdict(set)
    for entry in log:
        logged[entry.trainer_id].add(entry.sequence)
    for trainer_id in history.sent:
        promised = [answer.durable_sequence for answer in history.answered[trainer_id]]
        durable = max([history.durable.get(trainer_id, 0), *promised])
        for sequence in sorted(set(range(1, durable + 1)) - logged[trainer_id]):
            yield f"step {sequence} of {trainer_id} was acknowledged as durable and is missing"


def _going_back(history: History) -> Iterator[str]:
    for trainer_id, answers in history.answered.items():
        seen = (0, 0)
        for answer in answers:
            now = (answer.epoch, answer.version)
            if answer.outcome is not None:
                if now < seen:
                    yield f"{trainer_id}, step {answer.sequence}: (epoch, version) went back from {seen} to {now}"
                seen = max(seen, now)


def _compare(findings: Findings, history: History, answers: Sequence[tuple[str, Answered]]) -> None:
    model = findings.model
    for trainer_id, answer in answers:
        what = f"{trainer_id}, step {answer.sequence}, version {answer.version}"
        statistics = history.sent[trainer_id][answer.sequence - 1].statistics if answer.sequence else None
        expected = model.rule.answer(model.state, statistics, answer.ids)
        findings.compared += len(expected)
        if not _same(answer.weights, expected):
            findings.violations.append(f"{what}: weights {answer.weights}, the model has {expected}")


def _same(left: NDArray[np.float32], right: NDArray[np.float32]) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()
