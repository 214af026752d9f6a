"""Nobody can lock others out: calls that idle, flood or come from strangers."""

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from equipoise import PolicyAdmin, PolicyClient, PolicySpec, Security
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.faults.gauges import calls_ended
from tests.e2e.faults.proxy import until
from tests.e2e.security.conftest import Tokens
from tests.servers import ServerProcess, serve

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
SLOTS = 48
PROBES = 256
METHOD = "/equipoise.v1.PolicyService/GetServerInfo"
CHECK = "/grpc.health.v1.Health/Check"


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Security]]:
    """The tokens file, and what each tenant shows."""
    tokens = Tokens(tmp_path_factory.mktemp("tokens") / "tokens.toml")
    tokens.file.write_text(tokens.file.read_text() + '[tenants.narrow]\nprefix = "narrow-"\nmax_calls = 3\n')
    return tokens.file, {name: Security(token=tokens.add(name)) for name in ("red", "blue", "narrow")}


@pytest.fixture(scope="module")
def tenants(entry: tuple[Path, dict[str, Security]]) -> dict[str, Security]:
    return entry[1]


@pytest.fixture(scope="module")
def server(entry: tuple[Path, dict[str, Security]]) -> Iterator[ServerProcess]:
    with serve(
        tokens_file=entry[0], max_concurrent_rpcs=SLOTS, max_tenant_rpcs=8, first_message_timeout_s=60.0
    ) as process:
        yield process


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address, options=OWN_CONNECTION) as channel:
        yield channel


