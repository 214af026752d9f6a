"""Requests to steps, answers to responses."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Answer, Kind, Opener, Policy, PolicyRunner, Step
from equipoise_server.errors import ServiceError, invalid, quoted
from equipoise_server.rules import RuleError, Statistics, aggregate
from equipoise_server.servicer.arrays import (
    parse_groups,
    parse_ids,
    parse_mask,
    parse_outcomes,
    parse_statistic,
    to_bytes,
)
from equipoise_server.servicer.fields import ROW_STATISTICS, STATISTICS, StepFields
from equipoise_server.servicer.limits import ServiceLimits
from equipoise_server.servicer.sketches import parse_sketches
from equipoise_server.status import to_status

LONG_ROWS = 16_384
"""A request with more rows is converted beside the event loop: sorting its ids takes milliseconds."""


def to_step(request: StepFields, *, trainer_id: str, policy: Policy, limits: ServiceLimits) -> Step:
    """A validated step or read. Raises ServiceError (INVALID_ARGUMENT) naming field, index, value and rule."""
    rows = _Rows.parse(request, num_examples=policy.spec.num_examples, limits=limits)
    weights_for = _weights_for(request, rows, policy, limits)
    if not request.is_step:
        return _to_read(request, rows, weights_for, trainer_id, policy)
    statistics = _statistics(request, rows, policy, limits)
    if statistics is not None:
        _check_rule(policy, statistics)
    return Step(
        kind=Kind.STEP,
        trainer_id=trainer_id,
        sequence=request.sequence,
        training_step=request.step,
        statistics=statistics if statistics is not None and statistics.size else None,
        target_loss=_loss(request, "target_loss"),
        guard_loss=_loss(request, "guard_loss"),
        wants_weights=not request.omit_weights,
        weights_for=weights_for,
        num_rows=rows.count,
    )


async def convert_step(request: StepFields, *, trainer_id: str, runner: PolicyRunner, limits: ServiceLimits) -> Step:
    """`to_step`, beside the event loop where it takes long: for sketches and for many rows."""

    def convert(policy: Policy) -> Step:
        return to_step(request, trainer_id=trainer_id, policy=policy, limits=limits)

    if request.gradient_sketches or len(request.example_ids or b"") > 8 * LONG_ROWS:
        return await runner.convert(convert)
    return convert(runner.policy)


def check_trainer_id(trainer_id: str, *, field: str) -> None:
    """Raises ServiceError (INVALID_TRAINER_ID) unless it is one."""
    if not (trainer_id and _is_name(trainer_id)):
        raise invalid("INVALID_TRAINER_ID", field, f"{quoted(trainer_id)} is not 1 to 128 printable ASCII characters")


def to_opener(request: pb.OpenRequest) -> Opener:
    """The client that opens. Raises ServiceError (INVALID_CLIENT_ID) where its id is none."""
    if not _is_name(request.client_id):
        description = f"{quoted(request.client_id)} is not at most 128 printable ASCII characters"
        raise invalid("INVALID_CLIENT_ID", "open.client_id", description)
    return Opener(request.client_id, request.attempt)


def _is_name(text: str) -> bool:
    return len(text) <= 128 and text.isascii() and text.isprintable()


def to_refused(request: StepFields, error: ServiceError, *, trainer_id: str) -> Step:
    """The empty step that stands for a refused one; a refused read consumes nothing."""
    return Step(
        kind=Kind.REFUSED if request.sequence else Kind.READ,
        trainer_id=trainer_id,
        sequence=request.sequence,
        training_step=request.step,
        wants_weights=False,
        error=error,
    )


def to_response(answer: Answer, *, runner: PolicyRunner, trainer_id: str) -> pb.StepResponse:
    """The answer as it goes out."""
    return pb.StepResponse(
        sequence=answer.sequence,
        epoch=runner.epoch,
        version=answer.version,
        durable_sequence=runner.durable_sequence(trainer_id) if trainer_id else 0,
        outcome=answer.outcome.value,  # type: ignore[arg-type]  # the wire's numbers
        weights=b"" if answer.weights is None else to_bytes(answer.weights),
        error=None if answer.error is None else to_status(answer.error),
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a request: their ids (None: all examples in order) and how many; `given`: whether there are any."""

    ids: NDArray[np.int64] | None
    count: int
    given: bool

    @classmethod
    def parse(cls, request: StepFields, *, num_examples: int, limits: ServiceLimits) -> "_Rows":
        most = limits.max_batch_examples
        if request.example_ids is not None:
            ids = parse_ids(request.example_ids, field="example_ids", num_examples=num_examples, most=most)
            return cls(ids, len(ids), True)
        if not request.all_examples:
            return cls(np.empty(0, np.int64), 0, False)
        if num_examples > most:
            description = f"the policy has {num_examples} examples, the limit max_batch_examples is {most}"
            raise invalid("TOO_MANY_EXAMPLES", "all_examples", description)
        return cls(None, num_examples, True)


