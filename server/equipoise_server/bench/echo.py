"""A bare grpc.aio server that answers each step with as many bytes as the policy server does: the floor."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from equipoise.v1 import policy_pb2 as pb


async def exchange(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Parses each step and answers it with as many bytes as weights of its rows have: half of those of their ids."""
    while (request := await context.read()) is not grpc.aio.EOF:
        ids = request.step.example_ids
        weights = ids[: len(ids) // 2]
        await context.write(pb.ExchangeResponse(step=pb.StepResponse(weights=weights)))


async def _serve() -> None:
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        exchange,
        request_deserializer=pb.ExchangeRequest.FromString,
        response_serializer=pb.ExchangeResponse.SerializeToString,
    )
    service = "equipoise.v1.PolicyService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Exchange": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    os.write(1, f"127.0.0.1:{port}\n".encode())
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)  # until who started it lets go
    await server.stop(None)


@contextmanager
def echo() -> Iterator[tuple[str, int]]:
    """Address and process id of an echo in a process of its own, which ends with this one."""
    command = [sys.executable, "-m", __name__]  # in a group of its own: a Ctrl-C is for this process
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().decode().strip(), process.pid
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    asyncio.run(_serve())
