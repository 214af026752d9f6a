"""What deploy/operations.md says is done: a service that runs is backed up, thrown away, and comes back exactly."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import grpc
import pytest

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc as rpc
from tests.debian import redis_with_tls
from tests.e2e.faults.proxy import until
from tests.e2e.faults.redis_server import RedisServer, running
from tests.e2e.releases.trainer import Trainer, named, steps
from tests.servers import ServerProcess, zygote

ROOT = Path(__file__).parents[2]
RULES = ("ema_sign", "exponentiated_gradient", "boltzmann")
IN_A_CLUSTER = ("kubectl ", "helm ")
BEFORE, DURING = 40, 20
"""Steps that a policy has had at least before its backup, and makes while it is made and afterwards."""
TIMEOUT_S = 120


@pytest.fixture(params=["6.2", pytest.param("7", marks=pytest.mark.slow)])
def redis_release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which Redis this machine has. That of release 7 keeps its append-only file in pieces, in a folder."""
    release: str = request.param
    if release == "7":
        redis_with_tls(what="a backup of Redis 7").put_on_path(monkeypatch)
        monkeypatch.setattr("equipoise_server.store.redis_binary.MINIMUM_VERSION", (7, 0))
    return release


@cache
def blocks() -> list[str]:
    """The commands of the page, block by block, that need no cluster."""
    text = (ROOT / "deploy" / "operations.md").read_text(encoding="utf-8")
    found: list[str] = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    return [block for block in found if not block.startswith(IN_A_CLUSTER)]


