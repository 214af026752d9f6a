"""The contract over a socket, by the generated stub alone: what policy.proto promises."""

import itertools
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise_server.engine.memory import free_bytes
from tests.servers import ServerProcess

NUM_EXAMPLES = 100
FRESH = itertools.count()


def u64(*ids: int) -> bytes:
    return np.array(ids, "<u8").tobytes()


def f32(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def floats(data: bytes) -> list[float]:
    return np.frombuffer(data, "<f4").tolist()


@pytest.fixture
def policy(stub: PolicyServiceStub) -> str:
    """A fresh ema_sign policy over 100 examples."""
    name = f"contract-{next(FRESH)}"
    stub.CreatePolicy(pb.CreatePolicyRequest(policy=pb.PolicySpec(name=name, num_examples=NUM_EXAMPLES)))
    return name


def step(sequence: int, **fields: object) -> pb.StepRequest:
    given = {"example_ids": u64(1, 2), "contributions": f32(1.0, -1.0)} | fields
    kept = {name: value for name, value in given.items() if value is not None}
    return pb.StepRequest(sequence=sequence, **kept)  # type: ignore[arg-type]


def exchange(
    stub: PolicyServiceStub, policy: str, *steps: pb.StepRequest, trainer_id: str = "trainer", uid: str = ""
) -> Iterator[pb.ExchangeResponse]:
    opening = pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id=trainer_id, uid=uid))
    return stub.Exchange(iter([opening, *(pb.ExchangeRequest(step=one) for one in steps)]), timeout=30)


def answers(responses: Iterator[pb.ExchangeResponse]) -> list[pb.StepResponse]:
    opening, *rest = responses
    assert opening.WhichOneof("message") == "opened"
    return [response.step for response in rest]


def details(status: status_pb2.Status) -> tuple[str, dict[str, str], dict[str, str]]:
    """Reason, metadata, and descriptions by field."""
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    assert info.domain == "equipoise"
    return info.reason, dict(info.metadata), {one.field: one.description for one in bad.field_violations}


