"""Round trip of a step over one stream, beside a bare gRPC echo of the same bytes: medians and ratios of one run.

    python -m tests.benchmarks.exchange

What is compared takes turns in short blocks, so that a noisy machine disturbs all alike. Each ratio is that of two
blocks of one turn; the table shows the median of the ratios.
"""

import asyncio
import platform
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from equipoise.testing import serve
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc

NUM_EXAMPLES = 1_000_000
ROWS = (64, 1024, 8192)
BLOCKS = 60
WARM_UP = 3
STEPS = 200
"""Steps that are made up; they are sent again and again."""
BLOCK_STEPS = 20
VARIANTS = {"logged": pb.DURABILITY_LOGGED, "behind": pb.DURABILITY_BEHIND}


class Echo(policy_pb2_grpc.PolicyServiceServicer):
    """Answers each step with its own bytes: what grpc.aio and protobuf alone cost."""

    async def Exchange(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.ExchangeResponse]:  # noqa: N802
        """Echoes."""
        async for request in request_iterator:
            yield pb.ExchangeResponse(step=pb.StepResponse(weights=request.step.contributions))


async def echo(ready: Connection) -> None:
    """Serves the echo until the process is ended."""
    server = grpc.aio.server()
    policy_pb2_grpc.add_PolicyServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready.send(f"127.0.0.1:{port}")
    await server.wait_for_termination()


def echo_process(ready: Connection) -> None:
    """Entry of the echo's process."""
    asyncio.run(echo(ready))


def requests(rows: int, *, first: int) -> Iterator[pb.ExchangeRequest]:
    """Steps of random ids and contributions, numbered from `first`."""
    random = np.random.default_rng(rows)
    for sequence in range(first, first + STEPS):
        ids = random.choice(NUM_EXAMPLES, rows, replace=False).astype("<u8")
        contributions = random.standard_normal(rows).astype("<f4")
        step = pb.StepRequest(sequence=sequence, example_ids=ids.tobytes(), contributions=contributions.tobytes())
        yield pb.ExchangeRequest(step=step)


@asynccontextmanager
async def stream(address: str, policy: str, durability: "pb.Durability.ValueType | None") -> AsyncIterator[Any]:
    """An open stream; with a durability, of a policy that is created for it."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        if durability is not None:
            spec = pb.PolicySpec(name=policy, num_examples=NUM_EXAMPLES, durability=durability)
            await stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec))
        call = stub.Exchange()
        await call.write(pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id="bench")))
        await call.read()
        yield call
        await call.done_writing()


async def round_trips(call: Any, given: list[pb.ExchangeRequest]) -> list[float]:
    """Seconds from each request to its answer."""
    taken = []
    for request in given:
        started = time.perf_counter()
        await call.write(request)
        await call.read()
        taken.append(time.perf_counter() - started)
    return taken


async def measure(echo_address: str, address: str) -> dict[tuple[str, int], list[list[float]]]:
    """Seconds of the steps of each block by variant and rows; the variants take turns."""
    taken: dict[tuple[str, int], list[list[float]]] = {}
    for rows in ROWS:
        async with (
            stream(echo_address, "echo", None) as bare,
            stream(address, f"bench-logged-{rows}", VARIANTS["logged"]) as logged,
            stream(address, f"bench-behind-{rows}", VARIANTS["behind"]) as behind,
        ):
            given = list(requests(rows, first=1))
            variants = [("echo", bare), ("logged", logged), ("behind", behind)]
            for turn in range(WARM_UP + BLOCKS):
                block = given[:BLOCK_STEPS]
                for sequence, request in enumerate(block, 1 + turn * BLOCK_STEPS):
                    request.step.sequence = sequence
                # Whoever goes first in a turn must not do so in all of them.
                for name, call in variants[turn % 3 :] + variants[: turn % 3]:
                    seconds = await round_trips(call, block)
                    if turn >= WARM_UP:
                        taken.setdefault((name, rows), []).append(seconds)
    return taken


def ratio(blocks: list[list[float]], others: list[list[float]]) -> float:
    """Median ratio of the blocks' medians, turn by turn."""
    pairs = zip(blocks, others, strict=True)
    return statistics.median(statistics.median(mine) / statistics.median(other) for mine, other in pairs)


def main() -> None:
    """Runs the benchmark and prints a table."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=echo_process, args=(theirs,), daemon=True)
    process.start()
    with serve() as server:
        taken = asyncio.run(measure(ours.recv(), server.address))
    process.terminate()
    columns = ("rows", "variant", "p50 ms", "p99 ms", "p50 / echo", "p50 / behind", "examples/s")
    table = Table(*columns, title="one stream, one step in flight")
    for (name, rows), blocks in sorted(taken.items(), key=lambda item: (item[0][1], item[0][0])):
        seconds = [one for block in blocks for one in block]
        p50, p99 = statistics.median(seconds), float(np.quantile(seconds, 0.99))
        ratios = [f"{ratio(blocks, taken[other, rows]):.2f}" for other in ("echo", "behind")]
        table.add_row(str(rows), name, f"{1e3 * p50:.2f}", f"{1e3 * p99:.2f}", *ratios, f"{rows / p50:,.0f}")
    Console().print(table)
    print(f"{platform.platform()}, Python {platform.python_version()}, grpcio {grpc.__version__}")


if __name__ == "__main__":
    main()
