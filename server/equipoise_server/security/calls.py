"""The calls under way: how many at once, whose they are, and how they are ended from outside."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from equipoise_server.errors import Code, ServiceError
from equipoise_server.security.caller import Caller, calling

PROBES = "/grpc.health.v1.Health/"
"""Calls that need no token: whoever restarts or balances servers has none."""
RETRY_AFTER_S = 1.0
MAX_READING = 4
"""Calls of one tenant whose first messages are read at once: each may take the largest message, twice."""
READ_BYTES_PER_S = 64 << 20
"""How fast each of these turns comes again after a message."""
TURN_S = 0.5
"""How long a turn lasts at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """Bounds of the calls under way.

    Attributes:
        max_calls: in all, probes apart.
        max_tenant_calls: of a tenant whose table says nothing else.
        max_probes: health checks and watches. They have slots of their own, of which the newest takes the oldest's:
            a probe takes a moment, so what is old is idle, and nobody can keep others from asking.
    """

    max_calls: int
    max_tenant_calls: int
    max_probes: int = 256


@dataclass(slots=True)
class _Call:
    who: Caller
    method: str
    is_stream: bool
    ended: ServiceError | None = None

    @property
    def is_probe(self) -> bool:
        return self.method.startswith(PROBES)


class Calls:
    """Lets calls in while there is room, and ends them with a reason; for one event loop."""

    def __init__(self, limits: CallLimits) -> None:
        self._limits = limits
        self._live: dict[asyncio.Task[object], _Call] = {}
        self._probes: dict[asyncio.Task[object], _Call] = {}  # those that hold a slot, in the order of their coming
        self._total = 0  # without probes
        self._by_tenant: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()
        self._reading: dict[str, asyncio.Semaphore] = {}

    @property
    def total(self) -> int:
        """Calls under way now, probes apart."""
        return self._total

    def of_tenant(self, tenant: str) -> tuple[int, int]:
        """Calls of a tenant that are under way now, and how many of them are streams."""
        return self._by_tenant[tenant], self._streams[tenant]

    @contextmanager
    def serving(self, who: Caller, *, method: str, is_stream: bool) -> Iterator[None]:
        """Surrounds the serving of a call: `caller()` is known in it.

        Raises ServiceError (TOO_MANY_CALLS, QUOTA_CALLS, QUOTA_STREAMS).
        """
        task = asyncio.current_task()
        assert task is not None, "calls are served by tasks"
        call = _Call(who, method, is_stream)
        with self._slot(task, call), calling(who):
            yield

    async def read_turn(self, who: Caller) -> Callable[[int], None]:
        """Waits until a call's first message may be read; what is returned ends the turn, told the message's bytes.

        A large message fills memory, and takes the event loop for milliseconds: a tenant's calls take turns, and who
        has sent one waits a while for the next.
        """
        if who.token is None:
            return lambda _: None
        turns = self._reading.setdefault(who.tenant.name, asyncio.Semaphore(MAX_READING))
        await turns.acquire()
        loop = asyncio.get_running_loop()
        over = loop.call_later(TURN_S, turns.release)  # who says nothing, or little at a time, keeps nobody waiting

        def end(num_bytes: int) -> None:
            if loop.time() < over.when():
                over.cancel()
                loop.call_later(num_bytes / READ_BYTES_PER_S, turns.release)

        return end

    def ended(self) -> ServiceError | None:
        """Why we cancelled this task; None: it was cancelled by somebody else. To be asked within `serving`."""
        task = asyncio.current_task()
        assert task is not None, "calls are served by tasks"
        error = self._live[task].ended
        if error is not None:
            task.uncancel()
        return error

    def end(self, why: Callable[[Caller, str], ServiceError | None]) -> None:
        """Ends every call for whose caller and method `why` gives a reason."""
        for task, call in self._live.items():
            if call.ended is None and (error := why(call.who, call.method)) is not None:
                _end(task, call, error)

    @contextmanager
    def _slot(self, task: asyncio.Task[object], call: _Call) -> Iterator[None]:
        self._take(task, call)
        self._live[task] = call
        try:
            yield
        finally:
            del self._live[task]
            self._give_back(task, call)

    def _take(self, task: asyncio.Task[object], call: _Call) -> None:
        if call.is_probe:
            self._make_room_for_a_probe()
            self._probes[task] = call
            return
        self._check(call)
        self._total += 1
        self._by_tenant[call.who.tenant.name] += 1
        self._streams[call.who.tenant.name] += call.is_stream

    def _give_back(self, task: asyncio.Task[object], call: _Call) -> None:
        if call.is_probe:
            self._probes.pop(task, None)
            return
        self._total -= 1
        self._by_tenant[call.who.tenant.name] -= 1
        self._streams[call.who.tenant.name] -= call.is_stream

    def _make_room_for_a_probe(self) -> None:
        if len(self._probes) >= self._limits.max_probes:
            task = next(iter(self._probes))
            message = f"{self._limits.max_probes} health calls are open; this one was the oldest"
            _end(task, self._probes.pop(task), ServiceError(Code.RESOURCE_EXHAUSTED, "TOO_MANY_PROBES", message))

    def _check(self, call: _Call) -> None:
        most = self._limits.max_calls
        if self._total >= most:
            message = f"{most} calls are under way, the server's limit max_concurrent_rpcs"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS", message, retry_after_s=RETRY_AFTER_S)
        if call.who.token is None:
            return
        tenant = call.who.tenant
        most = tenant.max_calls or self._limits.max_tenant_calls
        if self._by_tenant[tenant.name] >= most:
            message = f"{most} calls are under way, the tenant's quota max_calls"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUOTA_CALLS", message, retry_after_s=RETRY_AFTER_S)
        if call.is_stream and tenant.max_streams is not None and self._streams[tenant.name] >= tenant.max_streams:
            message = f"{tenant.max_streams} streams are open, the tenant's quota max_streams"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUOTA_STREAMS", message, retry_after_s=RETRY_AFTER_S)


def _end(task: asyncio.Task[object], call: _Call, error: ServiceError) -> None:
    call.ended = error
    task.cancel()
