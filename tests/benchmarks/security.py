"""What TLS and tokens cost: a step's round trip, throughput and a call by itself, against none; ratios of one run.

    python -m tests.benchmarks.security

Three servers take turns in short blocks: `none`, `tls`, and `tls+token` with client certificates too. Each ratio is
that of two blocks of one turn; the table shows the median of the ratios, and their quartiles.
"""

import asyncio
import platform
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from equipoise import Security
from equipoise.channel import Server
from equipoise.testing import serve
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise_server.bench.load import Case, make_rows
from equipoise_server.security import Scope, entry, new_token
from tests.e2e.security.authority import Authority

NUM_EXAMPLES = 1_000_000
ROWS = (64, 1024, 8192)
WARM_UP = 3
BLOCKS = 60
ONE_BY_ONE, TOGETHER, ALONE = 20, 100, 10
"""Steps of one block: each waiting for its answer, many in flight, and by a call of its own each."""
IN_FLIGHT = 32


def requests(rows: int) -> list[pb.ExchangeRequest]:
    """Steps of random ids and contributions."""
    case = Case(rows=rows, trainers=1, pipelined=False, num_examples=NUM_EXAMPLES, rule="ema_sign")
    made = make_rows(case)
    return [made[place % len(made)].request(1 + place) for place in range(max(ONE_BY_ONE, TOGETHER))]


async def round_trips(call: Any, given: list[pb.ExchangeRequest]) -> list[float]:
    """Seconds from each request to its answer."""
    taken = []
    for request in given:
        started = time.perf_counter()
        await call.write(request)
        await call.read()
        taken.append(time.perf_counter() - started)
    return taken


def servers(stack: ExitStack) -> dict[str, Server]:
    """The three servers by name."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    authority = Authority(folder)
    shown, mine = authority.issue("server"), authority.issue("client")
    token, kept = new_token(tenant="bench", scopes=Scope)
    tokens = folder / "tokens.toml"
    tokens.write_text(f'[tenants.bench]\nprefix = ""\n{entry(kept)}')
    tls = {"tls_certificate": shown.certificate, "tls_key": shown.key}
    guard = {"tls_client_ca": authority.file, "tokens_file": tokens}
    trusting = Security(root_certificates=authority.file)
    known = Security(
        root_certificates=authority.file, client_certificate=mine.certificate, client_key=mine.key, token=token
    )
    return {
        "none": Server(stack.enter_context(serve()).address, Security()),
        "tls": Server(stack.enter_context(serve(**tls)).address, trusting),
        "tls+token": Server(stack.enter_context(serve(**tls, **guard)).address, known),
    }


@asynccontextmanager
async def stream(server: Server, policy: str) -> AsyncIterator[tuple[Any, Any]]:
    """A stub, and an open stream of a policy that is created for it and answered at once."""
    async with server.aio_channel() as channel:
        stub = PolicyServiceStub(channel)
        spec = pb.PolicySpec(name=policy, num_examples=NUM_EXAMPLES, durability=pb.DURABILITY_BEHIND)
        await stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec), metadata=server.headers())  # type: ignore[misc]
        call: Any = stub.Exchange(metadata=server.headers())  # type: ignore[call-arg]
        await call.write(pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id="bench")))
        await call.read()
        yield stub, call
        await call.done_writing()


async def in_flight(call: Any, given: list[pb.ExchangeRequest]) -> float:
    """Seconds per step with `IN_FLIGHT` of them under way."""
    started = time.perf_counter()
    for sent, request in enumerate(given):
        await call.write(request)
        if sent >= IN_FLIGHT:
            await call.read()
    for _ in range(min(IN_FLIGHT, len(given))):
        await call.read()
    return (time.perf_counter() - started) / len(given)


async def by_themselves(stub: Any, server: Server, policy: str, given: list[pb.ExchangeRequest]) -> float:
    """Median seconds of a step by a call of its own."""
    taken = []
    for request in given:
        step = pb.StepRequest(example_ids=request.step.example_ids, contributions=request.step.contributions)
        message = pb.UpdateWeightsRequest(policy=policy, step=step)
        started = time.perf_counter()
        await stub.UpdateWeights(message, metadata=server.headers())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def numbered(given: list[pb.ExchangeRequest], *, first: int) -> list[pb.ExchangeRequest]:
    """The steps, numbered from `first`; the messages themselves."""
    for sequence, request in enumerate(given, first):
        request.step.sequence = sequence
    return given


async def measure(known: dict[str, Server]) -> dict[tuple[int, str, str], list[float]]:
    """Seconds of each block by rows, what is measured, and server; the servers take turns, block by block."""
    taken: dict[tuple[int, str, str], list[float]] = {}
    for rows in ROWS:
        policy = f"bench-{rows}"
        given = requests(rows)
        async with AsyncExitStack() as stack:
            streams = {name: await stack.enter_async_context(stream(at, policy)) for name, at in known.items()}
            sequence = 1
            for turn in range(WARM_UP + BLOCKS):
                # Whoever goes first in a turn must not do so in all of them.
                for name in sorted(streams, key=lambda name: (list(streams).index(name) + turn) % len(streams)):
                    stub, call = streams[name]
                    waiting = numbered(given[:ONE_BY_ONE], first=sequence)
                    block = {"round trip": statistics.median(await round_trips(call, waiting))}
                    flood = numbered(given[:TOGETHER], first=sequence + ONE_BY_ONE)
                    block["in flight"] = await in_flight(call, flood)
                    block["call"] = await by_themselves(stub, known[name], policy, given[:ALONE])
                    for what, seconds in block.items() if turn >= WARM_UP else ():
                        taken.setdefault((rows, what, name), []).append(seconds)
                sequence += ONE_BY_ONE + TOGETHER
    return taken


def main() -> None:
    """Runs the benchmark and prints a table."""
    with ExitStack() as stack:
        taken = asyncio.run(measure(servers(stack)))
    table = Table(
        "rows", "what", "server", "median ms", "/ none", "quartiles", "steps/s", title="TLS and tokens against none"
    )
    for (rows, what, name), seconds in sorted(taken.items(), key=lambda item: item[0]):
        ratios = [mine / plain for mine, plain in zip(seconds, taken[rows, what, "none"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(seconds)
        quartiles = "" if name == "none" else f"{low:.2f} to {high:.2f}"
        table.add_row(str(rows), what, name, f"{1e3 * median:.3f}", f"{middle:.2f}", quartiles, f"{1 / median:,.0f}")
    Console().print(table)
    print(f"{platform.platform()}, Python {platform.python_version()}, grpcio {grpc.__version__}")


if __name__ == "__main__":
    main()
