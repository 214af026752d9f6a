"""Health: alive from the start, ready once Redis was reached, neither while the server stops."""

import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from equipoise_server.health import NOT_SERVING, OVERALL, SERVICE, SERVING, Health


@contextlib.asynccontextmanager
async def asked(health: Health) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield health_pb2_grpc.HealthStub(channel)
    finally:
        await server.stop(None)


async def statuses(stub: health_pb2_grpc.HealthStub) -> tuple[int, int]:
    answers = [await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60) for name in (OVERALL, SERVICE)]
    return answers[0].status, answers[1].status


async def test_ready_once_every_component_was_reached() -> None:
    health = Health("redis", "disk")
    await health.start()
    async with asked(health) as stub:
        assert await statuses(stub) == (SERVING, NOT_SERVING)
        assert health.problems() == ["redis has not been reached yet", "disk has not been reached yet"]
        await health.reached("redis")
        assert await statuses(stub) == (SERVING, NOT_SERVING)
        await health.reached("disk")
        assert await statuses(stub) == (SERVING, SERVING)
        assert health.problems() == []


async def test_not_ready_again_once_it_drains_whatever_is_reached_then() -> None:
    health = Health("redis")
    await health.start()
    async with asked(health) as stub:
        await health.drain()
        await health.reached("redis")
        assert await statuses(stub) == (NOT_SERVING, NOT_SERVING)
        assert health.problems() == ["the server is stopping"]
        assert health.draining


async def test_the_service_is_the_contracts() -> None:
    assert SERVICE == "equipoise.v1.PolicyService"


async def test_an_unknown_service_is_not_found() -> None:
    health = Health()
    await health.start()
    async with asked(health) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=60)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