def run(first: str, *, folder: Path, **variables: object) -> str:
    """Runs the block that begins so, in a folder; what it said."""
    (block,) = [block for block in blocks() if block.startswith(first)]
    environment = {
        **os.environ,
        "PATH": f"{os.environ['PATH']}:{Path(sys.executable).parent}",
        **{name: str(value) for name, value in variables.items()},
    }
    done = subprocess.run(
        ["bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Training:
    """A trainer of each rule's policy, in a thread of its own, and what it was answered."""

    def __init__(self, server: ServerProcess) -> None:
        self.answers: dict[str, list[tuple[pb.StepRequest, pb.StepResponse]]] = {rule: [] for rule in RULES}
        self.durable = dict.fromkeys(RULES, 0)
        """The last step of each that the store has, as the trainer was told."""
        self.statuses: dict[str, pb.PolicyStatus] = {}
        self._server = server
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._train)

    def __enter__(self) -> "Training":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def versions(self) -> dict[str, int]:
        """How many steps of each were answered."""
        return {rule: len(answers) for rule, answers in self.answers.items()}

    def wait(self, count: int) -> None:
        """Returns once each policy has had so many steps more."""
        start = self.versions
        until(
            lambda: all(self.versions[rule] >= start[rule] + count for rule in RULES),
            within_s=TIMEOUT_S,
            what=lambda: f"{count} steps more than {start}; {self.versions}",
        )

    def _train(self) -> None:
        with grpc.insecure_channel(self._server.address) as channel:
            trainer = Trainer(rpc.PolicyServiceStub(channel))
            runs = {rule: steps(rule, first=1, batch=32) for rule in RULES}
            for rule in RULES:
                trainer.create(rule)
            while not self._ended.is_set():
                for rule in RULES:
                    step = next(runs[rule])
                    answer = trainer.step(named(rule), step)
                    self.durable[rule] = answer.durable_sequence
                    self.answers[rule].append((step, answer))
            self.statuses = {rule: trainer.status(named(rule)) for rule in RULES}


def assert_goes_on(server: ServerProcess, training: Training, *, at_least: dict[str, int]) -> None:
    """Each policy is what it was at a step, not before those of `at_least`, and goes on from there as it did then."""
    with grpc.insecure_channel(server.address) as channel:
        trainer = Trainer(rpc.PolicyServiceStub(channel))
        for rule in RULES:
            # The server that owned it said a moment ago that it lives: so the store has it, until that expires.
            until(lambda rule=rule: is_served(trainer, named(rule)), within_s=TIMEOUT_S, what=f"{rule} is served")  # type: ignore[misc]
            version = trainer.status(named(rule)).version
            assert at_least[rule] <= version < training.versions[rule], "it is the state of the backup"
            again = trainer.step(named(rule), training.answers[rule][version - 1][0])
            assert again.outcome == pb.OUTCOME_DUPLICATE
            for step, expected in training.answers[rule][version:]:
                answer = trainer.step(named(rule), step)
                assert (answer.outcome, answer.version) == (pb.OUTCOME_APPLIED, expected.version)
                assert answer.weights == expected.weights
            end, expected_end = trainer.status(named(rule)), training.statuses[rule]
            for name in ("uid", "version", "effective_examples", "sim", "guard_strength", "compression_ratio"):
                assert getattr(end, name) == getattr(expected_end, name), name


def is_served(trainer: Trainer, policy: str) -> bool:
    try:
        return bool(trainer.status(policy).version)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:  # NOT_OWNER
            raise
        return False


def backed_up(redis: RedisServer, folder: Path) -> Path:
    """A backup of a Redis."""
    run("redis-cli", folder=folder, REDIS_URL=redis.url)
    (found,) = folder.glob("equipoise-*.rdb")
    return found


@contextmanager
def serving(folder: Path, **settings: object) -> Iterator[ServerProcess]:
    server = ServerProcess(zygote(), folder, **settings)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def test_a_redis_of_yours_is_backed_up_while_trainers_go_on_and_comes_back_exactly(
    tmp_path: Path, redis_release: str
) -> None:
    with (
        running(tmp_path / "redis") as redis,
        serving(tmp_path / "server", redis_url=redis.url) as server,
        Training(server) as training,
    ):
        training.wait(BEFORE)
        before = dict(training.durable)
        backup = backed_up(redis, tmp_path)
        training.wait(DURING)
    shutil.rmtree(tmp_path / "redis")
    shutil.rmtree(tmp_path / "server")
    restored = tmp_path / "restored"
    restored.mkdir()
    run('cp "$BACKUP"', folder=tmp_path, BACKUP=backup, REDIS_DIR=restored)
    with running(restored) as redis, serving(tmp_path / "server", redis_url=redis.url) as server:
        assert_goes_on(server, training, at_least=before)
        redis.kill()  # what it has learnt since is in its file, behind the backup
        redis.start()
        server.kill()
        server.start()
        with grpc.insecure_channel(server.address) as channel:
            trainer = Trainer(rpc.PolicyServiceStub(channel))
            assert {rule: trainer.status(named(rule)).version for rule in RULES} == training.versions


@pytest.mark.parametrize("of_a_redis", [False, True], ids=["its folder", "a file of a Redis"])
def test_a_data_directory_is_backed_up_while_trainers_go_on_and_comes_back_exactly(
    tmp_path: Path, redis_release: str, of_a_redis: bool
) -> None:
    data_dir, moved = tmp_path / "data", tmp_path / "moved"
    with serving(tmp_path / "server", data_dir=data_dir) as server:
        with Training(server) as training:
            training.wait(BEFORE)
            before = dict(training.durable)
            said = run("cp --archive", folder=tmp_path, DATA_DIR=data_dir)
            training.wait(DURING)
        assert all(named(rule) in said for rule in RULES)
    assert (data_dir / "appendonlydir").exists() == (redis_release == "7")
    run("rm -rf", folder=tmp_path, DATA_DIR=data_dir)
    if of_a_redis:  # from a server's own to one of yours, and back
        shutil.copytree(data_dir, moved)
        with running(moved) as redis:
            backup = backed_up(redis, tmp_path)
        shutil.rmtree(data_dir)
        data_dir.mkdir(mode=0o700)
        run('cp "$BACKUP"', folder=tmp_path, BACKUP=backup, REDIS_DIR=data_dir)
    with serving(tmp_path / "again", data_dir=data_dir) as server:
        assert_goes_on(server, training, at_least=before)


def test_one_policy_is_exported_and_imported(tmp_path: Path) -> None:
    with serving(tmp_path / "server") as server:
        with Training(server) as training:
            training.wait(BEFORE)
        run("equipoise policy", folder=tmp_path, SERVER=server.address, POLICY=named(RULES[0]))
        with grpc.insecure_channel(server.address) as channel:
            trainer = Trainer(rpc.PolicyServiceStub(channel))
            assert trainer.weights(f"{named(RULES[0])}-again") == trainer.weights(named(RULES[0]))
            assert trainer.status(f"{named(RULES[0])}-again").version == 0


def test_every_command_of_the_page_is_run_here() -> None:
    assert [block.split()[0] for block in blocks()] == ["redis-cli", "cp", "equipoise", "cp", "rm"]