def failure(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, dict[str, str], dict[str, str]]:
    """Code and details of the error that the call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    carried = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(carried)
    assert status.message == error.details()
    return error.code(), *details(status)


def test_creation_is_idempotent_for_equal_fields_and_names_the_first_that_differs(stub: PolicyServiceStub) -> None:
    spec = pb.PolicySpec(name=f"contract-{next(FRESH)}", num_examples=10, reference_nats=2.3)
    spec.rule.name = "ema_relu"
    spec.rule.settings["floor"].number = 0.05
    first = stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec))
    assert first.created
    assert first.status.spec.rule.settings["floor"].number == 0.05
    assert "ema_decay" in first.status.spec.rule.settings  # resolved
    for again in (spec, first.status.spec, pb.PolicySpec(name=spec.name)):
        answer = stub.CreatePolicy(pb.CreatePolicyRequest(policy=again))
        assert (answer.created, answer.status.uid) == (False, first.status.uid)
    other = pb.PolicySpec(name=spec.name)
    other.rule.settings["floor"].number = 0.06
    code, reason, _, fields = failure(lambda: stub.CreatePolicy(pb.CreatePolicyRequest(policy=other)))
    assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "POLICY_EXISTS")
    assert "0.05" in fields["policy.rule.settings.floor"]
    assert "0.06" in fields["policy.rule.settings.floor"]


@pytest.mark.parametrize(
    ("spec", "reason", "field", "says"),
    [
        (pb.PolicySpec(name="Upper", num_examples=1), "INVALID_POLICY_NAME", "policy.name", "'Upper'"),
        (pb.PolicySpec(name="x" * 129, num_examples=1), "INVALID_POLICY_NAME", "policy.name", "does not match"),
        (pb.PolicySpec(name="none"), "OUT_OF_RANGE_VALUE", "policy.num_examples", "0 is not in [1,"),
        (pb.PolicySpec(name="n", num_examples=1, rule=pb.RuleSpec(name="magic")), "UNKNOWN_RULE", "policy.rule.name",
         "magic"),
        (pb.PolicySpec(name="n", num_examples=1, rule=pb.RuleSpec(settings={"flor": pb.SettingValue(number=1)})),
         "INVALID_SETTING", "policy.rule.settings.flor", "flor"),
        (pb.PolicySpec(name="n", num_examples=1, rule=pb.RuleSpec(settings={"floor": pb.SettingValue(number=2)})),
         "INVALID_SETTING", "policy.rule.settings.floor", "2"),
        (pb.PolicySpec(name="n", num_examples=1, rule=pb.RuleSpec(settings={"floor": pb.SettingValue(text="a")})),
         "INVALID_SETTING", "policy.rule.settings.floor", "a"),
        (pb.PolicySpec(name="n", num_examples=1, reference_nats=-1), "OUT_OF_RANGE_VALUE", "policy.reference_nats",
         "-1"),
    ],
)  # fmt: skip
def test_a_bad_specification_names_field_value_and_rule(
    stub: PolicyServiceStub, spec: pb.PolicySpec, reason: str, field: str, says: str
) -> None:
    code, got, _, fields = failure(lambda: stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec)))
    assert (code, got) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert says in fields[field]
    assert failure(lambda: stub.GetPolicy(pb.GetPolicyRequest(policy="none")))[0] is grpc.StatusCode.NOT_FOUND


def test_steps_are_answered_in_order_with_the_weights_right_after_each(stub: PolicyServiceStub, policy: str) -> None:
    sent = [step(1, target_loss=0.5), step(2, example_ids=u64(3), contributions=f32(1.0)), step(3, guard_loss=0.7)]
    got = answers(exchange(stub, policy, *sent))
    assert [one.sequence for one in got] == [1, 2, 3]
    assert [one.version for one in got] == [1, 2, 3]
    assert {one.outcome for one in got} == {pb.OUTCOME_APPLIED}
    assert all(one.durable_sequence >= one.sequence for one in got)  # LOGGED: answered once it is in the log
    floor = 0.01
    assert floats(got[0].weights) == pytest.approx([2 / (1 + floor), 2 * floor / (1 + floor)])
    assert floats(got[1].weights) == pytest.approx([3 / (2 + floor)])
    status = stub.GetPolicy(pb.GetPolicyRequest(policy=policy)).status
    assert (status.version, status.durable_version, status.scored_examples) == (3, 3, 3)
    assert (status.target_loss, status.guard_loss) == (0.5, pytest.approx(0.7))
    assert status.positive_share == 0.5


def test_weights_for_asks_for_other_rows_and_omit_weights_for_none(stub: PolicyServiceStub, policy: str) -> None:
    got = answers(exchange(stub, policy, step(1, weights_for=u64(7, 1, 7)), step(2, omit_weights=True)))
    assert floats(got[0].weights) == pytest.approx([1.0, 2 / 1.01, 1.0])
    assert got[1].weights == b""


def test_reads_have_no_effect_and_all_examples_means_all_in_order(stub: PolicyServiceStub, policy: str) -> None:
    everything = pb.StepRequest(all_examples=True)
    only_some = pb.StepRequest(weights_for=u64(2))
    got = answers(exchange(stub, policy, everything, step(1), everything, only_some))
    assert [one.outcome for one in got] == [pb.OUTCOME_READ, pb.OUTCOME_APPLIED, pb.OUTCOME_READ, pb.OUTCOME_READ]
    assert [one.version for one in got] == [0, 1, 1, 1]
    assert floats(got[0].weights) == [1.0] * NUM_EXAMPLES
    assert np.mean(floats(got[2].weights)) == pytest.approx(1.0, abs=1e-6)
    assert floats(got[3].weights) == floats(got[2].weights)[2:3]


def test_a_report_without_rows_is_a_step(stub: PolicyServiceStub, policy: str) -> None:
    got = answers(exchange(stub, policy, pb.StepRequest(sequence=1, target_loss=1.5)))
    assert (got[0].outcome, got[0].version, got[0].weights) == (pb.OUTCOME_APPLIED, 1, b"")
    assert stub.GetPolicy(pb.GetPolicyRequest(policy=policy)).status.target_loss == 1.5


def test_unscored_rows_may_hold_anything(stub: PolicyServiceStub, policy: str) -> None:
    nan = float("nan")
    got = answers(exchange(stub, policy, step(1, contributions=f32(nan, -1.0), scored=bytes([0, 1]))))
    assert got[0].outcome == pb.OUTCOME_APPLIED
    assert stub.GetPolicy(pb.GetPolicyRequest(policy=policy)).status.scored_examples == 1


def test_a_repeated_id_counts_once_with_the_mean_of_its_scored_rows(stub: PolicyServiceStub, policy: str) -> None:
    repeated = step(1, example_ids=u64(5, 6, 5, 5), contributions=f32(-1, 1, 3, 99), scored=bytes([1, 1, 1, 0]))
    got = answers(exchange(stub, policy, repeated))
    assert floats(got[0].weights) == [1.0] * 4  # mean of -1 and 3 is positive: both ids have full weight
    assert stub.GetPolicy(pb.GetPolicyRequest(policy=policy)).status.scored_examples == 2


NAN = float("nan")


def sketches(rows: bytes, target: bytes) -> dict[str, object]:
    """Fields of a step with sketches instead of contributions."""
    return {"contributions": None, "gradient_sketches": rows, "target_sketch": target}


@pytest.mark.parametrize(
    ("fields", "reason", "field", "says"),
    [
        ({"contributions": f32(1.0, float("nan"))}, "NON_FINITE_STAT", "contributions[1]", "nan"),
        ({"contributions": f32(float("inf"), 1.0)}, "NON_FINITE_STAT", "contributions[0]", "inf"),
        ({"example_ids": u64(1, NUM_EXAMPLES)}, "ID_OUT_OF_RANGE", "example_ids[1]", "100"),
        ({"example_ids": u64(1, 2**64 - 1)}, "ID_OUT_OF_RANGE", "example_ids[1]", "18446744073709551615"),
        ({"example_ids": b"123"}, "SHAPE_MISMATCH", "example_ids", "3 bytes"),
        ({"contributions": f32(1.0)}, "SHAPE_MISMATCH", "contributions", "4 bytes for 2 rows"),
        ({"losses": f32(1.0, 2.0, 3.0)}, "SHAPE_MISMATCH", "losses", "12 bytes for 2 rows"),
        ({"scored": bytes([1])}, "SHAPE_MISMATCH", "scored", "1 bytes for 2 rows"),
        ({"scored": bytes([1, 2])}, "OUT_OF_RANGE_VALUE", "scored[1]", "2"),
        ({"measured": bytes([1])}, "SHAPE_MISMATCH", "measured", "1 bytes for 2 rows"),
        ({"measured": bytes([0, 3])}, "OUT_OF_RANGE_VALUE", "measured[1]", "3"),
        ({"contributions": f32(NAN, NAN), "measured": bytes([0, 1])}, "NON_FINITE_STAT", "contributions[1]", "nan"),
        ({"groups": bytes(4)}, "SHAPE_MISMATCH", "groups", "4 bytes for 2 rows"),
        ({"groups": bytes(8)}, "UNUSABLE_STATISTICS", "groups", "rule ema_sign does not use them"),
        ({"successes": bytes(8), "attempts": bytes(8)}, "OUT_OF_RANGE_VALUE", "attempts[0]", "at least 1"),
        ({"successes": bytes(8)}, "SHAPE_MISMATCH", "attempts", "go together"),
        ({"target_losses": f32(1.0)}, "UNUSABLE_STATISTICS", "target_losses", "rule ema_sign does not use them"),
        ({"target_losses": b"12345"}, "SHAPE_MISMATCH", "target_losses", "5 bytes are no float32"),
        ({"target_losses": f32(1.0, NAN)}, "NON_FINITE_STAT", "target_losses[1]", "nan"),
        ({"contributions": None, "target_losses": f32(1.0)}, "UNUSABLE_STATISTICS", "target_losses", "without losses"),
        ({"target_groups": bytes(4)}, "SHAPE_MISMATCH", "target_losses", "0 bytes are no float32"),
        ({"target_losses": f32(1.0), "target_groups": bytes(8)}, "SHAPE_MISMATCH", "target_groups", "8 bytes for 1"),
        (
            {"example_ids": None, "contributions": None, "target_losses": f32(1.0)},
            "SHAPE_MISMATCH",
            "target_losses",
            "without rows",
        ),
        ({"target_loss": float("nan")}, "NON_FINITE_STAT", "target_loss", "nan"),
        ({"weights_for": u64(100)}, "ID_OUT_OF_RANGE", "weights_for[0]", "100"),
        ({"contributions": None, "losses": f32(1.0, 1.0)}, "UNUSABLE_STATISTICS", "contributions", "ema_sign"),
        ({"reference_losses": f32(1.0, 1.0)}, "UNUSABLE_STATISTICS", "reference_losses", "rule ema_sign does not use"),
        ({"reference_losses": f32(1.0)}, "SHAPE_MISMATCH", "reference_losses", "4 bytes for 2 rows"),
        ({"gradient_sketches": f32(1.0, 1.0)}, "SHAPE_MISMATCH", "target_sketch", "absent, but gradient_sketches"),
        ({"target_sketch": f32(1.0)}, "SHAPE_MISMATCH", "gradient_sketches", "absent, but target_sketch"),
        (
            sketches(f32(1.0, 1.0), f32(1.0)) | {"contributions": f32(1.0, 1.0)},
            "SHAPE_MISMATCH",
            "gradient_sketches",
            "either",
        ),
        (
            sketches(f32(1.0, 1.0, 1.0), f32(1.0, 1.0)),
            "SHAPE_MISMATCH",
            "gradient_sketches",
            "12 bytes for 2 rows; 2 float32",
        ),
        (sketches(f32(1.0, 1.0), b"123"), "SHAPE_MISMATCH", "target_sketch", "3 bytes are no whole number of float32"),
        (sketches(f32(1.0, 1.0), f32(NAN)), "NON_FINITE_STAT", "target_sketch[0]", "nan"),
        (sketches(f32(1.0, NAN), f32(1.0)), "NON_FINITE_STAT", "gradient_sketches[1]", "not finite; scored rows"),
        (
            sketches(f32(1.0, 1e30), f32(1e30)),
            "NON_FINITE_STAT",
            "gradient_sketches[1]",
            "its product with target_sketch is inf",
        ),
        (sketches(b"", b"\0" * 4 * 65_537), "SHAPE_MISMATCH", "gradient_sketches", "absent"),
        (
            sketches(f32(1.0), b"\0" * 4 * 65_537),
            "OUT_OF_RANGE_VALUE",
            "target_sketch",
            "65537 values, must be at most 65536",
        ),
        (sketches(f32(1.0, 1.0), f32(1.0)) | {"sketch_type": 9}, "OUT_OF_RANGE_VALUE", "sketch_type", "9 is not"),
        ({"example_ids": None}, "SHAPE_MISMATCH", "contributions", "without rows"),
    ],
)
def test_a_refused_step_says_why_consumes_its_number_and_the_stream_goes_on(
    stub: PolicyServiceStub, policy: str, fields: dict[str, object], reason: str, field: str, says: str
) -> None:
    first, refused, third = answers(exchange(stub, policy, step(1), step(2, **fields), step(3)))
    assert (refused.outcome, refused.sequence, refused.version) == (pb.OUTCOME_REFUSED, 2, 2)
    got, _, descriptions = details(refused.error)
    assert got == reason
    assert says in descriptions[field]
    assert (third.outcome, third.version) == (pb.OUTCOME_APPLIED, 3)
    assert third.weights == first.weights  # the refused one left no trace


def test_a_refused_read_changes_no_version(stub: PolicyServiceStub, policy: str) -> None:
    empty, beyond = pb.StepRequest(), pb.StepRequest(example_ids=u64(100))
    got = answers(exchange(stub, policy, empty, beyond, step(1)))
    assert [one.outcome for one in got] == [pb.OUTCOME_REFUSED, pb.OUTCOME_REFUSED, pb.OUTCOME_APPLIED]
    assert [details(one.error)[0] for one in got[:2]] == ["EMPTY_REQUEST", "ID_OUT_OF_RANGE"]
    assert got[2].version == 1


def test_a_resent_step_has_no_second_effect(stub: PolicyServiceStub, policy: str) -> None:
    answers(exchange(stub, policy, step(1), step(2)))
    opening, again, new = exchange(stub, policy, step(2), step(3))
    assert (opening.opened.last_sequence, opening.opened.durable_sequence) == (2, 2)
    assert (again.step.outcome, again.step.version) == (pb.OUTCOME_DUPLICATE, 2)
    assert len(again.step.weights) == 8
    assert (new.step.outcome, new.step.version) == (pb.OUTCOME_APPLIED, 3)


def test_a_gap_ends_the_stream_after_the_answers_before_it(stub: PolicyServiceStub, policy: str) -> None:
    responses = exchange(stub, policy, step(1), step(3))
    assert next(responses).opened.last_sequence == 0
    assert next(responses).step.version == 1
    code, reason, metadata, _ = failure(lambda: next(responses))
    assert (code, reason) == (grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_GAP")
    assert metadata == {"expected_sequence": "2"}


def test_a_step_without_number_and_a_second_opening_end_the_stream(stub: PolicyServiceStub, policy: str) -> None:
    code, reason, _, fields = failure(lambda: list(exchange(stub, policy, step(0))))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert "numbered from 1" in fields["step.sequence"]
    opening = pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id="t"))
    assert failure(lambda: list(stub.Exchange(iter([opening, opening]))))[1] == "MALFORMED_REQUEST"
    no_opening = iter([pb.ExchangeRequest(step=step(1))])
    assert failure(lambda: list(stub.Exchange(no_opening)))[1] == "NOT_OPENED"
    bad_id = iter([pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id=""))])
    assert failure(lambda: list(stub.Exchange(bad_id)))[1] == "INVALID_TRAINER_ID"


def test_opening_an_unknown_policy_or_incarnation_fails(stub: PolicyServiceStub, policy: str) -> None:
    code, reason, _, _ = failure(lambda: list(exchange(stub, "unknown")))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "POLICY_NOT_FOUND")
    code, reason, _, _ = failure(lambda: list(exchange(stub, policy, uid="0" * 32)))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UID_MISMATCH")


def test_unary_steps_need_no_stream(stub: PolicyServiceStub, policy: str) -> None:
    unnumbered = pb.UpdateWeightsRequest(policy=policy, step=step(0))
    assert [stub.UpdateWeights(unnumbered).step.version for _ in range(2)] == [1, 2]
    numbered = pb.UpdateWeightsRequest(policy=policy, trainer_id="unary", step=step(1))
    first, again = stub.UpdateWeights(numbered).step, stub.UpdateWeights(numbered).step
    assert (first.outcome, first.version) == (pb.OUTCOME_APPLIED, 3)
    assert (again.outcome, again.version) == (pb.OUTCOME_DUPLICATE, 3)
    bad = pb.UpdateWeightsRequest(policy=policy, trainer_id="unary", step=step(2, contributions=f32(1.0)))
    code, reason, _, fields = failure(lambda: stub.UpdateWeights(bad))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "SHAPE_MISMATCH")
    assert "4 bytes for 2 rows" in fields["contributions"]
    corrected = pb.UpdateWeightsRequest(policy=policy, trainer_id="unary", step=step(2))
    assert stub.UpdateWeights(corrected).step.outcome == pb.OUTCOME_APPLIED  # the number was not consumed
    nameless = pb.UpdateWeightsRequest(policy=policy, step=step(1))
    assert failure(lambda: stub.UpdateWeights(nameless))[1] == "INVALID_TRAINER_ID"


def test_read_weights_and_scores(stub: PolicyServiceStub, policy: str) -> None:
    answers(exchange(stub, policy, step(1)))
    (weights,) = stub.ReadWeights(pb.ReadWeightsRequest(policy=policy))
    assert (weights.offset, weights.version, len(weights.values)) == (0, 1, 4 * NUM_EXAMPLES)
    assert np.mean(floats(weights.values)) == pytest.approx(1.0, abs=1e-6)
    (some,) = stub.ReadWeights(pb.ReadWeightsRequest(policy=policy, example_ids=u64(2, 1)))
    assert floats(some.values) == [floats(weights.values)[2], floats(weights.values)[1]]
    (scores,) = stub.ReadWeights(pb.ReadWeightsRequest(policy=policy, field=pb.FIELD_SCORE, example_ids=u64(1, 2, 3)))
    one, two, three = floats(scores.values)
    assert one > 0 > two
    assert np.isnan(three)
    rows = pb.ReadWeightsRequest(policy=policy, num_rows=1)
    assert failure(lambda: list(stub.ReadWeights(rows)))[1] == "INVALID_FIELD"


def test_long_reads_come_in_chunks(stub: PolicyServiceStub) -> None:
    name = f"contract-{next(FRESH)}"
    stub.CreatePolicy(pb.CreatePolicyRequest(policy=pb.PolicySpec(name=name, num_examples=600_000)))
    chunks = list(stub.ReadWeights(pb.ReadWeightsRequest(policy=name)))
    lengths = [len(chunk.values) // 4 for chunk in chunks]
    assert sum(lengths) == 600_000
    assert max(lengths) <= 1 << 18
    assert [chunk.offset for chunk in chunks] == [0, *np.cumsum(lengths)[:-1]]


def test_sampling_follows_the_weights_and_a_seed_reproduces_it(stub: PolicyServiceStub, policy: str) -> None:
    ids = np.arange(NUM_EXAMPLES, dtype="<u8")
    halves = np.where(ids < 50, 1.0, -1.0).astype("<f4")
    answers(exchange(stub, policy, step(1, example_ids=ids.tobytes(), contributions=halves.tobytes())))
    many = pb.SampleExamplesRequest(policy=policy, count=20_000, with_replacement=True, seed=7)
    first, again = stub.SampleExamples(many), stub.SampleExamples(many)
    assert first.example_ids == again.example_ids
    assert first.version == 1
    drawn = np.frombuffer(first.example_ids, "<u8")
    low = np.mean(drawn >= 50)  # expected 0.01 / 1.01, standard deviation 7e-4
    assert abs(low - 0.01 / 1.01) < 5 * 7e-4
    counts = np.bincount(drawn.astype(int), minlength=NUM_EXAMPLES)[:50]
    assert np.abs(counts / counts.mean() - 1).max() < 5 / np.sqrt(counts.mean())
    every = pb.SampleExamplesRequest(policy=policy, count=NUM_EXAMPLES, seed=1)
    assert sorted(np.frombuffer(stub.SampleExamples(every).example_ids, "<u8")) == list(range(NUM_EXAMPLES))
    too_many = pb.SampleExamplesRequest(policy=policy, count=NUM_EXAMPLES + 1)
    code, _, _, fields = failure(lambda: stub.SampleExamples(too_many))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "101 without replacement" in fields["count"]


def test_listing_pages_through_all_names_once_in_order(stub: PolicyServiceStub) -> None:
    prefix = f"listed-{next(FRESH)}-"
    names = sorted(f"{prefix}{index}" for index in range(7))
    for name in reversed(names):
        stub.CreatePolicy(pb.CreatePolicyRequest(policy=pb.PolicySpec(name=name, num_examples=3)))
    seen, token = [], ""
    while True:
        page = stub.ListPolicies(pb.ListPoliciesRequest(page_size=3, page_token=token, prefix=prefix))
        assert len(page.policies) <= 3
        seen += [one.spec.name for one in page.policies]
        token = page.next_page_token
        if not token:
            break
    assert seen == names
    assert failure(lambda: stub.ListPolicies(pb.ListPoliciesRequest(page_token="NO")))[1] == "INVALID_PAGE_TOKEN"


def test_watching_tells_changes_and_the_end(stub: PolicyServiceStub, policy: str) -> None:
    watch = stub.WatchPolicy(pb.WatchPolicyRequest(policy=policy, min_interval_ms=100), timeout=30)
    assert next(watch).status.version == 0
    answers(exchange(stub, policy, step(1), step(2), step(3)))
    version = 0
    while version < 3:
        version = next(watch).status.version
    stub.DeletePolicy(pb.DeletePolicyRequest(policy=policy))
    code, reason, _, _ = failure(lambda: list(watch))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "POLICY_DELETED")


def test_deletion_and_creation_make_another_incarnation(stub: PolicyServiceStub, policy: str) -> None:
    before = stub.GetPolicy(pb.GetPolicyRequest(policy=policy)).status
    wrong = pb.DeletePolicyRequest(policy=policy, uid="0" * 32)
    assert failure(lambda: stub.DeletePolicy(wrong))[1] == "UID_MISMATCH"
    assert stub.DeletePolicy(pb.DeletePolicyRequest(policy=policy)).uid == before.uid
    assert failure(lambda: stub.DeletePolicy(pb.DeletePolicyRequest(policy=policy)))[1] == "POLICY_NOT_FOUND"
    spec = pb.PolicySpec(name=policy, num_examples=5)
    after = stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec)).status
    assert after.uid != before.uid
    assert after.epoch > before.epoch


def test_export_and_import_keep_every_bit(stub: PolicyServiceStub, policy: str) -> None:
    answers(exchange(stub, policy, step(1), step(2, example_ids=u64(9), contributions=f32(-0.5))))
    exported = list(stub.ExportPolicy(pb.ExportPolicyRequest(policy=policy)))
    header = pb.StateHeader.FromString(exported[0].header.SerializeToString())
    assert header.version == 2
    header.spec.name = f"{policy}-imported"
    messages = [pb.ImportPolicyRequest(header=header)]
    messages += [pb.ImportPolicyRequest(chunk=one.chunk) for one in exported[1:]]
    status = stub.ImportPolicy(iter(messages)).status
    assert (status.version, status.scored_examples) == (0, 3)
    again = list(stub.ExportPolicy(pb.ExportPolicyRequest(policy=header.spec.name)))
    assert [one.chunk.data for one in again[1:]] == [one.chunk.data for one in exported[1:]]
    assert dict(again[0].header.scalars) == dict(header.scalars)
    code, reason, _, _ = failure(lambda: stub.ImportPolicy(iter(messages)))
    assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "POLICY_EXISTS")
    header.spec.name = f"{policy}-cut"
    cut = [pb.ImportPolicyRequest(header=header), *messages[1:-1]]
    assert failure(lambda: stub.ImportPolicy(iter(cut)))[1] == "INVALID_STATE"
    assert failure(lambda: stub.GetPolicy(pb.GetPolicyRequest(policy=header.spec.name)))[1] == "POLICY_NOT_FOUND"


def test_a_batch_rule_serves_its_batch_and_is_imported_without_tables(stub: PolicyServiceStub, policy: str) -> None:
    name = f"{policy}-batch"
    spec = pb.PolicySpec(name=name, num_examples=10**9, rule=pb.RuleSpec(name="boltzmann"))
    assert stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec)).status.bytes == 0
    first, again = (answers(exchange(stub, name, step(1)))[0] for _ in range(2))
    assert np.mean(floats(first.weights)) == pytest.approx(1.0, abs=1e-6)
    assert floats(first.weights)[0] > 1.5 > 0.5 > floats(first.weights)[1]
    assert (again.outcome, again.weights) == (pb.OUTCOME_DUPLICATE, first.weights)
    effective = stub.GetPolicy(pb.GetPolicyRequest(policy=name)).status.effective_examples
    assert 1.0 < effective < 2.0
    [exported] = stub.ExportPolicy(pb.ExportPolicyRequest(policy=name))
    exported.header.spec.name = f"{name}-imported"
    status = stub.ImportPolicy(iter([pb.ImportPolicyRequest(header=exported.header)])).status
    assert (status.effective_examples, status.bytes) == (effective, 0)
    fork = pb.CreatePolicyRequest(policy=pb.PolicySpec(name=f"{name}-fork"), **{"from": name})
    assert stub.CreatePolicy(fork).status.effective_examples == effective


def test_an_impossible_state_is_refused(stub: PolicyServiceStub, policy: str) -> None:
    exported = list(stub.ExportPolicy(pb.ExportPolicyRequest(policy=policy)))
    exported[0].header.spec.name = f"{policy}-broken"
    messages = [pb.ImportPolicyRequest(header=exported[0].header)]
    for one in exported[1:]:
        if one.chunk.column == "raw":
            one.chunk.data = np.full(NUM_EXAMPLES, 2**31 - 1, "<i4").tobytes()
        messages.append(pb.ImportPolicyRequest(chunk=one.chunk))
    code, reason, _, _ = failure(lambda: stub.ImportPolicy(iter(messages)))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_STATE")
    name = exported[0].header.spec.name
    assert failure(lambda: stub.GetPolicy(pb.GetPolicyRequest(policy=name)))[1] == "POLICY_NOT_FOUND"


def test_a_fork_starts_from_the_source(stub: PolicyServiceStub, policy: str) -> None:
    answers(exchange(stub, policy, step(1)))
    request = pb.CreatePolicyRequest(policy=pb.PolicySpec(name=f"{policy}-fork"), **{"from": policy})
    forked = stub.CreatePolicy(request)
    assert (forked.created, forked.status.scored_examples, forked.status.version) == (True, 2, 0)
    assert stub.CreatePolicy(request).created is False
    unequal = pb.CreatePolicyRequest(policy=pb.PolicySpec(name=f"{policy}-b", num_examples=7), **{"from": policy})
    assert failure(lambda: stub.CreatePolicy(unequal))[1] == "POLICY_EXISTS"


def test_a_fork_that_would_be_another_policy_is_refused(stub: PolicyServiceStub, policy: str) -> None:
    other = f"{policy}-other"
    stub.CreatePolicy(pb.CreatePolicyRequest(policy=pb.PolicySpec(name=other, num_examples=7)))
    request = pb.CreatePolicyRequest(policy=pb.PolicySpec(name=other), **{"from": policy})
    code, reason, _, _ = failure(lambda: stub.CreatePolicy(request))
    assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "POLICY_EXISTS")


def test_the_routing_header_must_agree(stub: PolicyServiceStub, policy: str) -> None:
    right, wrong = [("x-equipoise-policy", policy)], [("x-equipoise-policy", "another")]
    request = pb.GetPolicyRequest(policy=policy)
    assert stub.GetPolicy(request, metadata=right).status.spec.name == policy
    assert failure(lambda: stub.GetPolicy(request, metadata=wrong))[1] == "POLICY_MISMATCH"
    opening = pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id="t"))
    assert failure(lambda: list(stub.Exchange(iter([opening]), metadata=wrong)))[1] == "POLICY_MISMATCH"


def test_bytes_that_are_no_message_are_an_invalid_argument_and_the_connection_lives(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        raw = channel.unary_unary("/equipoise.v1.PolicyService/GetPolicy")
        code, reason, _, _ = failure(lambda: raw(b"\xff\xff\xff"))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
        stream = channel.stream_stream("/equipoise.v1.PolicyService/Exchange")
        assert failure(lambda: list(stream(iter([b"\xff\xff\xff"]))))[1] == "MALFORMED_REQUEST"
        upload = channel.stream_unary("/equipoise.v1.PolicyService/ImportPolicy")
        assert failure(lambda: upload(iter([b"\xff\xff\xff"])))[1] == "MALFORMED_REQUEST"
        info = PolicyServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest())
    assert info.api_version == "v1"
    assert "ema_sign" in info.rules


def test_health_overall_and_per_service(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "equipoise.v1.PolicyService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="unknown"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_policy_that_no_machine_can_hold_is_refused_and_not_stored(stub: PolicyServiceStub) -> None:
    name = f"contract-{next(FRESH)}"
    huge = pb.PolicySpec(name=name, num_examples=4_000_000_000)
    free = free_bytes(torch.device("cpu"))
    if free is None or free > 32 << 30:
        pytest.skip("this machine can, or does not say")
    code, reason, _, _ = failure(lambda: stub.CreatePolicy(pb.CreatePolicyRequest(policy=huge)))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_FULL")
    assert failure(lambda: stub.GetPolicy(pb.GetPolicyRequest(policy=name)))[0] is grpc.StatusCode.NOT_FOUND
