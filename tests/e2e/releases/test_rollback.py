"""A server that meets what a newer release has stored refuses it clearly, changes nothing, and serves the rest."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from equipoise import PolicyClient, Source
from equipoise.admin import PolicyAdmin
from equipoise.errors import UnavailableError
from equipoise.v1 import policy_pb2_grpc as rpc
from equipoise_server.store import FORMAT
from tests.e2e.faults.redis_server import RedisServer, running
from tests.e2e.releases.trainer import Trainer, named, steps
from tests.servers import ServerProcess, zygote

TOO_NEW, OTHER = "ema-sign", "ema-relu"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path / "redis") as found:
        yield found


@pytest.fixture
def server(tmp_path: Path, redis: RedisServer) -> Iterator[ServerProcess]:
    found = ServerProcess(zygote(), tmp_path / "server", redis_url=redis.url)
    found.start()
    yield found
    found.kill()


def trained(server: ServerProcess, rule: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        trainer = Trainer(rpc.PolicyServiceStub(channel))
        trainer.create(rule)
        given = steps(rule, first=1, batch=24)
        for _ in range(3):
            trainer.step(named(rule), next(given))


def stored(redis: RedisServer) -> dict[bytes, Any]:
    """All of the policy's keys."""
    with redis.client() as client:
        return {key: client.dump(key) for key in sorted(client.keys(f"equipoise:{{{TOO_NEW}}}:*"))}


def alter_spec(redis: RedisServer, **changes: object) -> None:
    """What a newer release would have stored; without the checksum, which may be left out."""
    key = f"equipoise:{{{TOO_NEW}}}:spec"
    text = redis.command("HGET", key, "spec").decode().partition("\n")[0]
    redis.command("HSET", key, "spec", json.dumps(json.loads(text) | changes))


def test_a_newer_format_is_refused_by_name_and_number_and_stays_as_it_is(
    server: ServerProcess, redis: RedisServer
) -> None:
    trained(server, "ema_sign")
    trained(server, "ema_relu")
    server.stop()
    redis.command("HSET", f"equipoise:{{{TOO_NEW}}}:spec", "format", FORMAT + 1)
    before = stored(redis)
    server.start()
    with PolicyAdmin(server.address, timeout=3.0) as admin:
        with pytest.raises(UnavailableError) as caught:
            admin.get(TOO_NEW)
        assert [each.spec.name for each in admin.list_policies()] == [OTHER]
        assert admin.get(OTHER).version == 3
        with pytest.raises(UnavailableError, match="newer release"):
            admin.delete(TOO_NEW)
    assert caught.value.reason == "POLICY_TOO_NEW"
    assert caught.value.metadata == {"format": str(FORMAT + 1), "readable": str(FORMAT)}
    message = str(caught.value)
    for told in (TOO_NEW, f"format {FORMAT + 1}", f"up to {FORMAT}", "run that release", "restore a backup"):
        assert told in message
    assert stored(redis) == before
    assert "a newer release has stored a policy" in server.log


def test_a_trainer_goes_on_without_it_and_with_it_once_the_newer_release_is_back(
    server: ServerProcess, redis: RedisServer
) -> None:
    trained(server, "ema_sign")
    server.stop()
    redis.command("HSET", f"equipoise:{{{TOO_NEW}}}:spec", "format", FORMAT + 1)
    server.start()
    with PolicyClient(server.address, policy=TOO_NEW, num_examples=300, rule="ema_sign") as client:
        reply = client.step([1, 2], contributions=[1.0, -1.0])
        assert reply.source is Source.UNIFORM
        redis.command("HSET", f"equipoise:{{{TOO_NEW}}}:spec", "format", FORMAT)
        assert client.flush(timeout=60)
        assert client.status().version == 4


def test_a_rule_that_only_a_newer_release_knows_is_refused_too(server: ServerProcess, redis: RedisServer) -> None:
    trained(server, "ema_sign")
    trained(server, "ema_relu")
    server.stop()
    alter_spec(redis, rule="of_next_year")
    before = {key: value for key, value in stored(redis).items() if b":owner" not in key}  # it counts who came by
    server.start()
    with PolicyAdmin(server.address, timeout=3.0) as admin:
        with pytest.raises(UnavailableError, match=f"'{TOO_NEW}' was created by a newer release: .*of_next_year"):
            admin.get(TOO_NEW)
        assert admin.get(OTHER).version == 3
        assert {each.spec.name for each in admin.list_policies()} == {TOO_NEW, OTHER}
    assert {key: value for key, value in stored(redis).items() if b":owner" not in key} == before
