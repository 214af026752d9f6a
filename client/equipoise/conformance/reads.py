"""Checks of reading, drawing, watching and copying policies."""

from typing import Any

import grpc
import numpy as np

from equipoise.archive import PolicyArchive
from equipoise.conformance.check import check, expect, refused
from equipoise.conformance.target import Target, a_step, f32, u64
from equipoise.v1 import policy_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@check("reads/weights and scores")
def weights_and_scores(target: Target) -> None:
    """Weights have mean 1; scores are NaN where never scored; ids may repeat; chunks carry offset and version."""
    policy = _taught(target)
    weights = np.frombuffer(target.weights(policy), "<f4")
    expect("mean of the weights", round(float(weights.mean(dtype=np.float64)), 6), 1.0)
    expect("weight of an example that was never scored", float(weights[0]), 1.0)
    scores = np.frombuffer(target.weights(policy, pb.FIELD_SCORE), "<f4")
    expect("examples without a score", np.flatnonzero(np.isnan(scores)).tolist(), [0, 3, 4, 5, 6, 7])
    request = pb.ReadWeightsRequest(policy=policy, example_ids=u64(2, 1, 2))
    [chunk] = target.read("ReadWeights", request, policy=policy)
    expect("weights of 2, 1, 2", np.frombuffer(chunk.values, "<f4").tolist(), weights[[2, 1, 2]].tolist())
    expect("offset and version", (chunk.offset, chunk.version), (0, 1))


@check("reads/bad")
def bad_reads(target: Target) -> None:
    """Bad reads: INVALID_FIELD for unknown fields and rows that the rule lacks, ID_OUT_OF_RANGE for ids."""
    policy = target.create()
    for request, reason, field in (
        (pb.ReadWeightsRequest(policy=policy, field=99), "INVALID_FIELD", "field"),  # type: ignore[arg-type]
        (pb.ReadWeightsRequest(policy=policy, num_rows=1), "INVALID_FIELD", "first_row"),
        (pb.ReadWeightsRequest(policy=policy, example_ids=u64(8)), "ID_OUT_OF_RANGE", "example_ids[0]"),
    ):
        with refused(code=INVALID, reason=reason, field=field):
            target.read("ReadWeights", request, policy=policy)


@check("reads/trajectory rows")
def trajectory_rows(target: Target) -> None:
    """Rows of a trajectory, also for some ids; those that it has not are OUT_OF_RANGE_VALUE, a score INVALID_FIELD."""
    settings = {name: pb.SettingValue(number=3.0) for name in ("rows", "learning_rate")}
    policy = target.create(rule=pb.RuleSpec(name="trajectory", settings=settings))

    def read(**fields: Any) -> bytes:
        request = pb.ReadWeightsRequest(policy=policy, **fields)
        return b"".join(chunk.values for chunk in target.read("ReadWeights", request, policy=policy))

    expect("two rows of two ids", read(first_row=1, num_rows=2, example_ids=u64(5, 0)), f32(1, 1, 1, 1))
    for fields, reason, field in (
        ({"first_row": 2, "num_rows": 2}, "OUT_OF_RANGE_VALUE", "num_rows"),
        ({"first_row": 1}, "INVALID_FIELD", "num_rows"),
        ({"num_rows": 1, "field": pb.FIELD_SCORE}, "INVALID_FIELD", "field"),
    ):
        with refused(code=INVALID, reason=reason, field=field):
            read(**fields)
    update = pb.UpdateWeightsRequest(policy=policy, step=pb.StepRequest(step=3, example_ids=u64(0)))
    with refused(code=INVALID, reason="OUT_OF_RANGE_VALUE", field="step"):
        target.call("UpdateWeights", update, policy=policy)


@check("reads/sample")
def sample(target: Target) -> None:
    """Equal seeds draw equal ids; without replacement each once; counts of 0 or above N (then) are refused."""
    policy = _taught(target)

    def draw(count: int, *, with_replacement: bool) -> list[int]:
        request = pb.SampleExamplesRequest(policy=policy, count=count, with_replacement=with_replacement, seed=7)
        answer = target.call("SampleExamples", request, policy=policy)
        expect("seed and version", (answer.seed, answer.version), (7, 1))
        return [int(number) for number in np.frombuffer(answer.example_ids, "<u8")]

    expect("the same draw again", draw(20, with_replacement=True), draw(20, with_replacement=True))
    expect("all ids, each once", sorted(draw(8, with_replacement=False)), list(range(8)))
    for count, replaced in ((0, True), (9, False)):
        with refused(code=INVALID, reason="OUT_OF_RANGE_VALUE", field="count"):
            draw(count, with_replacement=replaced)


