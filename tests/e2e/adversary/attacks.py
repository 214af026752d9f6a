"""What somebody tries who wants to lock a server, fill it or stall it: a stranger, or a tenant with a token.

Each attack goes on until its task is cancelled, and takes every refusal for an invitation to try again.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

import grpc
import numpy as np
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub

Headers: TypeAlias = tuple[tuple[str, str], ...]

PREFIX = "mallory-"
SERVICE = "/equipoise.v1.PolicyService/"
OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Mallory:
    """One connection of the attacker.

    Attributes:
        channel: to the server.
        headers: with his token; empty for a stranger.
    """

    channel: grpc.aio.Channel
    headers: Headers

    @property
    def stub(self) -> Any:
        """The service."""
        return PolicyServiceStub(self.channel)

    async def create(self, name: str, num_examples: int, rule: str = "ema_sign") -> str:
        """A policy of his, there before or not."""
        spec = pb.PolicySpec(name=PREFIX + name, num_examples=num_examples, rule=pb.RuleSpec(name=rule))
        await self.stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec), metadata=self.headers, timeout=120)
        return spec.name


Attack: TypeAlias = Callable[[Mallory], Awaitable[None]]


async def again_and_again(calls: int, act: Callable[[int], Awaitable[object]]) -> None:
    """So many at once, each begun again when it ends, however it ends."""

    async def one(number: int) -> None:
        while True:
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await act(number)
            await asyncio.sleep(PAUSE_S)

    await asyncio.gather(*(one(number) for number in range(calls)))


async def silence() -> AsyncIterator[bytes]:
    """Messages that never come."""
    await asyncio.Event().wait()
    yield b""


async def idle_calls(mallory: Mallory) -> None:
    """2,048 calls that never say what they want."""
    method = mallory.channel.stream_unary(SERVICE + "GetServerInfo")
    await again_and_again(2048, lambda _: method(silence(), metadata=mallory.headers))


async def health_watches(mallory: Mallory) -> None:
    """2,048 open Health/Watch streams."""
    method = mallory.channel.unary_stream(
        "/grpc.health.v1.Health/Watch", request_serializer=health_pb2.HealthCheckRequest.SerializeToString
    )

    async def watch(_: int) -> None:
        async for _ in method(health_pb2.HealthCheckRequest()):
            pass

    await again_and_again(2048, watch)


async def reflections(mallory: Mallory) -> None:
    """512 reflection streams that ask without end."""
    method = mallory.channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
    )

    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        while True:
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="equipoise.v1.PolicyService")
            await asyncio.sleep(1.0)

    async def stream(_: int) -> None:
        async for _ in method(ask()):
            pass

    await again_and_again(512, stream)


async def huge_trainer_ids(mallory: Mallory) -> None:
    """40 at a time of 15 MB."""
    policy = await mallory.create("ids", 4)
    step = pb.StepRequest(sequence=1, example_ids=bytes(8), contributions=bytes(4))
    request = pb.UpdateWeightsRequest(policy=policy, trainer_id="t" * 15_000_000, step=step)
    await again_and_again(40, lambda _: mallory.stub.UpdateWeights(request, metadata=mallory.headers, timeout=60))


async def many_trainers(mallory: Mallory) -> None:
    """Another trainer with every step."""
    policy = await mallory.create("crowd", 4)
    step = pb.StepRequest(sequence=1, example_ids=bytes(8), contributions=bytes(4))
    numbers = count()

    async def act(_: int) -> None:
        for _ in range(100):
            request = pb.UpdateWeightsRequest(policy=policy, trainer_id=f"t{next(numbers)}", step=step)
            await mallory.stub.UpdateWeights(request, metadata=mallory.headers, timeout=60)

    await again_and_again(32, act)


async def unfinished_imports(mallory: Mallory) -> None:
    """24 imports of 10 million examples, all but their last message."""
    policy = await mallory.create("source", 10_000_000)
    messages = []
    async for message in mallory.stub.ExportPolicy(
        pb.ExportPolicyRequest(policy=policy), metadata=mallory.headers, timeout=120
    ):
        messages.append(message)

    async def most_of_it(number: int) -> AsyncIterator[pb.ImportPolicyRequest]:
        for message in messages[:-1]:
            request = pb.ImportPolicyRequest()
            request.MergeFromString(message.SerializeToString())
            if request.HasField("header"):
                request.header.spec.name = f"{PREFIX}import-{number}-{secrets.token_hex(4)}"
            yield request
        await asyncio.Event().wait()

    await again_and_again(24, lambda n: mallory.stub.ImportPolicy(most_of_it(n), metadata=mallory.headers))


async def unread_exports(mallory: Mallory) -> None:
    """24 exports of 10 million examples, of which one message is read."""
    policy = await mallory.create("source", 10_000_000)

    async def act(_: int) -> None:
        call = mallory.stub.ExportPolicy(pb.ExportPolicyRequest(policy=policy), metadata=mallory.headers)
        await call.read()
        await call.code()

    await again_and_again(24, act)


async def long_names(mallory: Mallory) -> None:
    """Names of 8 MB, 8 at a time."""
    request = pb.GetPolicyRequest(policy=PREFIX + "n" * 8_000_000)
    await again_and_again(8, lambda _: mallory.stub.GetPolicy(request, metadata=mallory.headers, timeout=60))


def requests(policy: str, *, steps: int, rows: int, num_examples: int) -> list[pb.ExchangeRequest]:
    """An opening and random steps."""
    random = np.random.default_rng(0)
    opening = pb.OpenRequest(policy=policy, trainer_id=secrets.token_hex(8))
    found = [pb.ExchangeRequest(open=opening)]
    for sequence in range(1, steps + 1):
        ids = random.integers(0, num_examples, rows).astype("<u8")
        step = pb.StepRequest(
            sequence=sequence,
            example_ids=ids.tobytes(),
            contributions=random.standard_normal(rows).astype("<f4").tobytes(),
        )
        found.append(pb.ExchangeRequest(step=step))
    return found


async def stream(mallory: Mallory, sent: list[pb.ExchangeRequest], *, reads: bool = True) -> None:
    """Sends all without waiting, and reads what comes, or does not."""
    call = mallory.stub.Exchange(metadata=mallory.headers)

    async def write() -> None:
        for request in sent:
            await call.write(request)
        await call.done_writing()

    writing = asyncio.create_task(write())
    try:
        if reads:
            async for _ in call:
                pass
        await call.code()
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        call.cancel()


async def steps_on_all_rows(mallory: Mallory) -> None:
    """256 steps in flight that change 10 million rows each."""
    policy = await mallory.create("all-rows", 10_000_000, "projected_gradient")
    sent = requests(policy, steps=256, rows=64, num_examples=10_000_000)
    await again_and_again(1, lambda _: stream(mallory, sent))


async def wide_steps(mallory: Mallory) -> None:
    """Four streams of steps with 262,144 rows."""
    policy = await mallory.create("wide", 1_000_000)

    async def act(_: int) -> None:
        await stream(mallory, requests(policy, steps=20, rows=262_144, num_examples=1_000_000))

    await again_and_again(4, act)


async def many_policies(mallory: Mallory) -> None:
    """64 policies, each with a stream of steps of 1,024 rows without a pause."""
    names = [await mallory.create(f"many-{number}", 10_000) for number in range(64)]

    async def act(number: int) -> None:
        await stream(mallory, requests(names[number], steps=100, rows=1024, num_examples=10_000))

    await again_and_again(64, act)


async def samples(mallory: Mallory) -> None:
    """Four samples at once from 100 million examples."""
    policy = await mallory.create("sampled", 100_000_000)
    request = pb.SampleExamplesRequest(policy=policy, count=1000)
    await again_and_again(4, lambda _: mallory.stub.SampleExamples(request, metadata=mallory.headers, timeout=120))


async def unknown_names(mallory: Mallory) -> None:
    """200 reads at once of policies that do not exist."""

    async def act(_: int) -> None:
        request = pb.GetPolicyRequest(policy=PREFIX + secrets.token_hex(8))
        await mallory.stub.GetPolicy(request, metadata=mallory.headers, timeout=60)

    await again_and_again(200, act)


async def leaving(mallory: Mallory) -> None:
    """16 readers of 10 million weights who leave at the first of them."""
    policy = await mallory.create("source", 10_000_000)

    async def act(_: int) -> None:
        call = mallory.stub.ReadWeights(pb.ReadWeightsRequest(policy=policy), metadata=mallory.headers)
        await call.read()
        call.cancel()

    await again_and_again(16, act)


async def unread_streams(mallory: Mallory) -> None:
    """32 streams of 1,000 steps whose answers nobody reads."""
    policy = await mallory.create("unread", 100_000)

    async def act(_: int) -> None:
        await stream(mallory, requests(policy, steps=200, rows=16_384, num_examples=100_000), reads=False)

    await again_and_again(32, act)


async def large_messages(mallory: Mallory) -> None:
    """24 streams of sketches of 15 MB, sent as fast as they are taken."""
    policy = await mallory.create("sketches", 10_000)
    rows, width = 900, 4096
    step = pb.StepRequest(
        example_ids=np.arange(rows, dtype="<u8").tobytes(),
        gradient_sketches=bytes(4 * rows * width),
        target_sketch=bytes(4 * width),
    )

    async def act(_: int) -> None:
        sent = [pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id=secrets.token_hex(8)))]
        for sequence in range(1, 11):
            sent.append(pb.ExchangeRequest(step=step))
            sent[-1].step.sequence = sequence
        await stream(mallory, sent)

    await again_and_again(24, act)


async def churn(mallory: Mallory) -> None:
    """Policies that come and go, 16 at a time."""

    async def act(_: int) -> None:
        name = await mallory.create(f"churn-{secrets.token_hex(8)}", 100_000)
        await mallory.stub.DeletePolicy(pb.DeletePolicyRequest(policy=name), metadata=mallory.headers, timeout=60)

    await again_and_again(16, act)


STRANGER: dict[str, Attack] = {
    "idle calls, no token": idle_calls,
    "health watches": health_watches,
}
TENANT: dict[str, Attack] = {
    "idle calls": idle_calls,
    "reflection": reflections,
    "trainer ids of 15 MB": huge_trainer_ids,
    "many trainers": many_trainers,
    "unfinished imports": unfinished_imports,
    "unread exports": unread_exports,
    "names of 8 MB": long_names,
    "steps on 10⁷ rows": steps_on_all_rows,
    "steps of 262,144 rows": wide_steps,
    "64 busy policies": many_policies,
    "samples of 10⁸": samples,
    "unknown names": unknown_names,
    "leaving": leaving,
    "unread streams": unread_streams,
    "messages of 15 MB": large_messages,
    "churn": churn,
}
ATTACKS = STRANGER | TENANT


async def _attack(name: str, address: str, headers: Headers, seconds: float) -> None:
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        mallory = Mallory(channel, () if name in STRANGER else headers)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    with suppress(grpc.aio.AioRpcError):  # such as a quota when he prepares
                        await ATTACKS[name](mallory)
                    await asyncio.sleep(PAUSE_S)


def attack(name: str, address: str, headers: Headers, seconds: float) -> None:
    """Runs an attack for so long; the entry of a process."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)  # he leaves thousands of calls in the middle
    asyncio.run(_attack(name, address, headers, seconds))
