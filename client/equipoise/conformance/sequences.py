"""Checks of the training loop: openings, order, duplicates, gaps, durability, and who ends a stream."""

import time

import grpc

from equipoise.conformance.check import InapplicableError, MismatchError, Refusal, check, expect, failing, refused
from equipoise.conformance.target import Conversation, Target, a_step, f32, u64
from equipoise.v1 import policy_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
POLL_S = 0.02
LARGE_BYTES = 64 << 20


@check("stream/opening")
def opening(target: Target) -> None:
    """An opening is answered with uid, epoch, version, N, limits, and last_sequence 0 for a new trainer."""
    policy = target.create(num_examples=7)
    status = target.status(policy)
    with target.conversation(policy, uid=status.uid) as stream:
        opened = stream.opened()
    expect("uid", opened.uid, status.uid)
    expect("epoch", opened.epoch, status.epoch)
    expect("version", opened.version, 0)
    expect("last_sequence", opened.last_sequence, 0)
    expect("num_examples", opened.num_examples, 7)
    for name in ("max_batch_examples", "max_message_bytes"):
        if getattr(opened, name):
            expect(name, getattr(opened, name), getattr(target.info, name))


@check("stream/bad opening")
def bad_opening(target: Target) -> None:
    """A stream that does not open as it should ends with NOT_OPENED, INVALID_*_ID or UID_MISMATCH."""
    policy = target.create()
    with Conversation(target.channel, target.server.headers(policy), timeout_s=target.timeout_s) as stream:
        stream.send(a_step(1))
        with refused(code=INVALID, reason="NOT_OPENED"):
            stream.receive()
    for trainer_id in ("", "x" * 129, "\n"):
        with (
            target.conversation(policy, trainer_id) as stream,
            refused(code=INVALID, reason="INVALID_TRAINER_ID", field="open.trainer_id"),
        ):
            stream.opened()
    for client_id in ("x" * 129, "\n"):
        with (
            target.conversation(policy, client_id=client_id) as stream,
            refused(code=INVALID, reason="INVALID_CLIENT_ID", field="open.client_id"),
        ):
            stream.opened()
    with (
        target.conversation(policy, uid="0" * 32) as stream,
        refused(code=grpc.StatusCode.FAILED_PRECONDITION, reason="UID_MISMATCH"),
    ):
        stream.opened()
    with target.conversation(policy) as stream:
        stream.opened()
        stream.send(pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id="trainer")))
        with refused(code=INVALID, reason="MALFORMED_REQUEST"):
            stream.receive()


@check("stream/order")
def order(target: Target) -> None:
    """32 steps and reads in flight are answered in their order, each with the version right after it, then OK."""
    policy = target.create()
    with target.conversation(policy) as stream:
        stream.opened()
        for sequence in range(1, 33):
            stream.send(a_step(sequence) if sequence % 4 else pb.StepRequest(sequence=sequence, target_loss=1.0))
            stream.send(pb.StepRequest(all_examples=True))
        answers = [message.step for message in stream.finish() if message.HasField("step")]
    expect("sequences", [one.sequence for one in answers], [n for s in range(1, 33) for n in (s, 0)])
    expect("versions", [one.version for one in answers], [s for s in range(1, 33) for _ in (0, 1)])
    expect("outcomes", {one.outcome for one in answers}, {pb.OUTCOME_APPLIED, pb.OUTCOME_READ})
    expect("target_loss", target.status(policy).target_loss, 1.0)


@check("stream/duplicate")
def duplicate(target: Target) -> None:
    """A step that is sent again has no effect: DUPLICATE, with the version and the weights of now."""
    policy = target.create()
    first = a_step(1, contributions=f32(1.0, 1.0))
    with target.conversation(policy) as stream:
        stream.opened()
        stream.step(first)
        now = stream.step(a_step(2))
        again = stream.step(first)
        expect("outcome", pb.Outcome.Name(again.outcome), "OUTCOME_DUPLICATE")
        expect("version, that of now", again.version, 2)
        expect("sequence", again.sequence, 1)
        expect("weights, those of now", again.weights, now.weights)
        expect("next version", stream.step(a_step(3)).version, 3)


@check("stream/gap")
def gap(target: Target) -> None:
    """A gap ends the stream, behind the answers before it: OUT_OF_RANGE SEQUENCE_GAP with expected_sequence."""
    policy = target.create()
    with target.conversation(policy) as stream:
        stream.opened()
        stream.send(a_step(1))
        stream.send(a_step(3))
        expect("version", stream.receive().step.version, 1)
        with refused(code=grpc.StatusCode.OUT_OF_RANGE, reason="SEQUENCE_GAP") as found:
            stream.receive()
        expect("metadata expected_sequence", found.metadata.get("expected_sequence"), "2")
    expect("version", target.status(policy).version, 1)


