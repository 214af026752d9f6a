"""Which of the servers that share a store serves a policy: rendezvous hashing with bounded loads.

Rendezvous hashing: every server has a score for every policy, a hash of both names, and the highest serves it; a server
that joins or leaves moves no policy between the others (Thaler and Ravishankar, "Using name-based mappings to increase
hit rates", IEEE/ACM Transactions on Networking 6(1), 1998). Bounded loads: a server that has its share is passed over
(Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", arXiv 1608.01350).
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import blake2b

import structlog

from equipoise_server.engine.memory import has_room
from equipoise_server.engine.runner import PolicyRunner
from equipoise_server.engine.spec import PolicySpec
from equipoise_server.errors import moving, unloaded
from equipoise_server.store import RedisStore, ServerLoad

log = structlog.get_logger("equipoise.policy")

SLACK = 0.1
"""How far above its even share of the policies a server may be before it hands some over."""
MOVES_AT_ONCE = 2
"""Policies that one server hands over at a time."""
STAY_S = 600.0
"""How long a policy stays where callers can reach it only here."""
LEAVE_S = 1.0
"""How long the streams of a policy that moves have to leave by themselves: those that have left wait for the rest."""
FLUSH_S = 5.0
"""How long a policy that moves may write what is not in the store yet."""


class Wish(StrEnum):
    """What a caller says of where a policy should be that no server owns."""

    ANYWHERE = ""
    HERE = "here"
    """It was sent here by another server."""
    STAY = "stay"
    """Another server was named and cannot be reached: serve the policy here, and leave it here for a while."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The servers that are present, and what each says of itself.

    Attributes:
        loads: by the address of the server; not empty.
    """

    loads: Mapping[str, ServerLoad]

    def choose(self, policy: str, *, needed: int = 0) -> str:
        """Address of the server for one policy more, among those with room that have not their share yet.

        Args:
            policy: name.
            needed: bytes of its tables; where no server has room for them, all are as good.
        """
        counts = self._with_room(needed) or self._counts(self.loads)
        share = -(-(sum(counts.values()) + 1) // len(counts))
        return max((address for address, count in counts.items() if count < share), key=lambda at: score(at, policy))

    def excess(self, address: str, policies: Mapping[str, int]) -> list[str]:
        """Which of a server's policies it should hand over, those first that suit it least.

        Args:
            address: of the server.
            policies: bytes of the tables of each that it may hand over, by name.
        """
        own = self.loads[address].policies
        most = {needed: _most(self._with_room(needed) | {address: own}) for needed in set(policies.values())}
        doomed: list[str] = []
        for policy in sorted(policies, key=lambda policy: score(address, policy)):
            if own - len(doomed) > most[policies[policy]]:
                doomed.append(policy)
        return doomed

    def _with_room(self, needed: int) -> dict[str, int]:
        return self._counts({at: load for at, load in self.loads.items() if has_room(needed, free=load.free_bytes)})

    @staticmethod
    def _counts(loads: Mapping[str, ServerLoad]) -> dict[str, int]:
        return {address: load.policies for address, load in loads.items()}


def _most(counts: Mapping[str, int]) -> int:
    """How many policies a server keeps, of servers with so many each."""
    total = sum(counts.values())
    return max(-(-total // len(counts)), int(total / len(counts) * (1 + SLACK)))


def score(address: str, policy: str) -> int:
    """How well a server suits a policy: a hash of both, in [0, 2⁶⁴)."""
    return int.from_bytes(blake2b(f"{address}\0{policy}".encode(), digest_size=8).digest(), "big")


class Spreading:
    """Keeps this server's share of the policies; for one event loop.

    Args:
        store: the store that the servers share.
        address: under which this server is reached, once it serves.
        load: what it says of itself; None: it takes nothing now.
        holds: whether it counts a policy in its load.
    """

    def __init__(
        self,
        store: RedisStore,
        *,
        address: Callable[[], str],
        load: Callable[[], ServerLoad | None],
        holds: Callable[[str], bool],
    ) -> None:
        self._store = store
        self._address = address
        self._load = load
        self._holds = holds
        self._sent: dict[str, str] = {}
        self._moves: set[asyncio.Task[None]] = set()

    async def elsewhere(self, spec: PolicySpec) -> str:
        """Where a policy should be that no server owns; empty: here. Raises StoreError."""
        placement = await self._placement()
        if not placement.loads:
            return ""
        chosen = self._sent[spec.name] = placement.choose(spec.name, needed=spec.table_bytes)
        return "" if chosen == self._address() else chosen

    async def balance(self, runners: Iterable[PolicyRunner]) -> None:
        """Hands over some of what is beyond this server's share, unless it is doing so already. Raises StoreError."""
        self._sent.clear()  # the loads of now have those in them
        placement = await self._placement()
        if self._moves or len(placement.loads) < 2 or self._address() not in placement.loads:
            return
        movable = {runner.spec_name: runner for runner in runners if runner.can_move}
        sizes = {name: runner.policy.state.nbytes for name, runner in movable.items()}
        for name in placement.excess(self._address(), sizes)[:MOVES_AT_ONCE]:
            task = asyncio.get_running_loop().create_task(self._move(movable[name]))
            self._moves.add(task)
            task.add_done_callback(self._moves.discard)

    async def close(self) -> None:
        """Returns when nothing is being handed over any more."""
        await asyncio.gather(*self._moves, return_exceptions=True)

    async def _placement(self) -> Placement:
        """The servers of now, with what was sent to each, or is to be loaded here, since they were last counted."""
        loads = await self._store.servers()
        here = self._address()
        loads.pop(here, None)
        if (own := self._load()) is not None:
            loads[here] = own
        for policy, address in self._sent.items():
            if address in loads and not (address == here and self._holds(policy)):
                loads[address] = replace(loads[address], policies=loads[address].policies + 1)
        return Placement(loads)

    async def _move(self, runner: PolicyRunner) -> None:
        log.info("handing over", policy=runner.spec_name, why="another server has fewer policies")
        # Nobody may come for one that nobody uses: it rests, and can still be seen.
        error = moving(runner.spec_name) if runner.is_attended else unloaded(runner.spec_name)
        runner.drain()
        try:
            async with asyncio.timeout(LEAVE_S):
                await runner.hand_over(error, flush_timeout_s=FLUSH_S)
        except TimeoutError:  # streams that were asked to leave, and stay
            await runner.stop(error, flush_timeout_s=FLUSH_S)
