"""Checks of steps and reads that a server refuses: the reason and the field of each."""

from typing import Any

import grpc

from equipoise.conformance.check import Check, InapplicableError, Refusal, expect, refused
from equipoise.conformance.target import Target, a_step, f32, u32, u64
from equipoise.v1 import policy_pb2 as pb

N = 8
NAN, INF = float("nan"), float("inf")

BAD: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("ids that are no whole number", {"example_ids": b"123"}, "SHAPE_MISMATCH", "example_ids"),
    ("an id that is N", {"example_ids": u64(1, N)}, "ID_OUT_OF_RANGE", "example_ids[1]"),
    ("an id above all signed numbers", {"example_ids": u64(1, 2**64 - 1)}, "ID_OUT_OF_RANGE", "example_ids[1]"),
    ("too few contributions", {"contributions": f32(1.0)}, "SHAPE_MISMATCH", "contributions"),
    ("a contribution that is NaN", {"contributions": f32(1.0, NAN)}, "NON_FINITE_STAT", "contributions[1]"),
    ("a contribution that is infinite", {"contributions": f32(-INF, 1)}, "NON_FINITE_STAT", "contributions[0]"),
    ("too many losses", {"losses": f32(1, 2, 3)}, "SHAPE_MISMATCH", "losses"),
    ("a loss that is NaN", {"losses": f32(1.0, NAN)}, "NON_FINITE_STAT", "losses[1]"),
    ("too few bytes scored", {"scored": b"\x01"}, "SHAPE_MISMATCH", "scored"),
    ("scored that is 2", {"scored": b"\x01\x02"}, "OUT_OF_RANGE_VALUE", "scored[1]"),
    ("too few bytes measured", {"measured": b"\x01"}, "SHAPE_MISMATCH", "measured"),
    ("measured that is 2", {"measured": b"\x01\x02"}, "OUT_OF_RANGE_VALUE", "measured[1]"),
    ("measured without contributions", {"contributions": None, "losses": f32(1, 1), "measured": b"\x01\x01"},
     "SHAPE_MISMATCH", "measured"),
    ("a measured contribution that is NaN", {"contributions": f32(NAN, NAN), "measured": b"\x00\x01"},
     "NON_FINITE_STAT", "contributions[1]"),
    ("groups of another size", {"groups": b"\x00\x00\x00\x00\x00"}, "SHAPE_MISMATCH", "groups"),
    ("useless groups", {"groups": bytes(8)}, "UNUSABLE_STATISTICS", "groups"),
    ("target losses of another size", {"losses": f32(1, 1), "target_losses": b"\x00\x00\x00"}, "SHAPE_MISMATCH",
     "target_losses"),
    ("a target loss of an example that is NaN", {"losses": f32(1, 1), "target_losses": f32(1, NAN)}, "NON_FINITE_STAT",
     "target_losses[1]"),
    ("target groups of another size", {"losses": f32(1, 1), "target_losses": f32(1, 2), "target_groups": u32(1)},
     "SHAPE_MISMATCH", "target_groups"),
    ("useless target losses", {"losses": f32(1, 1), "target_losses": f32(1, 2)}, "UNUSABLE_STATISTICS",
     "target_losses"),
    ("successes without attempts", {"successes": bytes(8)}, "SHAPE_MISMATCH", "attempts"),
    ("attempts without successes", {"attempts": u32(1, 1)}, "SHAPE_MISMATCH", "successes"),
    ("too few attempts", {"successes": u32(0, 0), "attempts": u32(1)}, "SHAPE_MISMATCH", "attempts"),
    ("no attempt", {"successes": u32(0, 0), "attempts": u32(1, 0)}, "OUT_OF_RANGE_VALUE", "attempts[1]"),
    ("more successes than attempts", {"successes": u32(3, 0), "attempts": u32(2, 1)}, "OUT_OF_RANGE_VALUE",
     "successes[0]"),
    ("useless outcomes", {"successes": u32(1, 0), "attempts": u32(1, 1)}, "UNUSABLE_STATISTICS", "successes"),
    ("a target loss that is NaN", {"target_loss": NAN}, "NON_FINITE_STAT", "target_loss"),
    ("a guard loss that is infinite", {"guard_loss": INF}, "NON_FINITE_STAT", "guard_loss"),
    ("weights for an id that is N", {"weights_for": u64(N)}, "ID_OUT_OF_RANGE", "weights_for[0]"),
    ("statistics without rows", {"example_ids": None}, "SHAPE_MISMATCH", "contributions"),
    ("no contributions", {"contributions": None, "losses": f32(1, 1)}, "UNUSABLE_STATISTICS", "contributions"),
    ("useless reference losses", {"reference_losses": f32(1, 1)}, "UNUSABLE_STATISTICS", "reference_losses"),
    ("sketches without a target", {"contributions": None, "gradient_sketches": f32(1, 1)}, "SHAPE_MISMATCH",
     "target_sketch"),
    ("a target without sketches", {"contributions": None, "target_sketch": f32(1)}, "SHAPE_MISMATCH",
     "gradient_sketches"),
    ("sketches and contributions", {"gradient_sketches": f32(1, 1), "target_sketch": f32(1)}, "SHAPE_MISMATCH",
     "gradient_sketches"),
    ("sketches of another size", {"contributions": None, "gradient_sketches": f32(1, 1, 1), "target_sketch": f32(1)},
     "SHAPE_MISMATCH", "gradient_sketches"),
    ("a sketch that is NaN", {"contributions": None, "gradient_sketches": f32(1, NAN), "target_sketch": f32(1)},
     "NON_FINITE_STAT", "gradient_sketches[1]"),
    ("an unknown sketch type", {"contributions": None, "gradient_sketches": f32(1, 1), "target_sketch": f32(1),
     "sketch_type": 99}, "OUT_OF_RANGE_VALUE", "sketch_type"),
)  # fmt: skip
"""What is wrong, the fields of the step, reason and field of the refusal."""