@check("reads/watch")
def watch(target: Target) -> None:
    """WatchPolicy gives the status now and after a change; versions do not fall."""
    policy = target.create()
    request = pb.WatchPolicyRequest(policy=policy, min_interval_ms=100)
    stream = target.call("WatchPolicy", request, policy=policy)
    try:
        expect("version at first", next(stream).status.version, 0)
        target.call("UpdateWeights", pb.UpdateWeightsRequest(policy=policy, step=a_step(0)), policy=policy)
        expect("version after a step", next(stream).status.version, 1)
    finally:
        stream.cancel()


@check("copies/fork")
def fork(target: Target) -> None:
    """A fork starts at version 0 with weights and scores of its source, and without its trainers."""
    source = _taught(target)
    name = target.new_name()
    request = pb.CreatePolicyRequest(policy=pb.PolicySpec(name=name))
    setattr(request, "from", source)
    answer = target.call("CreatePolicy", request, policy=name)
    expect("created, version", (answer.created, answer.status.version), (True, 0))
    expect("created by the same request again", target.call("CreatePolicy", request, policy=name).created, False)
    _same(target, source, name)


@check("copies/export and import")
def export_and_import(target: Target) -> None:
    """ImportPolicy makes a policy of what ExportPolicy gave: weights, scores, next steps are the same to the bit."""
    source = _taught(target)
    exported = target.read("ExportPolicy", pb.ExportPolicyRequest(policy=source), policy=source)
    expect("version of the header", exported[0].header.version, 1)
    archive = PolicyArchive.from_messages(exported)
    name = target.new_name()
    answer = target.call("ImportPolicy", iter(archive.messages(name)), policy=name)
    expect("version", answer.status.version, 0)
    _same(target, source, name)
    again = iter(archive.messages(name))
    with refused(code=grpc.StatusCode.ALREADY_EXISTS, reason="POLICY_EXISTS"):
        target.call("ImportPolicy", again, policy=name)


@check("copies/bad import")
def bad_import(target: Target) -> None:
    """An import that is incomplete, or lacks its header, is refused with INVALID_STATE, and there is no policy."""
    source = _taught(target)
    archive = PolicyArchive.from_messages(
        target.read("ExportPolicy", pb.ExportPolicyRequest(policy=source), policy=source)
    )
    name = target.new_name()
    messages = list(archive.messages(name))
    for some in (messages[:-1], messages[1:]):
        with refused(code=INVALID, reason="INVALID_STATE"):
            target.call("ImportPolicy", iter(some), policy=name)
    with refused(code=grpc.StatusCode.NOT_FOUND, reason="POLICY_NOT_FOUND"):
        target.status(name)


def _taught(target: Target) -> str:
    """A policy of 8 examples after one step about 1 and 2."""
    policy = target.create(rule=pb.RuleSpec(name="ema_relu"))
    request = pb.UpdateWeightsRequest(policy=policy, step=a_step(0, contributions=f32(0.5, -1.25)))
    target.call("UpdateWeights", request, policy=policy)
    return policy


def _same(target: Target, source: str, copy: str) -> None:
    for field in (pb.FIELD_WEIGHT, pb.FIELD_SCORE):
        expect(pb.Field.Name(field), target.weights(copy, field), target.weights(source, field))
    with target.conversation(copy) as one, target.conversation(source) as other:
        expect("last_sequence of a trainer", (one.opened().last_sequence, other.opened().last_sequence), (0, 0))
        ours, theirs = one.step(a_step(1)), other.step(a_step(1))
    expect("outcomes", (ours.outcome, theirs.outcome), (pb.OUTCOME_APPLIED, pb.OUTCOME_APPLIED))
    expect("versions", (ours.version, theirs.version), (1, 2))
    expect("weights after the same step", ours.weights, theirs.weights)
