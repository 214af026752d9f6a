"""Calls that are ended from outside end on the wire, whatever they were about."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from equipoise_server.errors import Code, ServiceError
from equipoise_server.interceptors import EdgeInterceptor
from equipoise_server.metrics.rpc import RpcMetrics
from equipoise_server.security import Access, CallLimits, Calls

WHY = ServiceError(Code.UNAVAILABLE, "DRAINING", "the server stops")


async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@pytest.mark.parametrize("at", [1, 2])
async def test_a_call_that_is_ended_while_it_answers_is_told_why(at: int) -> None:
    """Also at its first answer: gRPC cannot end a call whose headers it does not know to have left."""
    calls, answers = Calls(CallLimits(max_calls=8, max_tenant_calls=8)), 0

    def encode(answer: bytes) -> bytes:
        nonlocal answers
        answers += 1
        if answers == at:
            calls.end(lambda who, method: WHY)  # just before the call waits for this answer to leave
        return answer

    telemetry = RpcMetrics(CollectorRegistry())
    edge = EdgeInterceptor(telemetry, Access(None), calls, message_timeout_s=60.0, write_timeout_s=60.0)
    server = grpc.aio.server(interceptors=[edge])
    handler = grpc.stream_stream_rpc_method_handler(echo, response_serializer=encode)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s.S", {"Echo": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.stream_stream("/s.S/Echo")(timeout=60)
            for _ in range(at):
                await call.write(b"x")
                await call.read()
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert await call.details() == "the server stops"
    finally:
        await server.stop(None)
