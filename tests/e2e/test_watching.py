"""Whoever watches a server learns how it is at every moment of its life, also when something is wrong with it."""

import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from equipoise import PolicyAdmin, PolicyClient, PolicySpec, Security
from equipoise.errors import OverloadedError
from equipoise.testing import ServerProcess, serve
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc
from equipoise_server.store.redis_binary import find_redis_server
from tests.e2e.faults.proxy import until
from tests.e2e.faults.redis_server import RedisServer, running
from tests.e2e.security.authority import Authority
from tests.e2e.security.conftest import Tokens
from tests.e2e.watched import page, series
from tests.patience import PATIENT
from tests.ports import free_port


@pytest.fixture(scope="module")
def watched() -> Iterator[ServerProcess]:
    with serve() as process:
        yield process


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path / "redis") as server:
        yield server


def test_a_server_that_loads_lives_and_says_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own Redis takes as long as a test wants it to."""
    real, go = find_redis_server(), tmp_path / "go"
    slow = tmp_path / "bin" / "redis-server"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] || while [ ! -e {go} ]; do sleep 0.05; done\nexec {real} "$@"\n')
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(slow.parent), prepend=":")
    address = f"127.0.0.1:{free_port()}"
    served, done = threading.Event(), threading.Event()

    def run() -> None:
        with serve(metrics_listen=address):
            served.set()
            done.wait(300)

    def answers() -> bool:
        try:
            return page(address, "/livez") == (200, "ok\n")
        except OSError:
            return False

    with ThreadPoolExecutor(1) as threads:
        running_server = threads.submit(run)
        try:
            until(lambda: answers() or running_server.done(), what="it lives")
            code, text = page(address, "/readyz?verbose")
            assert code == 503
            assert "[-]startup failed: the server is starting" in text
            assert "[-]redis failed: redis has not been reached yet: its own Redis is loading its file" in text
            told = series(address)
            assert (told["ready"], told['not_ready{reason="startup"}'], told['not_ready{reason="redis"}']) == (0, 1, 1)
            assert not served.is_set()
            go.touch()
            until(lambda: page(address, "/readyz")[0] == 200 or running_server.done(), what="it is ready")
            assert series(address)["ready"] == 1
        finally:
            go.touch()
            done.set()
        running_server.result(60)


def test_a_redis_that_cannot_be_reached_is_told_and_kills_nobody() -> None:
    with serve(redis_url=f"redis://127.0.0.1:{free_port()}") as server:
        until(lambda: "refused" in page(server.metrics_address, "/readyz")[1], what="the reason")
        assert page(server.metrics_address, "/livez") == (200, "ok\n")
        told = series(server.metrics_address)
        assert (told["ready"], told['not_ready{reason="redis"}'], told["redis_up"]) == (0, 1, 0)
        assert told['redis_errors_total{kind="refused"}'] > 0


def test_a_stalled_redis_shows_as_the_lag_of_the_policy_that_steps(redis: RedisServer) -> None:
    with (
        serve(redis_url=redis.url, redis_timeout_s=0.3) as server,
        PolicyClient(server.address, policy="stuck", num_examples=4, timeout=PATIENT) as stuck,
        PolicyClient(server.address, policy="idle", num_examples=4, timeout=PATIENT) as idle,
    ):
        for client in (stuck, idle):
            client.step([0, 1], contributions=[1.0, -1.0])
            assert client.flush(30, durable=True)
        with redis.paused():
            stuck.step([0, 1], contributions=[1.0, -1.0])
            until(
                lambda: series(server.metrics_address)['durability_lag_seconds{policy="stuck"}'] > 1,
                what="the lag grows",
            )
            told = series(server.metrics_address)
            assert told['durability_lag_seconds{policy="idle"}'] == 0
            assert told["unpersisted_updates"] == 1
            assert page(server.metrics_address, "/livez")[0] == page(server.metrics_address, "/readyz")[0] == 200
        until(
            lambda: series(server.metrics_address)['durability_lag_seconds{policy="stuck"}'] == 0,
            what="the lag ends",
        )


def test_plain_probes_stand_beside_mutual_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("server")
    with serve(tls_certificate=files.certificate, tls_key=files.key, tls_client_ca=authority.file) as server:
        assert page(server.metrics_address, "/livez") == (200, "ok\n")
        until(lambda: page(server.metrics_address, "/readyz") == (200, "ok\n"), what="ready")


def test_a_stop_is_told_before_it_happens() -> None:
    with serve(drain_delay_s=60) as server, ThreadPoolExecutor(1) as threads:
        until(lambda: page(server.metrics_address, "/readyz")[0] == 200, what="ready")
        process = server._process
        assert process is not None
        threads.submit(process.terminate)
        until(lambda: page(server.metrics_address, "/readyz") == (503, "the server is stopping\n"), what="the stop")
        told = series(server.metrics_address)
        assert (told["draining"], told['not_ready{reason="drain"}'], told["ready"]) == (1, 1, 0)
        assert page(server.metrics_address, "/livez")[0] == 200
        process.kill()


def test_refusals_are_counted_once_by_reason_in_calls_and_in_streams(watched: ServerProcess) -> None:
    def counted() -> dict[str, float]:
        told = series(watched.metrics_address)
        return {
            reason: told[f'{family}_total{{reason="{reason}"}}']
            for family, reason in (
                ("rejected_values", "NON_FINITE_STAT"),
                ("rejected_values", "UNUSABLE_STATISTICS"),
                ("rejected_values", "INVALID_POLICY_NAME"),
                ("refusals", "POLICY_NOT_FOUND"),
            )
        }

    nan, one = np.array([np.nan], "<f4").tobytes(), np.ones(1, "<f4").tobytes()
    ids = np.zeros(1, "<u8").tobytes()
    with PolicyAdmin(watched.address) as admin:
        admin.create(PolicySpec(name="refusing", num_examples=2))
    before = counted()
    with grpc.insecure_channel(watched.address) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        messages = (
            pb.ExchangeRequest(open=pb.OpenRequest(policy="refusing", trainer_id="t")),
            pb.ExchangeRequest(step=pb.StepRequest(sequence=1, example_ids=ids, contributions=nan)),
            pb.ExchangeRequest(step=pb.StepRequest(sequence=2, example_ids=ids, losses=one)),  # no contributions
        )
        answers = list(stub.Exchange(iter(messages)))
        assert [answer.step.outcome for answer in answers[1:]] == [pb.OUTCOME_REFUSED] * 2
        for call in (
            lambda: stub.UpdateWeights(
                pb.UpdateWeightsRequest(policy="refusing", step=pb.StepRequest(example_ids=ids, contributions=nan))
            ),
            lambda: stub.GetPolicy(pb.GetPolicyRequest(policy="No Name")),
            lambda: stub.GetPolicy(pb.GetPolicyRequest(policy="nobody-s")),
        ):
            with pytest.raises(grpc.RpcError):
                call()
    now = counted()
    assert {reason: now[reason] - before[reason] for reason in now} == {
        "NON_FINITE_STAT": 2,
        "UNUSABLE_STATISTICS": 1,
        "INVALID_POLICY_NAME": 1,
        "POLICY_NOT_FOUND": 1,
    }


def test_connected_trainers_and_their_last_step_are_told(watched: ServerProcess) -> None:
    address = watched.metrics_address
    until(lambda: series(address)["clients"] == 0, what="those of other tests have left")
    with PolicyClient(watched.address, policy="trained", num_examples=4, timeout=PATIENT) as client:
        client.step([0, 1], contributions=[1.0, -1.0])
        told = series(address)
        assert (told['trainers{policy="trained"}'], told["clients"]) == (1, 1)
        assert told['last_step_timestamp_seconds{policy="trained"}'] > 0
    until(lambda: series(address)["clients"] == 0, what="nobody is connected")
    told = series(address)
    assert told["clients_remembered"] >= 1
    assert told['trainers{policy="trained"}'] == 0


def test_an_unused_policy_stays_on_the_board_until_it_is_deleted() -> None:
    with serve(policy_idle_s=0.5) as server:
        with PolicyClient(server.address, policy="p", num_examples=4, timeout=PATIENT) as client:
            client.step([0, 1], contributions=[1.0, -1.0])
        until(lambda: series(server.metrics_address)["policies_resting"] == 1, what="it rests")
        told = series(server.metrics_address)
        assert (told["policies"], told['policy_version{policy="p"}'], told['table_bytes{policy="p"}']) == (0, 1, 0)
        assert told['updates_total{policy="p",result="applied"}'] == 1
        assert told['policies_left_total{reason="UNLOADED"}'] == 1
        with PolicyAdmin(server.address) as admin:
            admin.delete("p")
        assert not [name for name in series(server.metrics_address) if '"p"' in name]


def test_redirects_and_moves_are_counted_and_no_policy_shows_twice(redis: RedisServer) -> None:
    shared = {"redis_url": redis.url, "spread_policies": False}
    with serve(**shared) as first, serve(**shared) as second:
        with PolicyClient(first.address, policy="p", num_examples=4, timeout=PATIENT) as client:
            client.step([0, 1], contributions=[1.0, -1.0])
        with PolicyClient(second.address, policy="p", when_lost="wait") as client:
            client.step([0, 1], contributions=[1.0, -1.0])
        told = series(second.metrics_address)
        assert told['refusals_total{reason="NOT_OWNER"}'] == told['failed_loads_total{reason="NOT_OWNER"}'] > 0
        assert 'policy_version{policy="p"}' not in told
        assert first.stop() == 0
        with PolicyClient(second.address, policy="p", when_lost="wait") as client:
            client.step([0, 1], contributions=[1.0, -1.0])
        assert series(second.metrics_address)['policy_version{policy="p"}'] == 3


def test_tenants_limits_and_reloads_are_told(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path / "tokens.toml")
    token = tokens.add("red")
    with serve(tokens_file=tokens.file, max_streams=1) as server:
        address = server.metrics_address
        before = series(address)
        assert before['tenant_updates_total{tenant="red"}'] == 0
        assert before['reloads_total{file="tokens",result="ok"}'] == 0
        security = Security(token=token)
        with PolicyClient(server.address, policy="red-1", num_examples=4, security=security, timeout=PATIENT) as client:
            client.step([0, 1], contributions=[1.0, -1.0])
            told = series(address)
            assert told['tenant_streams{tenant="red"}'] == told['tenant_policies{tenant="red"}'] == 1
            assert told['tenant_examples_total{tenant="red"}'] == 2
            assert (
                told['tenant_table_bytes{tenant="red"}'] == told['device_memory_bytes{device="cpu",state="tables"}'] > 0
            )
            assert (told["active_streams"], told["active_streams_limit"]) == (1, 1)
        whole = tokens.file.read_text()
        tokens.file.write_text(whole[:-40])
        until(lambda: series(address)['reloads_total{file="tokens",result="failed"}'] == 1, what="it failed")
        tokens.file.write_text(whole)
        until(lambda: series(address)['reloads_total{file="tokens",result="ok"}'] == 1, what="it was read")


def test_the_servers_own_redis_is_told(watched: ServerProcess) -> None:
    with PolicyClient(watched.address, policy="own", num_examples=4, timeout=PATIENT) as client:
        client.step([0, 1], contributions=[1.0, -1.0])
        client.flush(30, durable=True)
    until(lambda: series(watched.metrics_address)["own_redis_file_bytes"] > 0, what="its files")
    told = series(watched.metrics_address)
    assert told["own_redis_memory_bytes"] > 1 << 20
    assert told["own_redis_disk_free_bytes"] > 0
    assert told["own_redis_exits_total"] == 0


def test_policies_that_come_and_go_while_it_is_scraped_are_never_half_there(watched: ServerProcess) -> None:
    """And whatever is scraped is well-formed, as `series` finds every one."""
    stop = threading.Event()

    def come_and_go(number: int) -> None:
        with PolicyAdmin(watched.address) as admin:
            for turn in range(15):
                name = f"short.{number}-{turn}_x"
                admin.create(PolicySpec(name=name, num_examples=4))
                admin.delete(name)

    with ThreadPoolExecutor(3) as threads:
        working = [threads.submit(come_and_go, number) for number in range(3)]
        while not all(each.done() for each in working):
            told = series(watched.metrics_address)
            assert told["policies_hidden"] >= 0
        stop.set()
        for each in working:
            each.result()
    assert not [name for name in series(watched.metrics_address) if "short." in name]


def test_a_device_without_room_is_counted(watched: ServerProcess) -> None:
    before = series(watched.metrics_address)['refusals_total{reason="DEVICE_FULL"}']
    with PolicyAdmin(watched.address) as admin, pytest.raises(OverloadedError):
        admin.create(PolicySpec(name="huge", num_examples=4_000_000_000))
    assert series(watched.metrics_address)['refusals_total{reason="DEVICE_FULL"}'] == before + 1
