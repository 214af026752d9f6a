"""What a caller can make the server hold, or say, is bounded: names, trainers, imports, answers that nobody reads."""

import threading
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from equipoise import PolicyAdmin, PolicyClient, PolicySpec, Security
from equipoise.errors import QuotaError
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.faults.gauges import refusals
from tests.e2e.faults.proxy import until
from tests.e2e.security.conftest import Tokens
from tests.servers import ServerProcess, serve

LONG = 1_000_000
MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve(max_trainers=5, max_import_bytes=2 * MIB, write_timeout_s=3.0) as process:
        yield process


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[PolicyServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        stub = PolicyServiceStub(channel)
        stub.CreatePolicy(pb.CreatePolicyRequest(policy=pb.PolicySpec(name="p", num_examples=4)))
        yield stub


def refusal(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Code and reason; the whole status fits what peers accept."""
    (details,) = (value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin")  # type: ignore[attr-defined]
    assert len(details) + len(error.details()) < 8192  # type: ignore[attr-defined]
    status = status_pb2.Status.FromString(details)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return error.code(), info.reason  # type: ignore[attr-defined]


@pytest.mark.parametrize("length", [129, LONG])
def test_a_trainer_id_is_bounded_wherever_it_is_given(stub: PolicyServiceStub, length: int) -> None:
    step = pb.StepRequest(sequence=1, example_ids=bytes(8), contributions=bytes(4))
    opening = pb.ExchangeRequest(open=pb.OpenRequest(policy="p", trainer_id="t" * length))
    for call in (
        lambda: stub.UpdateWeights(pb.UpdateWeightsRequest(policy="p", trainer_id="t" * length, step=step)),
        lambda: next(stub.Exchange(iter([opening]))),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert refusal(caught.value) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TRAINER_ID")
    assert stub.GetPolicy(pb.GetPolicyRequest(policy="p")).status.version == 0


def test_a_long_value_is_shortened_in_the_answer(stub: PolicyServiceStub) -> None:
    setting, length = pb.SettingValue(number=1.0), 50_000
    rule = pb.RuleSpec(name="ema_sign", settings={"s" * length: setting})
    requests = {
        "INVALID_POLICY_NAME": pb.PolicySpec(name="N" * length, num_examples=4),
        "UNKNOWN_RULE": pb.PolicySpec(name="q", num_examples=4, rule=pb.RuleSpec(name="r" * length)),
        "INVALID_SETTING": pb.PolicySpec(name="q", num_examples=4, rule=rule),
    }
    for reason, spec in requests.items():
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec))
        assert refusal(caught.value) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
        assert "characters …" in (caught.value.details() or "")  # type: ignore[attr-defined]


def test_a_request_without_rows_is_small(stub: PolicyServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetPolicy(pb.GetPolicyRequest(policy="N" * LONG))
    assert refusal(caught.value) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LARGE")
    assert "65536 at most" in (caught.value.details() or "")  # type: ignore[attr-defined]


def test_a_policy_knows_so_many_trainers_and_those_go_on(server: ServerProcess) -> None:
    with PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name="crowd", num_examples=4))
    with grpc.insecure_channel(server.address) as channel:
        stub = PolicyServiceStub(channel)

        def step(trainer: int, sequence: int) -> pb.UpdateWeightsResponse:
            step = pb.StepRequest(sequence=sequence, example_ids=bytes(8), contributions=bytes(4))
            return stub.UpdateWeights(pb.UpdateWeightsRequest(policy="crowd", trainer_id=f"t{trainer}", step=step))

        for trainer in range(5):
            assert step(trainer, 1).step.outcome == pb.OUTCOME_APPLIED
        opening = pb.ExchangeRequest(open=pb.OpenRequest(policy="crowd", trainer_id="t6"))
        for call in (lambda: step(6, 1), lambda: next(stub.Exchange(iter([opening])))):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert refusal(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_TRAINERS")
        assert step(0, 2).step.outcome == pb.OUTCOME_APPLIED
        assert stub.GetPolicy(pb.GetPolicyRequest(policy="crowd")).status.version == 6


def test_whoever_does_not_read_an_export_holds_no_place_among_the_readers(server: ServerProcess) -> None:
    with PolicyAdmin(server.address) as admin, grpc.insecure_channel(server.address) as channel:
        admin.create(PolicySpec(name="wide", num_examples=4_000_000))
        stub = PolicyServiceStub(channel)
        before = refusals(server, "NOT_READ")
        unread = [stub.ExportPolicy(pb.ExportPolicyRequest(policy="wide")) for _ in range(8)]
        for call in unread:
            next(call)

        def exported() -> object:
            """How many bytes came, or why none did."""
            again = PolicyServiceStub(channel).ExportPolicy(pb.ExportPolicyRequest(policy="wide"), timeout=60)
            try:
                return sum(len(message.chunk.data) for message in again)
            except grpc.RpcError as error:
                return refusal(error)

        until(lambda: exported() == 4_000_000 * 8, what=lambda: f"all of it comes; {exported()}")
        until(lambda: refusals(server, "NOT_READ") - before >= len(unread), what="the server gives all of them up")
        for call in unread:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert refusal(caught.value) == (grpc.StatusCode.DEADLINE_EXCEEDED, "NOT_READ")


class Unfinished:
    """An import that stops behind its header until it is told to end."""

    def __init__(self, first: pb.ImportPolicyRequest) -> None:
        self._first = first
        self.over = threading.Event()

    def __iter__(self) -> Iterator[pb.ImportPolicyRequest]:
        yield self._first
        self.over.wait(60)


def exported_header(stub: PolicyServiceStub, policy: str, *, name: str) -> pb.ImportPolicyRequest:
    first = next(stub.ExportPolicy(pb.ExportPolicyRequest(policy=policy)))
    first.header.spec.name = name
    return pb.ImportPolicyRequest(header=first.header)


def test_imports_share_a_bounded_memory(server: ServerProcess) -> None:
    with PolicyAdmin(server.address) as admin, grpc.insecure_channel(server.address) as channel:
        admin.create(PolicySpec(name="source", num_examples=200_000))  # 1.6 MB
        stub = PolicyServiceStub(channel)
        first = Unfinished(exported_header(stub, "source", name="one"))
        importing = stub.ImportPolicy.future(iter(first))

        def refused() -> bool:
            try:
                stub.ImportPolicy(iter([exported_header(stub, "source", name="two")]))
            except grpc.RpcError as error:
                return refusal(error) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_IMPORTS")
            return False

        until(refused, what="the first import holds the memory")
        first.over.set()
        assert importing.exception(timeout=60) is not None  # it sent no columns
        until(lambda: not refused(), what="the memory is free again")


def test_an_import_over_the_quota_is_refused_at_its_header(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokens = Tokens(tmp_path_factory.mktemp("tokens") / "tokens.toml")
    security, operator = Security(token=tokens.add("small")), Security(token=tokens.add("operator"))
    with serve(tokens_file=tokens.file) as server, PolicyAdmin(server.address, security=operator) as admin:
        admin.create(PolicySpec(name="source", num_examples=101))
        with grpc.insecure_channel(server.address) as channel:
            stub = PolicyServiceStub(channel)
            first = next(stub.ExportPolicy(pb.ExportPolicyRequest(policy="source"), metadata=operator.headers()))
            first.header.spec.name = "small-p"
            unfinished = Unfinished(pb.ImportPolicyRequest(header=first.header))
            with pytest.raises(grpc.RpcError) as caught:
                stub.ImportPolicy(iter(unfinished), metadata=security.headers(), timeout=50)
            unfinished.over.set()
        assert refusal(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXAMPLES")


def test_the_client_tells_what_was_exhausted(server: ServerProcess) -> None:
    with PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name="full", num_examples=4))
    clients = [PolicyClient(server.address, policy="full", when_lost="wait") for _ in range(5)]
    try:
        for client in clients:
            client.step([0], contributions=[1.0])
        with (
            pytest.raises(QuotaError, match="max_trainers"),
            PolicyClient(server.address, policy="full", when_lost="wait") as one_more,
        ):
            one_more.step([0], contributions=[1.0])
    finally:
        for client in clients:
            client.close()
