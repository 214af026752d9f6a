"""Several processes as one server: one port, exact steps, one `/metrics`, one signal to end, and one that dies."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from equipoise import Outcome, PolicyAdmin, PolicyClient
from equipoise.errors import PolicyNotFoundError, UnavailableError
from equipoise_server.processes.child import MODULE, SILENT
from tests.e2e.faults.gauges import gauges
from tests.e2e.faults.proxy import until as within
from tests.e2e.faults.redis_server import RedisServer
from tests.patience import PATIENT
from tests.ports import free_port
from tests.servers import ServerProcess, serve

POLICIES = tuple(f"p{number}" for number in range(8))
STEPS = 60

MARK = "TEST_OF_PROCESSES"
"""Variable in the environment of the processes that one test starts."""

until = partial(within, within_s=400.0)  # what a process that is replaced loads takes a busy machine minutes


def several(**settings: Any) -> Any:
    return serve(processes=2, **{"listen": "127.0.0.1:0"} | settings)


def three_ports() -> int:
    """The first of three ports in a row that no other test gets."""
    while True:
        first, second, third = free_port(), free_port(), free_port()
        if (second, third) == (first + 1, first + 2):
            return first


def children(server: ServerProcess) -> list[psutil.Process]:
    return [each for each in psutil.Process(server.pid).children() if MODULE in each.cmdline()]


class Trainers:
    """One for each policy, in a thread of its own.

    Every step must be answered as the one that it is: none is lost, and none is applied twice.

    Attributes:
        made: steps that were answered so far, of each.
    """

    def __init__(self, clients: list[PolicyClient], pool: ThreadPoolExecutor) -> None:
        self.made = [0] * len(clients)
        self._clients = clients
        self._pool = pool
        self._randoms = [np.random.default_rng(number) for number in range(len(clients))]

    def start(self, steps: int = STEPS) -> list[Future[None]]:
        """Lets each make so many steps more, one after another."""
        return [self._pool.submit(self._work, number, steps) for number in range(len(self._clients))]

    def make(self, steps: int = STEPS) -> None:
        """The same, and waits for all."""
        finish(self.start(steps))

    def under_way(self) -> bool:
        """Whether they have begun."""
        return sum(self.made) > 30

    def _work(self, number: int, steps: int) -> None:
        for _ in range(steps):
            contributions = self._randoms[number].normal(size=3).astype(np.float32)
            result = self._clients[number].step([0, 1, 2], contributions=contributions)
            self.made[number] += 1
            assert result.outcome in (Outcome.APPLIED, Outcome.DUPLICATE)
            assert result.version == self.made[number]


def finish(jobs: list[Future[None]]) -> None:
    for job in jobs:
        job.result()


@contextmanager
def training(server: ServerProcess) -> Iterator[Trainers]:
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                PolicyClient(
                    server.address, policy=name, num_examples=4, trainer_id="t", when_lost="wait", timeout=PATIENT
                )
            )
            for name in POLICIES
        ]
        yield Trainers(clients, stack.enter_context(ThreadPoolExecutor(len(clients))))


@pytest.fixture(scope="module")
def expected() -> dict[str, list[float]]:
    """The weights after `STEPS` steps that one process alone has."""
    with serve() as alone, training(alone) as trainers:
        trainers.make()
        return weights(alone)


def weights(server: ServerProcess) -> dict[str, list[float]]:
    found = {}
    for name in POLICIES:
        with PolicyClient(server.address, policy=name, when_lost="wait", timeout=PATIENT) as client:
            found[name] = client.read_weights().tolist()
    return found


def versions(server: ServerProcess) -> dict[str, int]:
    with PolicyAdmin(server.address, timeout=60) as admin:
        return {name: _version(admin, name) for name in POLICIES}


def check(server: ServerProcess, expected: dict[str, list[float]]) -> None:
    """Every step was applied once, in its order: versions count them, and weights are bit for bit one process's."""
    assert versions(server) == dict.fromkeys(POLICIES, STEPS)
    assert weights(server) == expected


