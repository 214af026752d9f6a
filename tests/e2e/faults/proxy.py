"""A TCP proxy that does to connections what networks do: delay, hold, cut and reset them, at a chosen byte or message.

It runs an event loop in a thread of its own; every method may be called from any thread and takes effect at once.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from time import monotonic, sleep
from typing import Any

from tests.ports import free_port

CHUNK_BYTES = 64 * 1024
CHUNKS_UNDER_WAY = 64
"""What one direction of a connection holds: beyond, its sender is read no further."""
STANDSTILL_S = 0.5
"""A sleep of 2 ms that takes longer is no sleep of ours."""


class Way(Enum):
    """A direction of a connection."""

    UP = "up"
    """From the client to the server."""
    DOWN = "down"
    """From the server to the client."""


class At(Enum):
    """Where a trap closes."""

    REQUEST = "request"
    """Before the matching bytes reach the server."""
    REPLY = "reply"
    """After they did, before what the server says next on this connection reaches the client."""


class Trap:
    """Holds every connection that carries certain bytes, until it is freed.

    Attributes:
        caught: set once a connection is held.
    """

    def __init__(self, pattern: bytes, at: At) -> None:
        self.pattern = pattern
        self.at = at
        self.caught = threading.Event()
        self.freed = asyncio.Event()
        self.drops = False


@dataclass(slots=True, eq=False)
class Connection:
    """One connection through the proxy: both sides, and what it is about to be held for."""

    client: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    server: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    tail: bytes = b""
    awaits_reply: list[Trap] = field(default_factory=list)

    def reset(self) -> None:
        """Ends both sides at once (RST)."""
        for _, writer in (self.client, self.server):
            reset(writer)


class FaultProxy:
    """Stands before one server, at `address`.

    Args:
        target: host and port of the server, which need not be there yet; may change.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.passed = dict.fromkeys(Way, 0)
        """Bytes forwarded so far."""
        self.taken = dict.fromkeys(Way, 0)
        """Bytes taken so far, held ones included."""
        self.delay_s = 0.0
        """Every piece of data is so long on its way; as in a long cable, others may be on theirs meanwhile."""
        self.bytes_per_s: float | None = None
        """How fast data goes on."""
        self.on_data: Callable[[Way, bytes], None] = lambda way, data: None
        """Sees everything that is forwarded, just before it is."""
        self._open = dict.fromkeys(Way, True)
        self._cut: dict[Way, int] = {}
        self._traps: list[Trap] = []
        self._connections: set[Connection] = set()
        self._stranded: set[Connection] = set()
        self._taken: set[socket.socket] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Condition()
        self._listening: socket.socket | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._port = free_port()
        self.accept()

    @property
    def address(self) -> str:
        """Where clients connect to."""
        return f"127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """Port of the address."""
        return self._port

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def hold(self, *ways: Way) -> None:
        """Data stops (both ways if none is given): it is taken, and goes nowhere; nobody learns of a broken peer."""
        self._do(self._set_open, ways or tuple(Way), False)

    def release(self) -> None:
        """All that is held goes on, in both directions."""
        self._do(self._set_open, tuple(Way), True)

    def reset(self) -> None:
        """Ends every connection at once; what was held is lost."""
        self._do(self._reset)

    def strand(self) -> None:
        """The connections there are go silent for ever, as when a router forgets them; new ones work."""
        self._stranded.update(self._connections)

    def refuse(self) -> None:
        """Turns new connections away."""
        self._do(self._stop_listening)

    def accept(self) -> None:
        """Takes connections (again)."""
        self._do(self._listen)

    def cut_after(self, count: int, way: Way) -> None:
        """Resets the connection over which byte `count` from now on passes in a direction, right behind that byte."""
        self._cut[way] = count

    @contextlib.contextmanager
    def trap(self, pattern: bytes, at: At) -> Iterator[Trap]:
        """Holds connections that send these bytes to the server; at the end what is held still goes on."""
        trap = Trap(pattern, at)
        self._traps.append(trap)
        try:
            yield trap
        finally:
            self.free(trap)

    def free(self, trap: Trap, *, drop: bool = False) -> None:
        """Ends a trap: what it holds goes on, or is dropped with its connections."""
        if trap in self._traps:
            self._traps.remove(trap)
            trap.drops = drop
            self._do(self._free, trap)

    def close(self) -> None:
        """Ends everything."""
        for trap in list(self._traps):
            self.free(trap, drop=True)
        self._do(self._stop_listening)
        self._do(self._reset)
        self._do(self._finish)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside the loop.

    def _do(self, work: Callable[..., Any], *arguments: Any) -> None:
        asyncio.run_coroutine_threadsafe(work(*arguments), self._loop).result(20)

    async def _set_open(self, ways: tuple[Way, ...], is_open: bool) -> None:
        async with self._changed:
            self._open.update(dict.fromkeys(ways, is_open))
            self._changed.notify_all()

    async def _reset(self) -> None:
        for connection in list(self._connections):
            connection.reset()
        self._connections.clear()
        async with self._changed:
            self._changed.notify_all()

    async def _free(self, trap: Trap) -> None:
        trap.freed.set()

    async def _listen(self) -> None:
        if self._listening is None:
            self._listening = socket.create_server(("127.0.0.1", self._port), backlog=128)
            self._listening.setblocking(False)
            self._loop.add_reader(self._listening, self._take)

    async def _stop_listening(self) -> None:
        # asyncio's own server, closed while a connection comes in, leaves that one open and unknown to anybody.
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None

    def _take(self) -> None:
        assert self._listening is not None
        with contextlib.suppress(BlockingIOError):
            taken, _ = self._listening.accept()
            taken.setblocking(False)
            self._taken.add(taken)
            serving = self._loop.create_task(self._serve(taken))
            self._serving.add(serving)
            serving.add_done_callback(self._serving.discard)

    async def _finish(self) -> None:
        for _ in range(5):  # what is closed ends in the loop's next turns
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.005)
        for taken in self._taken:
            taken.close()

    async def _serve(self, taken: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=taken)
        self._taken.discard(taken)
        try:
            server = await self._connect()
        except BaseException:
            reset(writer)
            raise
        if server is None:
            reset(writer)
            return
        connection = Connection((reader, writer), server)
        self._connections.add(connection)
        pumps = [asyncio.ensure_future(self._pump(connection, way)) for way in Way]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if connection in self._stranded:  # an end of one side does not reach the other
                await asyncio.wait(pumps)
            await self._wait_open(Way.UP)
            await self._wait_open(Way.DOWN)
        finally:
            self._connections.discard(connection)
            self._stranded.discard(connection)
            connection.reset()  # first: this may be cancelled, too
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        try:
            return await asyncio.open_connection(*self.target)
        except OSError:
            await self._wait_open(Way.DOWN)  # a black hole does not tell that nobody is behind it
            return None

    async def _pump(self, connection: Connection, way: Way) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_UNDER_WAY)
        taking = asyncio.ensure_future(self._take_in(connection, way, under_way))
        try:
            while True:
                taken_at, data = await under_way.get()
                if not data or not await self._pass_on(connection, way, data, taken_at=taken_at):
                    return
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def _take_in(self, connection: Connection, way: Way, under_way: "asyncio.Queue[tuple[float, bytes]]") -> None:
        """Reads what one side sends; no data at its end."""
        source = (connection.client if way is Way.UP else connection.server)[0]
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                self.taken[way] += len(data)
                if not await self._pass_traps(connection, way, data):
                    connection.reset()
                    break
                await under_way.put((self._loop.time(), data))
        await under_way.put((0.0, b""))

    async def _pass_on(self, connection: Connection, way: Way, data: bytes, *, taken_at: float) -> bool:
        """Writes to the other side what is due; whether the connection goes on."""
        sink = (connection.server if way is Way.UP else connection.client)[1]
        if self.delay_s:
            await asyncio.sleep(taken_at + self.delay_s - self._loop.time())
        if self.bytes_per_s:
            await asyncio.sleep(len(data) / self.bytes_per_s)
        await self._wait_open(way)
        if connection in self._stranded:
            return True
        if connection not in self._connections:
            return False
        left = self._cut.get(way)
        if left is not None and left <= len(data):
            del self._cut[way]
            sink.write(data[:left])
            await sink.drain()
            connection.reset()
            return False
        if left is not None:
            self._cut[way] = left - len(data)
        self.on_data(way, data)
        self.passed[way] += len(data)
        sink.write(data)
        await sink.drain()
        return True

    async def _pass_traps(self, connection: Connection, way: Way, data: bytes) -> bool:
        """Waits where a trap holds the connection; whether it may go on."""
        if way is Way.UP:
            seen, held = connection.tail + data, []
            for trap in self._traps:
                # Only what ends in the new data is new: the tail was looked at before.
                if trap.pattern in seen[max(0, len(connection.tail) - len(trap.pattern) + 1) :]:
                    (held if trap.at is At.REQUEST else connection.awaits_reply).append(trap)
            connection.tail = seen[-256:]
        else:
            held, connection.awaits_reply = connection.awaits_reply, []
        for trap in held:
            trap.caught.set()
            await trap.freed.wait()
        return not any(trap.drops for trap in held)

    async def _wait_open(self, way: Way) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._open[way])


def reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST instead of FIN."""
    with contextlib.suppress(OSError):
        bare = writer.get_extra_info("socket")
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def until(condition: Callable[[], object], *, within_s: float = 120.0, what: str | Callable[[], str] = "") -> float:
    """Waits for a condition; seconds it took. Fails when it does not come about, and says `what` did not.

    Time in which the machine stood still, as virtual ones do, is not held against the condition.
    """
    started = last = monotonic()
    patience_s = within_s
    while not condition():
        assert patience_s > 0, f"not within {within_s} s: {(what() if callable(what) else what) or condition}"
        sleep(0.002)
        now = monotonic()
        patience_s -= min(now - last, STANDSTILL_S)
        last = now
    return monotonic() - started