@check("stream/step without a number")
def unnumbered(target: Target) -> None:
    """A step with sequence 0 ends a stream: INVALID_ARGUMENT MALFORMED_REQUEST."""
    with target.conversation(target.create()) as stream:
        stream.opened()
        stream.send(a_step(0))
        with refused(code=INVALID, reason="MALFORMED_REQUEST"):
            stream.receive()


@check("stream/reconnect")
def reconnect(target: Target) -> None:
    """After a stream is lost the opening tells last_sequence; what is sent again is DUPLICATE, what is new APPLIED."""
    policy = target.create()
    with target.conversation(policy) as stream:
        stream.opened()
        for sequence in (1, 2, 3):
            stream.step(a_step(sequence))
    with target.conversation(policy) as stream:
        expect("last_sequence", stream.opened().last_sequence, 3)
        outcomes = [pb.Outcome.Name(stream.step(a_step(sequence)).outcome) for sequence in (2, 3, 4)]
    expect("outcomes of 2, 3, 4", outcomes, ["OUTCOME_DUPLICATE", "OUTCOME_DUPLICATE", "OUTCOME_APPLIED"])
    expect("version", target.status(policy).version, 4)


@check("stream/refused step")
def refused_step(target: Target) -> None:
    """A refused step consumes its sequence and a version, nothing else, and is refused again when sent again."""
    policy = target.create()
    good, bad = a_step(1), a_step(2, contributions=f32(1.0, float("nan")))
    with target.conversation(policy) as stream:
        stream.opened()
        before = stream.step(good)
        for _ in range(2):
            answer = stream.step(bad)
            expect("outcome", pb.Outcome.Name(answer.outcome), "OUTCOME_REFUSED")
            expect("version", answer.version, 2)
            expect("weights", answer.weights, b"")
            Refusal.of(answer.error).check(code=INVALID, reason="NON_FINITE_STAT")
        read = stream.step(pb.StepRequest(example_ids=u64(1, 2)))
        expect("weights after it", read.weights, before.weights)
        expect("version of the next step", stream.step(a_step(3)).version, 3)


@check("stream/second opening")
def second_opening(target: Target) -> None:
    """A second opening of one trainer_id ends the first stream: ABORTED TRAINER_REPLACED."""
    policy = target.create()
    with target.conversation(policy) as first:
        first.opened()
        first.step(a_step(1))
        with target.conversation(policy) as second:
            expect("last_sequence", second.opened().last_sequence, 1)
            with refused(code=grpc.StatusCode.ABORTED, reason="TRAINER_REPLACED"):
                first.receive()
            expect("version", second.step(a_step(2)).version, 2)


@check("stream/stale opening")
def stale_opening(target: Target) -> None:
    """An opening that arrives behind a later one of its client fails: ABORTED STALE_OPENING. The later one goes on."""
    policy = target.create()
    with target.conversation(policy, client_id="one", attempt=2) as stream:
        stream.opened()
        with (
            target.conversation(policy, client_id="one", attempt=1) as late,
            refused(code=grpc.StatusCode.ABORTED, reason="STALE_OPENING"),
        ):
            late.opened()
        expect("version", stream.step(a_step(1)).version, 1)
        with target.conversation(policy, client_id="two", attempt=1) as other:
            expect("last_sequence", other.opened().last_sequence, 1)
            with refused(code=grpc.StatusCode.ABORTED, reason="TRAINER_REPLACED"):
                stream.receive()


@check("stream/two trainers")
def two_trainers(target: Target) -> None:
    """Trainers count their steps for themselves, and share versions and weights."""
    policy = target.create()
    with target.conversation(policy, "one") as one, target.conversation(policy, "two") as two:
        expect("last_sequences", (one.opened().last_sequence, two.opened().last_sequence), (0, 0))
        versions = [one.step(a_step(1)).version, two.step(a_step(1)).version, one.step(a_step(2)).version]
        expect("versions", versions, [1, 2, 3])


@check("stream/deletion")
def deletion(target: Target) -> None:
    """Deleting a policy ends its streams and watches: NOT_FOUND POLICY_DELETED."""
    policy = target.create()
    watch = target.call("WatchPolicy", pb.WatchPolicyRequest(policy=policy, min_interval_ms=100), policy=policy)
    expect("version watched", next(watch).status.version, 0)
    with target.conversation(policy) as stream:
        stream.opened()
        target.call("DeletePolicy", pb.DeletePolicyRequest(policy=policy), policy=policy)
        with refused(code=grpc.StatusCode.NOT_FOUND, reason="POLICY_DELETED"):
            stream.receive()
    with refused(code=grpc.StatusCode.NOT_FOUND, reason="POLICY_DELETED"):
        list(watch)