def page(server: ServerProcess, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}/{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def homes(server: ServerProcess) -> dict[str, int]:
    """Which process has loaded each policy last."""
    events = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return {event["policy"]: event["process"] for event in events if event["event"] == "loaded"}


def ended(process: psutil.Process) -> bool:
    """Whether it has, also where nobody takes note of processes whose parent has ended (a zombie)."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class SideDoor(HTTPConnection):
    """Where a process tells its parent."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__("localhost")
        listening = {each.laddr for each in process.net_connections(kind="unix") if each.laddr.endswith(".sock")}
        [self._path] = (path for path in listening if Path(path).stem.isdigit())

    def connect(self) -> None:
        self.sock = socket(AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


def asked(process: psutil.Process, path: str) -> tuple[int, bytes]:
    """Status and page of one process's side door."""
    door = SideDoor(process)
    try:
        door.request("GET", path)
        answer = door.getresponse()
        return answer.status, answer.read()
    finally:
        door.close()


def all_ready(server: ServerProcess) -> bool:
    """Whether each of both says so; the server does as soon as one does."""
    return all(asked(child, "/readyz")[0] == 200 for child in children(server)) and page(server, "readyz")[0] == 200


def told(process: psutil.Process, name: str) -> float:
    """A metric of one process without labels."""
    families = json.loads(asked(process, "/metrics")[1])
    [value] = (value for *_, rows in families for row, _, value in rows if row == f"equipoise_server_{name}")
    return float(value)


def test_steps_are_exact_go_to_all_processes_and_are_counted_together(expected: dict[str, list[float]]) -> None:
    with several() as server, training(server) as trainers:
        trainers.make(20)
        assert versions(server) == dict.fromkeys(POLICIES, 20)
        until(lambda: list(homes(server).values()).count(0) == 4, what="both have their share")
        until(lambda: gauges(server).get("policies") == len(POLICIES), what="nothing moves")
        trainers.make(40)
        check(server, expected)
        for name in ("batch_examples_sum", "batch_steps_count", "policies"):
            parts = [told(child, name) for child in children(server)]
            assert all(parts), name
            until(lambda: gauges(server).get(name) == sum(parts), what=f"{name} is the sum of {parts}")  # noqa: B023
        whole = gauges(server)
        assert whole["clients"] >= len(POLICIES)
        assert (whole["processes_running"], whole["processes_wanted"]) == (2, 2)
        assert whole["batch_examples_sum"] >= len(POLICIES) * STEPS * 3


def test_all_speak_for_the_server() -> None:
    with several() as server:
        until(lambda: all_ready(server), what="they have reached Redis")
        until(lambda: page(server, "livez") == (200, "ok\n"), what="both answer")
        question = health_pb2.HealthCheckRequest(service="equipoise.v1.PolicyService")
        for _ in range(6):  # each connection meets one of the two
            with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(question, timeout=60)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        first, _ = children(server)
        first.suspend()
        until(lambda: "does not answer" in page(server, "livez")[1], what="it is noticed")
        until(lambda: page(server, "readyz")[0] == 200, what="the other one serves")
        assert "equipoise_server_policies" in page(server, "metrics")[1]
        first.resume()
        until(lambda: page(server, "livez")[0] == 200, what="it answers again")


def test_redis_knows_of_both_before_they_serve(tmp_path: Path) -> None:
    """One without a heartbeat counts as gone: the other would take what it has just acquired."""
    redis = RedisServer(tmp_path)
    redis.start()
    try:
        with several(redis_url=redis.url, redis_timeout_s=60, owner_timeout_s=600) as server, redis.client() as client:
            addresses = set(client.scan_iter("*:address:*", count=1000))
            assert len(addresses) == 2
            assert not any(key.decode().endswith(server.address) for key in addresses)  # each has its own
            assert len(set(client.scan_iter("*:server:*", count=1000))) == 2
    finally:
        redis.kill()


def test_a_killed_process_is_replaced_and_its_policies_go_on(expected: dict[str, list[float]]) -> None:
    with several() as server, training(server) as trainers:
        until(lambda: all_ready(server), what="they have reached Redis")
        doomed, other = children(server)
        jobs = trainers.start()
        until(trainers.under_way)
        before = gauges(server).get("batch_steps_count", 0.0)
        doomed.kill()
        status, why = page(server, "readyz")
        assert status == 200 or SILENT in why  # on a machine that stands still, the other one may be late
        finish(jobs)
        check(server, expected)
        until(lambda: gauges(server)["processes_running"] == 2, what="it is replaced")
        assert other in children(server)
        assert doomed not in children(server)
        after = gauges(server)
        assert after["process_exits_total"] == 1
        assert after["batch_steps_count"] >= before


def test_processes_end_with_their_parent_also_one_that_hangs() -> None:
    with several() as server:
        first, second = children(server)
        first.suspend()
        server.kill()
        until(lambda: ended(first) and ended(second), what="they have ended")


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_when_all_are_killed_under_load(expected: dict[str, list[float]]) -> None:
    with several(listen=f"127.0.0.1:{three_ports()}") as server, training(server) as trainers:
        first, second = children(server)
        jobs = trainers.start()
        until(trainers.under_way)
        server.kill()
        until(lambda: ended(first) and ended(second), what="they have ended")
        server.start()
        finish(jobs)
        check(server, expected)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_a_stop_under_load(expected: dict[str, list[float]]) -> None:
    with several(listen=f"127.0.0.1:{three_ports()}") as server, training(server) as trainers:
        descendants = psutil.Process(server.pid).children(recursive=True)
        assert len(descendants) >= 3  # both, and Redis
        jobs = trainers.start()
        until(trainers.under_way)
        assert server.stop() == 0
        assert not any(each.is_running() for each in descendants)
        stopped = [json.loads(line) for line in server.log.splitlines() if '"stopped"' in line]
        assert [event.get("process") for event in stopped][2:] == [None]  # the parent behind both
        server.start()
        finish(jobs)
        check(server, expected)


@pytest.mark.slow
def test_the_port_serves_while_a_process_hangs_and_the_process_is_replaced(expected: dict[str, list[float]]) -> None:
    """Its policies go to the other one, once it has sent no heartbeat for `owner_timeout_s`.

    Who connects anew may meet it until it is ended, and then tries again.
    """
    with several() as server, training(server) as trainers:
        trainers.make(20)
        until(lambda: set(homes(server).values()) == {0, 1}, what="both have policies")
        hung, other = children(server)
        hung.suspend()
        trainers.make(40)
        assert other in children(server)
        until(lambda: not hung.is_running(), what="it is ended")
        until(lambda: gauges(server)["processes_running"] == 2, what="it is replaced")
        assert other in children(server)
        assert gauges(server)["process_exits_total"] == 1
        until(lambda: page(server, "livez") == (200, "ok\n"), what="all is well")
        check(server, expected)


def test_what_cannot_start_says_why_and_leaves_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("nonsense")
    monkeypatch.setenv(MARK, str(tmp_path))
    with pytest.raises(UnavailableError, match=r"(?s)tokens_file.*before all served"), several(tokens_file=tokens):
        pass
    assert not [each for each in psutil.process_iter() if _mark(each) == str(tmp_path)]


def test_a_port_that_is_taken_is_refused() -> None:
    with socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=r"listen: .* cannot be bound"), several(listen=taken):
            pass


def _version(admin: PolicyAdmin, name: str) -> int:
    try:
        return admin.get(name).version
    except PolicyNotFoundError:  # its trainer has not come yet
        return 0


def _mark(process: psutil.Process) -> str:
    """Which test's server has started one of several processes; empty: it is another program, or has ended."""
    try:
        return str(process.environ().get(MARK, "")) if MODULE in process.cmdline() else ""
    except psutil.Error:
        return ""
