"""Tokens come and go under a running server; quotas hold tenants to their share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import grpc
import pytest

from equipoise import PolicyAdmin, PolicyClient, PolicySpec, Security, Source
from equipoise.errors import AccessDeniedError, EquipoiseError, OverloadedError, QuotaError
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise_server.security import Scope
from tests.e2e.security.conftest import TENANTS, Tokens
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return Tokens(tmp_path_factory.mktemp("tokens") / "tokens.toml")


@pytest.fixture(scope="module")
def server(tokens: Tokens) -> Iterator[ServerProcess]:
    with serve(tokens_file=tokens.file) as process:
        yield process


def eventually(attempt: Callable[[], object], *, timeout_s: float = 30) -> None:
    """Tries until it raises nothing."""
    end = monotonic() + timeout_s
    while True:
        try:
            attempt()
            return
        except (AssertionError, EquipoiseError):
            if monotonic() > end:
                raise
            sleep(0.05)


def test_a_new_token_is_good_without_restart_and_its_streams_end_when_it_is_taken_back(
    server: ServerProcess, tokens: Tokens
) -> None:
    before = tokens.file.read_text()
    security = Security(token=tokens.add("red"))
    with PolicyAdmin(server.address, security=security) as admin:
        eventually(lambda: admin.create(PolicySpec(name="red-s", num_examples=4)))
        header = security.headers()
        with grpc.insecure_channel(server.address) as channel:
            stub = PolicyServiceStub(channel)
            opening = pb.ExchangeRequest(open=pb.OpenRequest(policy="red-s", trainer_id="t"))
            exchange = stub.Exchange(_then_silence(opening), metadata=header)
            watch = stub.WatchPolicy(pb.WatchPolicyRequest(policy="red-s"), metadata=header)
            assert next(exchange).opened.num_examples == 4
            assert next(watch).status.version == 0
            tokens.file.write_text(before)
            for stream in (exchange, watch):
                with pytest.raises(grpc.RpcError) as caught:
                    next(stream)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "taken back" in (caught.value.details() or "")
        with pytest.raises(AccessDeniedError):
            admin.get("red-s")


def test_a_trainer_whose_token_is_replaced_goes_on(server: ServerProcess, tokens: Tokens, tmp_path: Path) -> None:
    held = tmp_path / "token"
    before = tokens.file.read_text()
    held.write_text(tokens.add("red"))
    with PolicyClient(
        server.address, policy="red-r", num_examples=4, security=Security(token_file=held), timeout=PATIENT
    ) as client:
        with PolicyAdmin(server.address, security=Security(token_file=held)) as admin:
            eventually(admin.server_info)
        assert client.step([0], contributions=[1.0]).source is Source.SERVED
        tokens.file.write_text(before)
        eventually(lambda: _assert_lost(client))
        held.write_text(tokens.add("red") + "\n")
        eventually(lambda: _assert_served(client))
        assert client.stats.reconnects >= 1
        assert client.flush(durable=True)


def test_a_tokens_file_that_is_half_written_changes_nothing(server: ServerProcess, tokens: Tokens) -> None:
    token = tokens.add("blue")
    whole = tokens.file.read_text()
    with PolicyAdmin(server.address, security=Security(token=token)) as admin:
        eventually(admin.server_info)
        tokens.file.write_text(whole[: len(whole) - 40])
        eventually(lambda: _assert_in("those known before still hold", server.log))
        admin.server_info()
        tokens.file.write_text(whole)
    assert token not in server.log


def test_quotas_hold_a_tenant_to_his_share(server: ServerProcess, tokens: Tokens) -> None:
    security = Security(token=tokens.add("small"))
    with PolicyAdmin(server.address, security=security) as admin:
        eventually(admin.server_info)
        with pytest.raises(QuotaError, match=r"101 examples more than the 0 .* max_examples, 100"):
            admin.create(PolicySpec(name="small-big", num_examples=101))
        admin.create(PolicySpec(name="small-1", num_examples=60))
        with pytest.raises(QuotaError, match="41 examples more than the 60") as caught:
            admin.create(PolicySpec(name="small-2", num_examples=41))
        assert caught.value.reason == "QUOTA_EXAMPLES"
        with pytest.raises(QuotaError):
            admin.fork("small-1", "small-2")
        admin.create(PolicySpec(name="small-2", num_examples=40))
        admin.create(PolicySpec(name="small-2", num_examples=40))  # it exists: nothing is added
        with pytest.raises(QuotaError, match=r"2 policies are stored.* max_policies is 2") as caught:
            admin.create(PolicySpec(name="small-3", num_examples=1))
        assert caught.value.reason == "QUOTA_POLICIES"
        admin.delete("small-2")
        admin.create(PolicySpec(name="small-3", num_examples=1))
        with contextlib.ExitStack() as open_streams:
            channel = open_streams.enter_context(grpc.insecure_channel(server.address))
            stub = PolicyServiceStub(channel)
            watches = [
                stub.WatchPolicy(pb.WatchPolicyRequest(policy="small-1"), metadata=security.headers()) for _ in range(2)
            ]
            for watch in watches:
                next(watch)
            with pytest.raises(OverloadedError, match="2 streams are open, the tenant's quota max_streams"):
                next(admin.watch("small-1"))
            watches[0].cancel()
            eventually(lambda: next(admin.watch("small-1")))


def test_a_trainer_over_quota_is_told_at_once(server: ServerProcess, tokens: Tokens) -> None:
    token = tokens.add("small", Scope.TRAIN)
    with PolicyAdmin(server.address, security=Security(token=token)) as admin:
        eventually(admin.server_info)
    with (
        PolicyClient(
            server.address, policy="small-9", num_examples=1000, security=Security(token=token), timeout=PATIENT
        ) as client,
        pytest.raises(QuotaError),
    ):
        client.step([0], contributions=[1.0])


@pytest.mark.slow  # its parts have tests of their own
def test_a_server_with_a_bad_tokens_file_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(TENANTS + '[[tokens]]\ntenant = "red"\nid = "00"\nsha256 = "hunter2"\nscopes = ["reed"]\n')
    with pytest.raises(EquipoiseError, match="tokens_file: ") as caught, serve(tokens_file=file):
        pass
    for said in ("tokens.0.id", "tokens.0.sha256", "tokens.0.scopes"):
        assert said in str(caught.value)
    assert "hunter2" not in str(caught.value)


def _then_silence(opening: pb.ExchangeRequest) -> Iterator[pb.ExchangeRequest]:
    yield opening
    sleep(60)


def _assert_lost(client: PolicyClient) -> None:
    assert client.step([0], contributions=[1.0]).source is not Source.SERVED


def _assert_served(client: PolicyClient) -> None:
    assert client.step([0], contributions=[1.0]).source is Source.SERVED


def _assert_in(text: str, log: str) -> None:
    assert text in log
