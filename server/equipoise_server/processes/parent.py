"""The parent of a server's processes."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Coroutine, Mapping

import structlog

from equipoise_server import logs
from equipoise_server.metrics import Endpoint, ParentMetrics, ServerStatus
from equipoise_server.part import Part, own_addresses
from equipoise_server.processes.child import SILENT, Child
from equipoise_server.processes.directory import PrivateDirectory
from equipoise_server.processes.ports import Port
from equipoise_server.settings import Settings, SettingsError
from equipoise_server.store import EmbeddedRedis, StoreError, Usage

log = structlog.get_logger("equipoise.processes")

START_FAILED = 1
PAUSE_S = (0.1, 10.0)
"""Before a process is started again, the first time and at most: twice as long each time."""
STEADY_S = 60.0
"""A process that has run for so long is started again as if it were the first time."""
STOP_S = 20.0
"""Beyond its own grace, what a process takes to write what is left: after that it is killed."""
USAGE_CHECK_S = 5.0


class ProcessFailed(Exception):  # noqa: N818 - as the rest of the tree
    """A process ended before all of them served; it has said why."""


class Parent:
    """Runs processes from start to stop. Created and run inside one event loop, on the main thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stack = contextlib.AsyncExitStack()
        self._metrics = ParentMetrics(processes=settings.processes)
        self._children: list[Child] = []
        self._redis: EmbeddedRedis | None = None
        self._usage: Usage | None = None
        self._waits_for = "the server is starting"
        self._together = False
        self._stopping = False
        self._scraping = asyncio.Lock()

    def kill(self) -> None:
        """Ends every process at once."""
        for child in self._children:
            child.send_signal(signal.SIGKILL)

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set, then ends all processes in order.

        Raises SettingsError, StoreError, OSError, ProcessFailed: it did not start.
        """
        async with self._stack:
            stopped = asyncio.create_task(stop.wait())
            serving = asyncio.create_task(self._serve())
            await asyncio.wait((stopped, serving), return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if not serving.done():
                self._stopping = True
                log.info("stopping", grace_s=self._settings.drain_grace_s)
            await self._end_children()
            serving.cancel()  # what is left of it waits to start a process again
            try:
                await serving
            except asyncio.CancelledError:
                pass
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        log.info("stopped")

    async def _serve(self) -> None:
        settings = self._settings
        url, _ = settings.redis, settings.redis_access  # raise for what cannot be used, once instead of by each process
        directory = PrivateDirectory()
        self._stack.callback(directory.remove)
        metrics_address = await self._start_metrics()
        shared = self._port(settings.listen, setting="listen")
        own = [
            (self._port(listen, setting=f"processes: the address of process {number}"), advertise)
            for number, (listen, advertise) in enumerate(own_addresses(settings))
        ]
        own_redis_url = await self._start_redis() if url is None else ""
        self._children = [
            Child(
                Part(
                    number=number,
                    processes=settings.processes,
                    shared=shared.address,
                    own=port.address,
                    advertise=advertise,
                    redis_url=own_redis_url,
                    directory=directory.path,
                ),
                settings,
            )
            for number, (port, advertise) in enumerate(own)
        ]
        self._waits_for = "its processes are starting"
        async with asyncio.TaskGroup() as group:
            for child in self._children:
                group.create_task(self._keep(child))
            await asyncio.gather(*(child.served() for child in self._children))
            self._together = True
            for child in self._children:
                child.meet_others()
            self._announce(shared.address, metrics_address)
            log.info(
                "serving",
                address=shared.address,
                metrics=metrics_address,
                processes={child.number: child.pid for child in self._children},
            )

    def _port(self, address: str, *, setting: str) -> Port:
        port = Port(address, setting=setting)
        self._stack.callback(port.close)
        return port

    async def _start_metrics(self) -> str:
        listen = self._settings.metrics_listen
        if not listen:
            return ""
        endpoint = Endpoint(self._page, ready=self._ready, alive=self._alive)
        try:
            address = await endpoint.start(listen)
        except OSError as error:
            raise SettingsError(f"metrics_listen: {listen!r} cannot be bound: {error.strerror}") from error
        self._stack.push_async_callback(endpoint.stop)
        return address

    async def _start_redis(self) -> str:
        settings = self._settings
        self._waits_for = "redis has not been reached yet: its own Redis is loading its file"
        redis = EmbeddedRedis(settings.data_dir, fsync=settings.fsync, on_sync_change=self._note_sync)
        await redis.start()
        self._redis = redis
        self._stack.push_async_callback(redis.stop)
        for work in (
            redis.supervise(on_exit=lambda status: log.error("redis ended", status=status)),
            self._watch_usage(redis),
        ):
            self._stack.callback(_begun(work).cancel)
        return redis.url

    def _note_sync(self, error: OSError | None) -> None:
        self._metrics.store.syncs(failing=error is not None)
        if error is None:
            log.info("the files of redis reach the disk again")
        else:
            log.error("the files of redis do not reach the disk", error=str(error))

    async def _watch_usage(self, redis: EmbeddedRedis) -> None:
        while True:
            with contextlib.suppress(OSError):  # its files are being rewritten
                self._usage = await redis.usage()
            await asyncio.sleep(USAGE_CHECK_S)

    async def _keep(self, child: Child) -> None:
        """Starts a process, and again whenever it has ended by itself."""
        clock = asyncio.get_running_loop().time
        pause_s, longest_s = PAUSE_S
        while not self._stopping:
            began = clock()
            try:
                await child.start()
            except OSError as error:
                if not self._together:
                    raise
                status = f"it was not started: {error}"
            else:
                status = str(await self._attend(child))
            if self._stopping:
                return
            if not self._together:
                raise ProcessFailed(f"process {child.number} ended with {status} before all served")
            self._metrics.exited()
            if clock() - began >= STEADY_S:
                pause_s = PAUSE_S[0]
            log.error("a process ended and is started again", process=child.number, status=status, pause_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    async def _attend(self, child: Child) -> int:
        """Looks after a process that was started until it has ended; its exit status."""
        if self._together:
            child.meet_others()
        if self._stopping:  # while it was being started
            child.send_signal(signal.SIGTERM)
        looking = [_begun(work) for work in (child.served(), child.watch())]
        try:
            return await child.wait()
        finally:
            for task in looking:
                task.cancel()
            self._metrics.merged.ended(child.number)

    async def _end_children(self) -> None:
        """All drain at once; one that does not end is killed."""
        self._stopping = True
        for child in self._children:
            child.send_signal(signal.SIGTERM)
        running = [asyncio.create_task(child.wait()) for child in self._children if child.pid]
        if not running:
            return
        patience_s = self._settings.drain_delay_s + self._settings.drain_grace_s + STOP_S
        _, late = await asyncio.wait(running, timeout=patience_s)
        if late:
            log.error("processes do not end and are killed", count=len(late))
            self.kill()
            await asyncio.wait(late)

    async def _ready(self) -> Mapping[str, str]:
        """Ready while one process is: the others' trainers wait for theirs, wherever they ask."""
        checks = {
            "drain": "the server is stopping" if self._stopping else "",
            "startup": "" if self._together else self._waits_for,
        }
        if self._together:
            lacking = [f"process {child.number}: {child.lacks}" for child in self._children if child.lacks]
            checks["processes"] = "; ".join(lacking) if len(lacking) == len(self._children) else ""
        return checks

    async def _alive(self) -> Mapping[str, str]:
        """Every process that has begun answers; one that has ended, or hangs for long, is the parent's to replace."""
        return {"event-loop": ""} | {
            f"process-{child.number}": f"process {child.number} does not answer" if child.lacks == SILENT else ""
            for child in self._children
        }

    async def _page(self, accept: str) -> tuple[bytes, str]:
        async with self._scraping:  # counters must not be told in another order than they grew in
            await asyncio.gather(*(self._hear(child) for child in self._children if child.lacks != SILENT))
            status = ServerStatus(
                checks=await self._ready(),
                draining=self._stopping,
                own_redis=self._usage,
                own_redis_exits=self._redis.exits if self._redis else None,
            )
            running = sum(child.serves for child in self._children)
            return self._metrics.exposition(status, running=running, accept=accept)

    async def _hear(self, child: Child) -> None:
        pid = child.pid
        with contextlib.suppress(OSError):  # it is told as it was
            well, page = await child.ask("/metrics")
            if well and child.serves and child.pid == pid:
                self._metrics.merged.told(child.number, page)

    def _announce(self, address: str, metrics_address: str) -> None:
        if (path := self._settings.ready_file) is None:
            return
        facts = {"address": address, "metrics_address": metrics_address, "pid": os.getpid()}
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(facts), encoding="utf-8")
        unfinished.replace(path)


def _begun(work: Coroutine[None, None, None]) -> asyncio.Task[None]:
    """A task in the background, whose failure is told."""
    task = asyncio.create_task(work)
    task.add_done_callback(_tell_failure)
    return task


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("a background task ended", exc_info=error)


def run_all(settings: Settings) -> int:
    """Serves with several processes until SIGTERM or SIGINT; a second one ends all at once. Returns the exit status."""
    logs.configure(level=settings.log_level, form=settings.log_format)
    try:
        asyncio.run(_run(settings))
    except (SettingsError, StoreError, OSError, ValueError, ProcessFailed) as error:
        log.error("the server did not start", error=str(error))
        print(f"equipoise serve: {error}", file=sys.stderr)
        return START_FAILED
    return 0


async def _run(settings: Settings) -> None:
    stop = asyncio.Event()
    parent = Parent(settings)

    def on_signal() -> None:
        if stop.is_set():
            parent.kill()
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    await parent.run(stop)
