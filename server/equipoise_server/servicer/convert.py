"""Requests to steps, answers to responses."""

import asyncio
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Answer, Kind, Policy, PolicyRunner, Step
from equipoise_server.errors import ServiceError, invalid
from equipoise_server.rules import RuleError, Statistics, aggregate
from equipoise_server.servicer.arrays import parse_ids, parse_scored, parse_statistic, to_bytes
from equipoise_server.servicer.limits import ServiceLimits
from equipoise_server.servicer.sketches import parse_sketches
from equipoise_server.status import to_status

ROW_STATISTICS = ("contributions", "losses", "reference_losses")
STATISTICS = (*ROW_STATISTICS, "gradient_sketches", "target_sketch")


LONG_ROWS = 16_384
"""A request with more rows is converted beside the event loop: sorting its ids takes milliseconds."""


def to_step(request: pb.StepRequest, *, trainer_id: str, policy: Policy, limits: ServiceLimits) -> Step:
    """A validated step or read. Raises ServiceError (INVALID_ARGUMENT) naming field, index, value and rule."""
    rows = _Rows.parse(request, num_examples=policy.spec.num_examples, limits=limits)
    weights_for = _weights_for(request, rows, policy, limits)
    if not is_step(request):
        return _to_read(request, rows, weights_for, trainer_id, policy)
    statistics = _statistics(request, rows, policy)
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
        size=request.ByteSize(),
    )


async def convert_step(
    request: pb.StepRequest, *, trainer_id: str, runner: PolicyRunner, limits: ServiceLimits
) -> Step:
    """`to_step`, beside the event loop where it takes long: sketches on the device's thread, many rows on another."""

    def convert(policy: Policy) -> Step:
        return to_step(request, trainer_id=trainer_id, policy=policy, limits=limits)

    if request.gradient_sketches:
        return await runner.read(convert)
    if len(request.example_ids) > 8 * LONG_ROWS:
        return await asyncio.to_thread(convert, runner.policy)
    return convert(runner.policy)


def to_refused(request: pb.StepRequest, error: ServiceError, *, trainer_id: str) -> Step:
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
    def parse(cls, request: pb.StepRequest, *, num_examples: int, limits: ServiceLimits) -> "_Rows":
        most = limits.max_batch_examples
        which = request.WhichOneof("rows")
        if which == "example_ids":
            ids = parse_ids(request.example_ids, field="example_ids", num_examples=num_examples, most=most)
            return cls(ids, len(ids), True)
        if which is None or not request.all_examples:
            return cls(np.empty(0, np.int64), 0, False)
        if num_examples > most:
            description = f"the policy has {num_examples} examples, the limit max_batch_examples is {most}"
            raise invalid("TOO_MANY_EXAMPLES", "all_examples", description)
        return cls(None, num_examples, True)


def is_step(request: pb.StepRequest) -> bool:
    """Whether a request carries statistics or losses."""
    if request.HasField("target_loss") or request.HasField("guard_loss"):
        return True
    return any(getattr(request, name) for name in STATISTICS)


def _to_read(
    request: pb.StepRequest, rows: _Rows, weights_for: NDArray[np.int64] | None, trainer_id: str, policy: Policy
) -> Step:
    if not rows.given and not request.HasField("weights_for"):
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
        size=request.ByteSize(),
    )


def _weights_for(
    request: pb.StepRequest, rows: _Rows, policy: Policy, limits: ServiceLimits
) -> NDArray[np.int64] | None:
    if not request.HasField("weights_for"):
        return rows.ids
    return parse_ids(
        request.weights_for,
        field="weights_for",
        num_examples=policy.spec.num_examples,
        most=limits.max_batch_examples,
    )


def _trajectory_row(request: pb.StepRequest, policy: Policy) -> int | None:
    """The row that a read or a step with statistics is about; None where the rule has no trajectory."""
    rows = policy.rule.trajectory_rows
    if rows and request.step >= rows:
        raise invalid("OUT_OF_RANGE_VALUE", "step", f"{request.step}: rule {policy.spec.rule!r} has rows [0, {rows})")
    return request.step if rows else None


def _statistics(request: pb.StepRequest, rows: _Rows, policy: Policy) -> Statistics | None:
    if not rows.given:
        for name in (*STATISTICS, "scored"):
            if getattr(request, name):
                raise invalid("SHAPE_MISMATCH", name, "sent without rows; send example_ids or all_examples with it")
        return None
    scored = parse_scored(request.scored, rows=rows.count)
    values: dict[str, Any] = {
        name: parse_statistic(getattr(request, name), field=name, rows=rows.count, scored=scored)
        for name in ROW_STATISTICS
    }
    sketched = parse_sketches(request, rows=rows.count, scored=scored, device=policy.state.device)
    if sketched is not None:
        values["contributions"] = sketched
    if all(given is None for given in values.values()):
        return None
    return aggregate(rows.ids, scored=scored, trajectory_row=_trajectory_row(request, policy), **values)


def _check_rule(policy: Policy, statistics: Statistics) -> None:
    try:
        policy.rule.check(statistics)
    except RuleError as error:
        raise invalid("UNUSABLE_STATISTICS", error.field, str(error)) from error


def _loss(request: pb.StepRequest, name: str) -> float | None:
    if not request.HasField(name):  # type: ignore[arg-type]  # one of the two optional losses
        return None
    value = float(getattr(request, name))
    if not math.isfinite(value):
        raise invalid("NON_FINITE_STAT", name, f"{value} is not finite")
    return value