class Silence:
    """Messages that never come; shared by many calls."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def __iter__(self) -> "Silence":
        return self

    def __next__(self) -> bytes:
        self.over.wait()
        raise StopIteration


@pytest.fixture
def silence() -> Iterator[Silence]:
    silence = Silence()
    yield silence
    silence.over.set()


def idle(channel: grpc.Channel, method: str, silence: Silence, security: Security | None = None) -> grpc.Future:
    """A call that is begun, and does not say what it wants."""
    call: grpc.Future = channel.stream_unary(method).future(
        silence, metadata=security.headers() if security else None, timeout=120
    )
    return call


def code(call: grpc.Future) -> grpc.StatusCode:
    """How it ended."""
    error = call.exception(timeout=60)
    assert isinstance(error, grpc.RpcError)
    found: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
    return found


def assert_served(server: ServerProcess, security: Security, policy: str) -> None:
    with PolicyAdmin(server.address, security=security) as admin:
        assert admin.server_info().api_version == "v1"
    with PolicyClient(server.address, policy=policy, num_examples=4, security=security, when_lost="wait") as client:
        assert client.step([0], contributions=[1.0]).source.name == "SERVED"


def healthy(server: ServerProcess) -> bool:
    with grpc.insecure_channel(server.address, options=OWN_CONNECTION) as channel:
        answer = HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_a_stranger_holds_no_slot(
    server: ServerProcess, tenants: dict[str, Security], channel: grpc.Channel, silence: Silence
) -> None:
    calls = [idle(channel, METHOD, silence) for _ in range(4 * SLOTS)]
    assert {code(call) for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
    assert_served(server, tenants["red"], "red-p")


def test_a_tenant_that_idles_takes_its_own_slots_alone(
    server: ServerProcess, tenants: dict[str, Security], channel: grpc.Channel, silence: Silence
) -> None:
    held = {name: [idle(channel, METHOD, silence, tenants[name]) for _ in range(20)] for name in ("blue", "narrow")}
    for name, most in {"blue": 8, "narrow": 3}.items():
        until(
            lambda name=name, most=most: sum(not call.done() for call in held[name]) == most, what="the rest is refused"
        )  # type: ignore[misc]
        refused = next(call for call in held[name] if call.done())
        assert code(refused) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"{most} calls are under way, the tenant's quota max_calls" in str(refused.exception())
    assert_served(server, tenants["red"], "red-q")
    assert healthy(server)
    for call in (call for calls in held.values() for call in calls):
        call.cancel()
    until(lambda: answers(server, tenants["blue"]), what="its slots are free again")


def test_calls_that_say_nothing_do_not_hold_up_those_that_do(
    server: ServerProcess, tenants: dict[str, Security], channel: grpc.Channel, silence: Silence
) -> None:
    held = [idle(channel, METHOD, silence, tenants["red"]) for _ in range(6)]
    assert answers(server, tenants["red"])
    assert not any(call.done() for call in held)
    for call in held:
        call.cancel()


def answers(server: ServerProcess, security: Security) -> bool:
    with grpc.insecure_channel(server.address, options=OWN_CONNECTION) as channel:
        try:
            channel.unary_unary(METHOD)(b"", metadata=security.headers(), timeout=60)
        except grpc.RpcError:
            return False
    return True


@pytest.mark.parametrize("method", ["Watch", "Check"])
def test_whoever_floods_the_health_service_keeps_nobody_from_asking(
    server: ServerProcess, channel: grpc.Channel, silence: Silence, method: str
) -> None:
    if method == "Watch":
        calls = [HealthStub(channel).Watch(health_pb2.HealthCheckRequest()) for _ in range(2 * PROBES)]
    else:
        calls = [idle(channel, CHECK, silence) for _ in range(2 * PROBES)]
    until(lambda: calls_ended(server, method, code="ResourceExhausted") == PROBES, what="the oldest have made room")
    for _ in range(3):
        assert healthy(server)
    assert calls_ended(server, method, code="ResourceExhausted") >= PROBES
    for call in calls:
        call.cancel()


def test_an_open_server_has_room_for_health_when_it_has_none_for_more_calls(silence: Silence) -> None:
    with (
        serve(max_concurrent_rpcs=8, first_message_timeout_s=60.0) as server,
        grpc.insecure_channel(server.address, options=OWN_CONNECTION) as channel,
    ):
        calls = [idle(channel, METHOD, silence) for _ in range(20)]
        until(lambda: sum(not call.done() for call in calls) == 8, what="the rest is refused")
        refused = next(call for call in calls if call.done())
        assert code(refused) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the server's limit max_concurrent_rpcs" in str(refused.exception())
        assert healthy(server)


def test_a_call_that_does_not_say_what_it_wants_ends(silence: Silence) -> None:
    with (
        serve(first_message_timeout_s=2.0) as server,
        grpc.insecure_channel(server.address, options=OWN_CONNECTION) as channel,
    ):
        for method in (METHOD, CHECK, "/equipoise.v1.PolicyService/ImportPolicy"):
            assert code(idle(channel, method, silence)) is grpc.StatusCode.DEADLINE_EXCEEDED, method
        empty = channel.stream_unary(METHOD).future(iter(()))
        assert code(empty) is grpc.StatusCode.INVALID_ARGUMENT


def test_health_lists_all_services(server: ServerProcess, channel: grpc.Channel) -> None:
    statuses = HealthStub(channel).List(health_pb2.HealthListRequest()).statuses
    assert set(statuses) == {"", "equipoise.v1.PolicyService"}


@pytest.mark.parametrize("kind", ["health", "reflection"])
def test_open_streams_of_tools_do_not_delay_a_stop(silence: Silence, kind: str) -> None:
    with (
        serve(drain_grace_s=600.0) as server,
        grpc.insecure_channel(server.address, options=OWN_CONNECTION) as channel,
    ):
        if kind == "health":
            watch = HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        else:
            asking = reflection_pb2.ServerReflectionRequest(list_services="")
            watch = ServerReflectionStub(channel).ServerReflectionInfo(_then(asking, silence))
            next(watch)
        assert server.stop() == 0
        if kind == "health":
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def _then(first: object, silence: Silence) -> Iterator[object]:
    yield first
    yield from silence


def test_a_client_that_leaves_during_a_large_answer_is_no_bug_of_the_server() -> None:
    with serve() as server, PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name="large", num_examples=4_000_000))
        for _ in range(16):
            with grpc.insecure_channel(server.address, options=OWN_CONNECTION) as channel:
                answers = PolicyServiceStub(channel).ReadWeights(pb.ReadWeightsRequest(policy="large"))
                next(answers)
                answers.cancel()
        until(lambda: calls_ended(server, "ReadWeights", code="Canceled") == 16, what="the server knows that they left")
        assert "unexpected error" not in server.log
        assert "Traceback" not in server.log
