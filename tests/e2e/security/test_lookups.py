"""Names that nobody has: who asks for many of them at once takes no connection to Redis from another's steps."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from equipoise import PolicyAdmin, PolicyClient, Security
from equipoise.errors import PolicyNotFoundError
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.faults.gauges import store_errors
from tests.e2e.faults.proxy import FaultProxy
from tests.e2e.faults.redis_server import RedisServer
from tests.e2e.security.conftest import Tokens
from tests.servers import ServerProcess, serve

LOOKUPS = 800
DELAY_S = 0.1


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    listed = Tokens(tmp_path / "tokens.toml")
    return {tenant: listed.add(tenant) for tenant in ("red", "blue")}


@pytest.fixture
def server(tmp_path: Path, tokens: dict[str, str]) -> Iterator[ServerProcess]:
    """One whose Redis is so far away that 800 questions, asked all at once, would wait longer than they may."""
    redis = RedisServer(tmp_path / "redis")
    redis.start()
    with FaultProxy(("127.0.0.1", redis.port)) as proxy:
        url = f"redis://{proxy.address}"
        with serve(redis_url=url, redis_timeout_s=8.0, tokens_file=tmp_path / "tokens.toml") as process:
            proxy.delay_s = DELAY_S
            yield process
        proxy.delay_s = 0
    redis.kill()


def test_many_lookups_of_unknown_names_starve_nobody(server: ServerProcess, tokens: dict[str, str]) -> None:
    blue = Security(token=tokens["blue"])
    with (
        grpc.insecure_channel(server.address) as channel,
        PolicyClient(server.address, policy="blue-1", num_examples=4, security=blue, when_lost="wait") as client,
        PolicyAdmin(server.address, security=blue) as admin,
        ThreadPoolExecutor() as threads,
    ):
        client.step([0], contributions=[1.0])
        asked: list[grpc.Future[pb.GetPolicyResponse]] = [
            PolicyServiceStub(channel).GetPolicy.future(
                pb.GetPolicyRequest(policy=f"red-{number}"),
                metadata=(("authorization", f"Bearer {tokens['red']}"),),
                timeout=300,
            )
            for number in range(LOOKUPS)
        ]

        def look_up(number: int) -> bool:
            """Whether others still wait when a lookup of the other tenant is answered."""
            with pytest.raises(PolicyNotFoundError):
                admin.get(f"blue-none-{number}")
            return not all(each.done() for each in asked)

        own: list[Future[bool]] = [threads.submit(look_up, number) for number in range(4)]
        steps = 0
        while not all(each.done() for each in asked):
            client.step([0], contributions=[1.0])
            steps += 1
        assert client.flush(30, durable=True)
        assert steps > 5
        assert all(each.result() for each in own)
        assert {
            (each.code(), each.details()) for each in asked if each.code() is not grpc.StatusCode.NOT_FOUND
        } == set()
    assert store_errors(server, "exhausted") == store_errors(server, "timeout") == 0