@check("unary/shared sequences")
def shared_sequences(target: Target) -> None:
    """UpdateWeights and streams share the sequences of a trainer: duplicates and gaps are those of both."""
    policy = target.create()
    expect("outcome", _update(target, policy, a_step(1)).outcome, pb.OUTCOME_APPLIED)
    with target.conversation(policy) as stream:
        expect("last_sequence", stream.opened().last_sequence, 1)
        expect("outcome", stream.step(a_step(1)).outcome, pb.OUTCOME_DUPLICATE)
        expect("outcome", stream.step(a_step(2)).outcome, pb.OUTCOME_APPLIED)
        again = _update(target, policy, a_step(2))
        expect("outcome, version", (again.outcome, again.version), (pb.OUTCOME_DUPLICATE, 2))
        expect("outcome", _update(target, policy, a_step(3)).outcome, pb.OUTCOME_APPLIED)
        expect("outcome", stream.step(a_step(4)).outcome, pb.OUTCOME_APPLIED)
    with refused(code=grpc.StatusCode.OUT_OF_RANGE, reason="SEQUENCE_GAP") as found:
        _update(target, policy, a_step(9))
    expect("metadata expected_sequence", found.metadata.get("expected_sequence"), "5")


@check("unary/without a sequence")
def without_sequence(target: Target) -> None:
    """UpdateWeights with sequence 0 is applied each time; one with a sequence needs a trainer_id."""
    policy = target.create()
    for version in (1, 2):
        answer = _update(target, policy, a_step(0), trainer_id="")
        expect("outcome, version", (answer.outcome, answer.version), (pb.OUTCOME_APPLIED, version))
    with refused(code=INVALID, reason="INVALID_TRAINER_ID", field="trainer_id"):
        _update(target, policy, a_step(1), trainer_id="")


@check("unary/refused step")
def refused_update(target: Target) -> None:
    """A step that UpdateWeights refuses fails the call and consumes neither a sequence nor a version."""
    policy = target.create()
    bad = a_step(1, contributions=f32(1.0))
    with refused(code=INVALID, reason="SHAPE_MISMATCH", field="contributions"):
        _update(target, policy, bad)
    answer = _update(target, policy, a_step(1))
    expect("outcome, version", (answer.outcome, answer.version), (pb.OUTCOME_APPLIED, 1))


@check("durability/logged")
def logged(target: Target) -> str:
    """With LOGGED, durable_sequence reaches the last step, by its answer or by those of reads that follow."""
    return _becomes_durable(target, pb.DURABILITY_LOGGED)


@check("durability/behind")
def behind(target: Target) -> str:
    """With BEHIND, durable_sequence reaches the last step by the answers of reads that follow."""
    return _becomes_durable(target, pb.DURABILITY_BEHIND)


@check("durability/after reconnect")
def durable_after_reconnect(target: Target) -> None:
    """An opening tells durable_sequence, at most last_sequence; it reaches the last step without another one."""
    policy = target.create()
    with target.conversation(policy) as stream:
        stream.opened()
        stream.step(a_step(1))
    with target.conversation(policy) as stream:
        opened = stream.opened()
        expect("durable_sequence at most last_sequence", opened.durable_sequence <= opened.last_sequence, True)
        _wait_until_durable(target, stream, 1)


def _becomes_durable(target: Target, durability: "pb.Durability.ValueType") -> str:
    policy = target.create(durability=durability)
    with target.conversation(policy) as stream:
        stream.opened()
        for sequence in range(1, 6):
            answer = stream.step(a_step(sequence))
            expect("durable_sequence at most sequence", answer.durable_sequence <= sequence, True)
        reads = _wait_until_durable(target, stream, 5)
    expect("durable_version", target.status(policy).durable_version, 5)
    return f"after {reads} reads"


def _wait_until_durable(target: Target, stream: Conversation, sequence: int) -> int:
    """Reads until the steps up to a sequence are durable; how many reads that took."""
    reads, end = 0, time.monotonic() + target.timeout_s
    while (durable := stream.step(pb.StepRequest(example_ids=u64(0))).durable_sequence) < sequence:
        if time.monotonic() > end:
            raise MismatchError(f"durable_sequence is {durable}, not {sequence}, after {target.timeout_s:g} s")
        reads += 1
        time.sleep(POLL_S)
    expect("durable_sequence", durable, sequence)
    return reads + 1


def _update(target: Target, policy: str, step: pb.StepRequest, *, trainer_id: str = "trainer") -> pb.StepResponse:
    request = pb.UpdateWeightsRequest(policy=policy, trainer_id=trainer_id, step=step)
    answer: pb.StepResponse = target.call("UpdateWeights", request, policy=policy).step
    return answer


@check("stream/too large a message")
def too_large(target: Target) -> str:
    """A message above max_message_bytes ends the call with RESOURCE_EXHAUSTED, and changes nothing."""
    size = target.info.max_message_bytes
    if size > LARGE_BYTES:
        raise InapplicableError(f"a message of {size} bytes is too large to try")
    policy = target.create()
    step = pb.StepRequest(sequence=1, target_loss=1.0, contributions=bytes(size))
    with target.conversation(policy) as stream:
        stream.opened()
        stream.send(step)
        with failing(grpc.StatusCode.RESOURCE_EXHAUSTED):
            stream.receive()
    expect("version", target.status(policy).version, 0)
    return f"with {size} bytes and a frame around them"
