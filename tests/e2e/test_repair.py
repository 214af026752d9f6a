"""`equipoise repair`, as somebody uses it whose server does not start any more."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from equipoise import PolicyAdmin, PolicyClient
from equipoise.errors import StateLostError, UnavailableError
from equipoise_server.commands.repair import main
from tests.debian import redis_with_tls
from tests.e2e.faults.redis_server import RedisServer
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve

STEPS = 20


@pytest.fixture(params=["6.2", pytest.param("7", marks=pytest.mark.slow)])
def killed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerProcess]:
    """A server that was killed: `p` and `q` have made twenty steps each, turn by turn, all durable."""
    if request.param == "7":  # whose files are several
        redis_with_tls(what="repair of the files of Redis 7").put_on_path(monkeypatch)
        monkeypatch.setattr("equipoise_server.store.redis_binary.MINIMUM_VERSION", (7, 0))
    with serve() as server:
        train(server, STEPS)
        server.kill()
        assert (server.data_dir / "appendonlydir").exists() == (request.param == "7")
        yield server


def train(server: ServerProcess, steps: int) -> None:
    with (
        PolicyClient(server.address, policy="p", num_examples=100, trainer_id="tp", timeout=PATIENT) as p,
        PolicyClient(server.address, policy="q", num_examples=100, trainer_id="tq", timeout=PATIENT) as q,
    ):
        for _ in range(steps):
            for client in (p, q):
                client.step([1, 2, 3], contributions=[1.0, -1.0, 0.5])
                assert client.flush(30, durable=True)


def versions(server: ServerProcess) -> tuple[int, int]:
    with PolicyAdmin(server.address) as admin:
        return admin.get("p").version, admin.get("q").version


def log_file(server: ServerProcess) -> Path:
    (found,) = [*server.data_dir.glob("*.aof"), *server.data_dir.glob("appendonlydir/*.incr.aof")]
    return found


def change(server: ServerProcess, edit: Callable[[bytes], bytes]) -> None:
    file = log_file(server)
    file.write_bytes(edit(file.read_bytes()))


def step_of(policy: str, version: int, content: bytes) -> int:
    """Where the command begins that appends a step."""
    at = content.index(b"%d-0\r\n" % version, content.index(b"{%s}" % policy.encode()))
    while b"{%s}" % policy.encode() not in content[at - 100 : at]:
        at = content.index(b"%d-0\r\n" % version, at + 1)
    return content.rindex(b"\r\nXADD\r\n", 0, at)


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "redis.log")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def repair(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def assert_does_not_start(server: ServerProcess) -> None:
    with pytest.raises(UnavailableError) as caught:
        server.start()
    assert f"`equipoise repair {server.data_dir}` shows what can be saved" in str(caught.value)
    assert "redis-check-aof" not in str(caught.value)


def assert_repaired(server: ServerProcess, capfd: pytest.CaptureFixture[str], *told: str) -> None:
    """Without --apply it says what is wrong and changes nothing; with it, the server starts."""
    before = fingerprint(server.data_dir)
    assert repair(server.data_dir) == 1
    said = capfd.readouterr().out
    for text in told:
        assert text in said
    assert said.endswith("nothing was changed; --apply does it\n")
    assert fingerprint(server.data_dir) == before
    assert repair(server.data_dir, "--apply") == 0
    said = capfd.readouterr().out
    for text in told:
        assert text in said
    (backup,) = server.data_dir.glob("backup-*")
    kept = fingerprint(backup)
    assert kept.items() <= before.items()
    assert str(backup) in said
    assert not list(server.data_dir.glob("repair-*"))
    assert repair(server.data_dir) == 0
    assert "nothing is damaged" in capfd.readouterr().out
    server.start()


@pytest.mark.slow
def test_zeros_behind_the_end_cost_nothing(killed: ServerProcess, capfd: pytest.CaptureFixture[str]) -> None:
    change(killed, lambda content: content + bytes(4096))
    assert_does_not_start(killed)
    assert_repaired(killed, capfd, "is cut off", "p: whole, at step 20", "q: whole, at step 20")
    assert versions(killed) == (STEPS, STEPS)


def test_a_byte_that_frames_costs_what_is_behind_it(killed: ServerProcess, capfd: pytest.CaptureFixture[str]) -> None:
    def edit(content: bytes) -> bytes:
        at = content.rindex(b"*", 0, step_of("q", 15, content))
        return content[:at] + b"+" + content[at + 1 :]

    change(killed, edit)
    assert_does_not_start(killed)
    assert_repaired(
        *(killed, capfd),
        *("p: whole, at step 15", "steps 16 to 20, which were in what is cut off"),
        *("q: whole, at step 14", "steps 15 to 20, which were in what is cut off"),
    )
    assert versions(killed) == (15, 14)
    train(killed, 3)
    assert versions(killed) == (18, 17)


@pytest.mark.slow
def test_so_does_a_command_that_there_is_not(killed: ServerProcess, capfd: pytest.CaptureFixture[str]) -> None:
    def edit(content: bytes) -> bytes:
        at = step_of("p", 15, content)
        return content[:at] + b"\r\nXAED\r\n" + content[at + 8 :]

    change(killed, edit)
    assert_does_not_start(killed)
    assert_repaired(killed, capfd, "begins what is no command", "p: whole, at step 14", "q: whole, at step 14")
    assert versions(killed) == (14, 14)


def test_a_cut_tail_is_told_at_the_start(killed: ServerProcess) -> None:
    change(killed, lambda content: content[:-20])
    killed.start()
    (told,) = [line for line in killed.log.splitlines() if "has cut off the end of its file" in line]
    assert "warning" in told
    assert '"q": "20"' in told
    assert versions(killed) == (STEPS, STEPS - 1)


def test_a_byte_in_a_step_costs_that_policy_what_is_behind_it(
    killed: ServerProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    def edit(content: bytes) -> bytes:
        at = content.index(b"\x00\x00\x80\xbf", step_of("q", 11, content))  # the contribution -1
        return content[:at] + b"\x01" + content[at + 1 :]

    change(killed, edit)
    killed.start()
    with PolicyAdmin(killed.address) as admin:
        assert admin.get("p").version == STEPS
        with pytest.raises(StateLostError, match="equipoise repair"):
            admin.get("q")
    assert killed.stop() == 0
    assert_repaired(
        *(killed, capfd),
        *("p: whole, at step 20", "log entry 11: it is not what was written", "steps 11 to 20"),
        *("these are of trainer 'tq' from sequence 12 on", "everything up to step 10"),
    )
    assert versions(killed) == (STEPS, 10)


def test_it_never_runs_beside_a_server(capfd: pytest.CaptureFixture[str]) -> None:
    with serve() as server:
        train(server, 1)
        assert repair(server.data_dir, "--apply") == 2
        said = capfd.readouterr().err
        assert "is in use by another server" in said
        assert str(server.pid) in said
        assert versions(server) == (1, 1)


@pytest.mark.parametrize("what", ["a directory that is not there", "an empty one"])
def test_what_cannot_be_looked_at_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str) -> None:
    path = tmp_path if what == "an empty one" else tmp_path / "no"
    assert repair(path) == 2
    assert str(path) in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_redis_of_ones_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    try:
        with serve(redis_url=redis.url) as server:
            train(server, STEPS)
            assert repair("--redis-url", redis.url) == 0
            assert f"in service at {server.address}" in capfd.readouterr().out
            assert server.stop() == 0
        with redis.client() as client:
            (log,) = client.keys("equipoise:{q}:*:log")
            client.xdel(log, "11-0")
            before = client.xrange(log)
            assert repair("--redis-url", redis.url) == 1
            assert "log entry 11: it is gone" in capfd.readouterr().out
            assert client.xrange(log) == before
            assert repair("--redis-url", redis.url, "--policy", "p", "--apply") == 0
            assert client.xrange(log) == before
            assert repair("--redis-url", redis.url, "--apply") == 0
            assert "equipoise:backup-" in capfd.readouterr().out
            (copy,) = client.keys("equipoise:backup-*:log")
            assert client.xrange(copy) == before
        with serve(redis_url=redis.url) as server:
            assert versions(server) == (STEPS, 10)
    finally:
        redis.kill()
