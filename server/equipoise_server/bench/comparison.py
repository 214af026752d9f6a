"""One case: whoever is compared takes turns in short blocks, so that a noisy machine disturbs all alike."""

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from equipoise.aio import PolicyAdmin
from equipoise.channel import Server
from equipoise.policies import PolicySpec
from equipoise_server.bench.caller import Caller, Sent
from equipoise_server.bench.clients import AioClients, SyncClients
from equipoise_server.bench.load import Case, make_rows
from equipoise_server.bench.processes import cpu_seconds, resident_bytes
from equipoise_server.bench.reverb import ReverbClients, ReverbServer
from equipoise_server.bench.servers import PolicyServer
from equipoise_server.bench.stubs import Stubs

ECHO = "echo"
WARM_UP_TURNS = 2
CREATION_S = 600
"""Longest creation of a policy: one of 10^9 examples takes its time."""
CALLERS: dict[str, type[Stubs] | type[AioClients] | type[SyncClients]] = {
    "stubs": Stubs,
    "aio": AioClients,
    "client": SyncClients,
}
"""By the name of what sends."""


@dataclass(frozen=True, slots=True)
class Block:
    """What a contender did in one turn.

    Attributes:
        sent: by each trainer.
        wall_s: time that all took together.
        server_s: processor time of the server; of Redis and of this process, which sends, the same.
        redis_s: see above.
        client_s: see above.
    """

    sent: Sequence[Sent]
    wall_s: float
    server_s: float
    redis_s: float
    client_s: float

    @property
    def steps(self) -> int:
        """That were answered."""
        return sum(steps for steps, _ in self.sent)

    @property
    def latencies_s(self) -> list[float]:
        """Of each step, from its sending to its answer; empty where it is not known."""
        return [each for _, latencies in self.sent for each in latencies]

    @property
    def p50_s(self) -> float:
        """Median of the latencies."""
        return statistics.median(self.latencies_s)

    @property
    def rate(self) -> float:
        """Steps per second."""
        return self.steps / self.wall_s


@dataclass(slots=True, kw_only=True)
class Contender:
    """One of those that are compared.

    Attributes:
        name: `echo`, `reverb`, or the durability.
        via: what sends, of `CALLERS`.
        caller: it.
        pids: of the server.
        redis_pid: of its Redis; 0: it has none.
        client_pid: of the process that sends.
        security: of the server: `plain`, `tls` or `tls+token`.
        num_examples: N; 0: it has no policy.
        policies: among which the trainers are shared out.
        policy_bytes: memory of the tables of one of them.
        blocks: what it did, turn by turn.
        resident: bytes of the server's memory at the end.
    """

    name: str
    via: str
    caller: Caller
    pids: Sequence[int]
    redis_pid: int = 0
    client_pid: int = field(default_factory=os.getpid)
    security: str = "plain"
    num_examples: int = 0
    policies: int = 0
    policy_bytes: int = 0
    blocks: list[Block] = field(default_factory=list)
    resident: int = 0

    @property
    def processes(self) -> int:
        """How many the server consists of, without the parent of several."""
        return max(1, len(self.pids) - 1)

    async def take_turn(self, seconds: float) -> Block:
        """Sends for so long."""
        before, started = self._used(), time.perf_counter()
        sent = await self.caller.send(seconds)
        wall = time.perf_counter() - started
        server, redis, client = (now - then for now, then in zip(self._used(), before, strict=True))
        self.resident = sum(map(resident_bytes, self.pids))
        return Block(sent, wall, server, redis, client)

    def _used(self) -> tuple[float, float, float]:
        redis = cpu_seconds(self.redis_pid) if self.redis_pid else 0.0
        return sum(map(cpu_seconds, self.pids)), redis, cpu_seconds(self.client_pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Who takes part.

    Attributes:
        servers: policy servers.
        echo: address and process id.
        reverb: a server of Reverb; None: without.
        durabilities: of `logged` and `behind`.
        via: names of callers.
        examples: sizes N. There are policies for each server, N, durability and caller.
        policies: so many, among which the trainers are shared out.
    """

    servers: Sequence[PolicyServer]
    echo: tuple[str, int]
    reverb: ReverbServer | None
    durabilities: Sequence[str]
    via: Sequence[str]
    examples: Sequence[int]
    policies: int = 1


async def compare(case: Case, field: Field, *, turns: int, seconds: float) -> list[Contender]:
    """The contenders with what they did: the echo, those of each server, and Reverb.

    Args:
        case: what is sent.
        field: who takes part.
        turns: blocks of each contender that count.
        seconds: length of a block.
    """
    async with AsyncExitStack() as stack:
        contenders = await _enter(stack, case, field)
        for turn in range(WARM_UP_TURNS + turns):
            first = turn % len(contenders)  # whoever goes first in a turn must not do so in all of them
            for contender in contenders[first:] + contenders[:first]:
                block = await contender.take_turn(seconds)
                if turn >= WARM_UP_TURNS:
                    contender.blocks.append(block)
    return contenders


async def _enter(stack: AsyncExitStack, case: Case, field: Field) -> list[Contender]:
    rows = {size: make_rows(case, size) for size in field.examples}
    address, pid = field.echo
    echo = await Stubs.to_echo(stack, case, rows[field.examples[0]], address=address)
    contenders = [Contender(name=ECHO, via="stubs", caller=echo, pids=[pid])]
    for server in field.servers:
        for size in field.examples:
            for durability in field.durabilities:
                for via in field.via:
                    kind = f"bench-{durability}-{via}-{size}"
                    policies = [
                        (f"{kind}-{number}", Server(server.address_of(number), server.credentials))
                        for number in range(field.policies)
                    ]
                    for name, place in policies:
                        admin = PolicyAdmin(place.address, timeout=CREATION_S, security=place.security)
                        await stack.enter_async_context(admin)
                        made = await admin.create(_spec(case, name, durability, size))
                        stack.push_async_callback(admin.delete, name)
                    caller = await CALLERS[via].open(stack, case, rows[size], policies=policies)
                    contenders.append(
                        Contender(
                            name=durability,
                            via=via,
                            caller=caller,
                            pids=server.pids,
                            redis_pid=server.redis_pid,
                            security=server.security,
                            num_examples=size,
                            policies=field.policies,
                            policy_bytes=made.bytes,
                        )
                    )
    if field.reverb is not None:
        peer = await ReverbClients.open(stack, case, field.reverb)
        contenders.append(
            Contender(name="reverb", via="client", caller=peer, pids=[field.reverb.pid], client_pid=peer.pid)
        )
    return contenders


def _spec(case: Case, name: str, durability: str, num_examples: int) -> PolicySpec:
    return PolicySpec(
        name=name,
        num_examples=num_examples,
        rule=case.rule,
        settings=dict(case.settings_for(num_examples)),
        durability=durability,  # type: ignore[arg-type]  # the parser has checked it
    )