BAD_READS: tuple[tuple[str, pb.StepRequest, str, str], ...] = (
    ("an empty request", pb.StepRequest(), "EMPTY_REQUEST", "rows"),
    ("a read with a sequence", pb.StepRequest(sequence=1, example_ids=u64(1)), "SEQUENCE_ON_READ", "sequence"),
    ("a read of an id that is N", pb.StepRequest(example_ids=u64(N)), "ID_OUT_OF_RANGE", "example_ids[0]"),
)


def checks() -> list[Check]:
    """One check for each bad step and read: refused in a stream, and as a call, alike."""
    made = []
    steps = ((what, a_step(1, **fields), reason, field) for what, fields, reason, field in BAD)
    for what, request, reason, field in (*steps, *BAD_READS):
        expected = f"INVALID_ARGUMENT {reason} at {field}, in a stream, which goes on, and as a call"
        made.append(Check(f"refused/{what}", expected, _bad(request, reason, field)))
    made.append(
        Check("refused/too many rows", "INVALID_ARGUMENT TOO_MANY_EXAMPLES beyond max_batch_examples", _too_many)
    )
    return made


def _bad(request: pb.StepRequest, reason: str, field: str) -> Any:
    def run(target: Target) -> str:
        policy = target.create(num_examples=N)
        alone = pb.UpdateWeightsRequest(policy=policy, trainer_id="alone", step=request)
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        with refused(code=invalid, reason=reason, field=field):
            target.call("UpdateWeights", alone, policy=policy)
        with target.conversation(policy) as stream:
            stream.opened()
            answer = stream.step(request)
            expect("outcome", pb.Outcome.Name(answer.outcome), "OUTCOME_REFUSED")
            Refusal.of(answer.error).check(code=invalid, reason=reason, field=field)
            consumed = 1 if request.sequence else 0
            expect("version", answer.version, consumed)
            expect("version of the next step", stream.step(a_step(consumed + 1)).version, consumed + 1)
        return "as expected"

    return run


def _too_many(target: Target) -> str:
    most = target.info.max_batch_examples
    if 12 * (most + 1) + 1024 > target.info.max_message_bytes:
        raise InapplicableError(f"{most} rows are more than a message can hold")
    policy = target.create(num_examples=N)
    request = pb.StepRequest(example_ids=bytes(8 * (most + 1)), omit_weights=True)
    update = pb.UpdateWeightsRequest(policy=policy, step=request)
    with refused(code=grpc.StatusCode.INVALID_ARGUMENT, reason="TOO_MANY_EXAMPLES", field="example_ids"):
        target.call("UpdateWeights", update, policy=policy)
    return f"{most + 1} rows are refused"