def _to_read(
    request: StepFields, rows: _Rows, weights_for: NDArray[np.int64] | None, trainer_id: str, policy: Policy
) -> Step:
    if not rows.given and request.weights_for is None:
        raise invalid("EMPTY_REQUEST", "rows", "neither rows nor losses: send rows, weights_for, or a loss to report")
    if request.sequence:
        description = f"{request.sequence} on a read (no statistics); reads carry 0"
        raise invalid("SEQUENCE_ON_READ", "sequence", description)
    trajectory_row = _trajectory_row(request, policy)
    return Step(
        kind=Kind.READ,
        trainer_id=trainer_id,
        statistics=None if trajectory_row is None else aggregate(trajectory_row=trajectory_row),
        wants_weights=not request.omit_weights,
        weights_for=weights_for,
        num_rows=rows.count,
    )


def _weights_for(request: StepFields, rows: _Rows, policy: Policy, limits: ServiceLimits) -> NDArray[np.int64] | None:
    if request.weights_for is None:
        return rows.ids
    return parse_ids(
        request.weights_for,
        field="weights_for",
        num_examples=policy.spec.num_examples,
        most=limits.max_batch_examples,
    )


def _trajectory_row(request: StepFields, policy: Policy) -> int | None:
    """The row that a read or a step with statistics is about; None where the rule has no trajectory."""
    rows = policy.rule.trajectory_rows
    if rows and request.step >= rows:
        raise invalid("OUT_OF_RANGE_VALUE", "step", f"{request.step}: rule {policy.spec.rule!r} has rows [0, {rows})")
    return request.step if rows else None


def _statistics(request: StepFields, rows: _Rows, policy: Policy, limits: ServiceLimits) -> Statistics | None:
    if not rows.given:
        for name in (*STATISTICS, "scored", "groups", "measured", "target_losses", "target_groups"):
            if getattr(request, name):
                raise invalid("SHAPE_MISMATCH", name, "sent without rows; send example_ids or all_examples with it")
        return None
    scored = parse_mask(request.scored, field="scored", rows=rows.count)
    measured = _measured(request, rows)
    known = {"losses": scored, "reference_losses": scored, "contributions": _both(scored, measured)}
    values: dict[str, Any] = {
        name: parse_statistic(getattr(request, name), field=name, rows=rows.count, scored=known[name])
        for name in ROW_STATISTICS
    }
    sketched = parse_sketches(request, rows=rows.count, scored=known["contributions"], device=policy.state.device)
    if sketched is not None:
        values["contributions"] = sketched
    values |= parse_outcomes(request.successes, request.attempts, rows=rows.count, scored=scored)
    groups = parse_groups(request.groups, rows=rows.count)
    if all(given is None for given in values.values()):
        if request.target_losses:
            raise invalid(
                "UNUSABLE_STATISTICS", "target_losses", "sent without losses of the rows, to be compared with"
            )
        return None
    if measured is not None and not policy.rule.sparse_contributions:
        scored, measured = known["contributions"], None
    row = _trajectory_row(request, policy)
    try:
        found = aggregate(rows.ids, scored=scored, measured=measured, groups=groups, trajectory_row=row, **values)
    except RuleError as error:
        raise invalid("UNUSABLE_STATISTICS", error.field, str(error)) from error
    return replace(found, **_target(request, limits)) if request.target_losses or request.target_groups else found


def _target(request: StepFields, limits: ServiceLimits) -> dict[str, Any]:
    """Losses of single examples of the target, and their groups."""
    count, rest = divmod(len(request.target_losses), 4)
    if rest or not count:
        description = f"{len(request.target_losses)} bytes are no float32 (4 bytes) each"
        raise invalid("SHAPE_MISMATCH", "target_losses", description)
    if count > limits.max_batch_examples:
        description = f"{count} losses, the limit max_batch_examples is {limits.max_batch_examples}"
        raise invalid("TOO_MANY_EXAMPLES", "target_losses", description)
    return {
        "target_losses": parse_statistic(request.target_losses, field="target_losses", rows=count, scored=None),
        "target_groups": parse_groups(request.target_groups, rows=count, field="target_groups"),
    }


def _measured(request: StepFields, rows: _Rows) -> NDArray[np.bool_] | None:
    measured = parse_mask(request.measured, field="measured", rows=rows.count)
    if measured is not None and not (request.contributions or request.gradient_sketches):
        raise invalid("SHAPE_MISMATCH", "measured", "sent without contributions; leave both out where there are none")
    return measured


def _both(first: NDArray[np.bool_] | None, second: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    return second if first is None else first if second is None else first & second


def _check_rule(policy: Policy, statistics: Statistics) -> None:
    try:
        policy.rule.check(statistics)
    except RuleError as error:
        raise invalid("UNUSABLE_STATISTICS", error.field, str(error)) from error


def _loss(request: StepFields, name: str) -> float | None:
    value: float | None = getattr(request, name)
    if value is not None and not math.isfinite(value):
        raise invalid("NON_FINITE_STAT", name, f"{value} is not finite")
    return value
