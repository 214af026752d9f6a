"""The composition root: settings in, a running server out, and its orderly end."""

import asyncio
import contextlib
import gc
import json
import os
import platform
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import grpc
import structlog
import torch
from grpc_health.v1 import health, health_pb2_grpc

from equipoise.v1 import policy_pb2, policy_pb2_grpc
from equipoise_server import logs
from equipoise_server.addresses import bindable, reachable
from equipoise_server.engine import (
    Device,
    Engine,
    EngineLimits,
    choose_device,
    describe_device,
    give_back_freed,
    tune_allocator,
)
from equipoise_server.errors import draining
from equipoise_server.health import Health
from equipoise_server.interceptors import EdgeInterceptor
from equipoise_server.metrics import Endpoint, Metrics, measure_lag
from equipoise_server.overview import Overview
from equipoise_server.part import Part
from equipoise_server.redis_url import RedisUrl
from equipoise_server.reflection import add_reflection
from equipoise_server.security import (
    SERVICE,
    Access,
    CallLimits,
    Calls,
    CertificateError,
    CertificateFiles,
    Certificates,
    TokenFileError,
    is_exposed,
)
from equipoise_server.servicer import PolicyServicer, ServiceLimits
from equipoise_server.settings import Settings, SettingsError
from equipoise_server.store import EmbeddedRedis, RedisStore, StoreError, Unavailable

log = structlog.get_logger("equipoise.server")

REDIS_CHECK_S = 1.0
ACCESS_CHECK_S = 1.0
USAGE_CHECK_S = 5.0
FLUSH_TIMEOUT_S = 10.0
SAY_LEAVING_S = 0.25
"""How long streams wait to be asked to leave until the other servers can know of it; Redis may be slow."""
LAST_WORD_S = 2.0
"""How long before the end of the grace streams that do not leave are ended."""
SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter from the event loop, seconds: Python's own 5 ms are many steps long."""
START_FAILED = 1
OTHERS = "processes"
"""Name of the check that the other processes of the server serve, too."""
REFUSALS_AT_ONCE = 4096
"""Calls beyond `max_concurrent_rpcs` that may be about to be refused: each takes a moment."""
STREAM_WINDOW_BYTES = 1 << 20
"""What a client may send ahead of being read, for each of its streams."""
MAX_PING_STRIKES = 30
"""Pings faster than `min_ping_interval_s`, while nothing is sent, after which a client is disconnected."""


class Server:
    """One server, from start to stop. Created and run inside one event loop, on the main thread.

    Args:
        settings: of this server; of one among several processes, its own.
        part: which process it is; None: the only one.
    """

    def __init__(self, settings: Settings, *, part: Part | None = None) -> None:
        self._settings = settings
        self._part = part
        self._stack = contextlib.AsyncExitStack()
        # A Redis of its own serves no other server: who finds a policy there owns it.
        self._instance = secrets.token_hex(8) if settings.redis or part else ""
        self._redis_trouble = ""
        self._address_shared_until = 0.0
        self._health = Health("redis", *((OTHERS,) if part else ()))
        self._health.lacks(OTHERS, "they are starting")
        self._access = Access(settings.tokens_file)
        self._calls = Calls(
            CallLimits(max_calls=settings.max_concurrent_rpcs, max_tenant_calls=settings.max_tenant_rpcs)
        )
        self._overview = Overview(settings=settings, health=self._health, access=self._access, calls=self._calls)
        self._metrics = Metrics(
            build=_build_facts(), max_policies=settings.metrics_max_policies, tenant_of=self._access.tenant_of
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._takes_policies = settings.spread_policies
        self._leaving = False

    async def meet_others(self) -> None:
        """All processes of the server have started: from now on each may speak for all."""
        await self._health.reached(OTHERS)

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set, then drains: no new work, streams reconnect elsewhere, state is written."""
        async with self._stack:
            await self._start()
            await stop.wait()
            await self._drain()

    async def _start(self) -> None:
        settings = self._settings
        for name in ("tls_key", "tokens_file", "redis_url_file", "redis_password_file", "redis_sentinel_password_file"):
            path = getattr(settings, name)
            if path is not None and is_exposed(path):
                log.warning("every user of this machine can read a secret: chmod o-r", setting=name, path=str(path))
        try:
            self._access.load()
        except TokenFileError as error:
            raise SettingsError(f"tokens_file: {error}") from error
        metrics_address = await self._start_metrics()  # first: whoever watches learns that it lives, and why it waits
        self._store = await self._connect_store()
        self._device = self._overview.device = Device(choose_device(settings.device), share=self._access.share)
        self._stack.callback(self._device.close)
        self._engine = self._overview.engine = Engine(
            self._store,
            self._device,
            address=settings.listen,
            limits=_engine_limits(settings),
            telemetry=self._metrics,
            instance=self._instance,
            spreads=settings.spread_policies,
        )
        self._servicer = self._overview.servicer = PolicyServicer(
            self._engine,
            limits=_service_limits(settings, describe_device(self._device.device)),
            telemetry=self._metrics,
            share=self._access.share,
        )
        await self._start_grpc()
        self._spawn(self._watch_redis())
        self._spawn(measure_lag(self._metrics.event_loop_lag))
        self._spawn(self._unload_idle())
        self._spawn(self._watch_access())
        self._stack.push_async_callback(self._end_tasks)
        _announce(settings.ready_file, address=self.address, metrics_address=metrics_address)
        # What is here now stays: a full collection that looks at all of it again would stop the event loop for 0.1 s.
        gc.collect()
        gc.freeze()
        log.info(
            "serving",
            address=self.address,
            advertised=self._engine.address,
            metrics=metrics_address,
            device=describe_device(self._device.device),
        )

    async def _connect_store(self) -> RedisStore:
        settings = self._settings
        url: RedisUrl | str | None = settings.redis
        access = settings.redis_access
        if url is None and self._part is not None:
            url = self._part.redis_url
        elif url is None:
            embedded = EmbeddedRedis(settings.data_dir, fsync=settings.fsync, on_sync_change=self._note_sync)
            self._health.lacks("redis", "its own Redis is loading its file")
            await embedded.start()
            self._overview.own_redis = embedded
            self._spawn(self._watch_usage(embedded))
            self._stack.push_async_callback(embedded.stop)
            self._spawn(embedded.supervise(on_exit=lambda status: log.error("redis ended", status=status)))
            url = embedded.url
        store = RedisStore.connect(
            url,
            access=access,
            command_timeout_s=settings.redis_timeout_s,
            observer=self._metrics.store,
            confirms_writes=settings.redis is None and settings.fsync != "always",
            wait_replicas=settings.redis_wait_replicas,
        )
        self._stack.push_async_callback(store.close)
        return store

    def _note_sync(self, error: OSError | None) -> None:
        self._metrics.store.syncs(failing=error is not None)
        if error is None:
            log.info("the files of redis reach the disk again")
        else:
            log.error("the files of redis do not reach the disk", error=str(error))

    async def _start_grpc(self) -> None:
        settings = self._settings
        self._grpc = grpc.aio.server(
            interceptors=[
                EdgeInterceptor(
                    self._metrics.rpc,
                    self._access,
                    self._calls,
                    message_timeout_s=settings.first_message_timeout_s,
                    write_timeout_s=settings.write_timeout_s,
                )
            ],
            options=_grpc_options(settings, shares_port=self._part is not None),
            # `Calls` refuses with details, and keeps room for health; this is for what has not reached it yet.
            maximum_concurrent_rpcs=settings.max_concurrent_rpcs + REFUSALS_AT_ONCE,
        )
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(self._servicer, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._grpc)
        names = (policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name, health.SERVICE_NAME)
        add_reflection(names, self._grpc)
        try:
            port = self._bind()
        except RuntimeError as error:
            raise SettingsError(f"listen: {settings.listen!r} cannot be bound; is another server there?") from error
        self.address = f"{bindable(settings.listen).rpartition(':')[0]}:{port}"
        advertise, own = (self._part.advertise, self._part.own) if self._part else (settings.advertise, self.address)
        self._engine.address = advertise or reachable(own, os.environ)
        await self._health.start()
        # One without a heartbeat counts as gone: another server would take what this one has just acquired.
        with contextlib.suppress(StoreError, TimeoutError):  # without Redis nothing can be acquired either
            async with asyncio.timeout(settings.redis_timeout_s):
                await self._send_heartbeat()
        await self._grpc.start()

    def _bind(self) -> int:
        """Binds the address, and that of this process alone, if there are several; the port of the first."""
        settings = self._settings
        addresses = [settings.listen] if self._part is None else [self._part.shared, self._part.own]
        if settings.tls_certificate is None or settings.tls_key is None:
            ports = [self._grpc.add_insecure_port(bindable(address)) for address in addresses]
            return ports[0]
        files = CertificateFiles(
            certificate=settings.tls_certificate, key=settings.tls_key, client_ca=settings.tls_client_ca
        )
        try:
            certificates = self._overview.certificates = Certificates(files)
        except CertificateError as error:
            raise SettingsError(f"tls_certificate, tls_key or tls_client_ca: {error}") from error
        ports = [self._grpc.add_secure_port(bindable(address), certificates.credentials()) for address in addresses]
        return ports[0]

    async def _start_metrics(self) -> str:
        endpoint = Endpoint(self._page, ready=self._health.ready)
        if self._part is not None:
            await endpoint.start_private(self._part.socket)
            self._stack.push_async_callback(endpoint.stop)
            return ""
        if not self._settings.metrics_listen:
            return ""
        try:
            address = await endpoint.start(self._settings.metrics_listen)
        except OSError as error:
            message = f"metrics_listen: {self._settings.metrics_listen!r} cannot be bound: {error.strerror}"
            raise SettingsError(message) from error
        self._stack.push_async_callback(endpoint.stop)
        return address

    async def _page(self, accept: str) -> tuple[bytes, str]:
        if self._part is not None:
            return await self._metrics.told(self._overview.status)
        return await self._metrics.page(self._overview.status, accept=accept)

    async def _drain(self) -> None:
        log.info("stopping", grace_s=self._settings.drain_grace_s)
        await self._health.drain()
        self._takes_policies = False
        if self._instance:
            with contextlib.suppress(StoreError):  # others learn it by a heartbeat, or when they end
                await self._store.leave_servers(self._instance)
        await asyncio.sleep(self._settings.drain_delay_s)
        # Whoever watches the health has been told; neither he nor a tool's reflection must be waited for.
        self._calls.end(lambda _, method: None if method.startswith(SERVICE) else draining())
        self._leaving = True
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(SAY_LEAVING_S):
                await self._send_heartbeat()
        handing_over = asyncio.ensure_future(self._engine.hand_over(draining(), flush_timeout_s=FLUSH_TIMEOUT_S))
        grace_s = self._settings.drain_grace_s
        ending = asyncio.ensure_future(self._grpc.stop(grace_s))
        await asyncio.wait([ending], timeout=max(0.0, grace_s - min(LAST_WORD_S, grace_s / 2)))
        if not ending.done():  # streams that do not leave: they are told why, before gRPC ends them without a word
            await self._engine.close(draining(), flush_timeout_s=FLUSH_TIMEOUT_S)
        await ending
        handing_over.cancel()  # what waits for streams that have ended by now; policies that stop go on doing so
        await asyncio.wait([handing_over])
        await self._engine.close(draining(), flush_timeout_s=FLUSH_TIMEOUT_S)
        if self._instance:
            with contextlib.suppress(StoreError):
                await self._store.end_heartbeat(self._instance)
        log.info("stopped")

    async def _watch_redis(self) -> None:
        ask = self._store.probe
        while True:
            try:
                await ask()
                ask = self._store.ping  # what it can do at all it will go on doing
                takes_writes = await self._send_heartbeat()
                await self._engine.check_fences()
                # Without writes, what leaves memory could not be acquired again; a server that stops hands all over.
                if takes_writes and not self._health.draining:
                    await self._engine.balance()
            except StoreError as error:
                trouble = error.kind if isinstance(error, Unavailable) else str(error)
                if self._redis_trouble != trouble:
                    log.warning("redis cannot be used", error=str(error))
                self._overview.redis_up, self._redis_trouble = False, trouble
                self._health.lacks("redis", str(error))
            else:
                if not self._overview.redis_up:
                    log.info("redis answers")
                self._overview.redis_up, self._redis_trouble = True, ""
                await self._health.reached("redis")
            await asyncio.sleep(min(REDIS_CHECK_S, self._settings.owner_timeout_s / 4))

    async def _send_heartbeat(self) -> bool:
        """Whether Redis took it; it may answer and take nothing."""
        if not self._instance:
            return True
        ttl_s = self._settings.owner_timeout_s
        try:
            await self._store.heartbeat(
                self._instance,
                address=self._engine.address,
                load=self._engine.load if self._takes_policies else None,
                leaving=self._leaving,
                ttl_s=ttl_s,
            )
            self._note_namesake(
                await self._store.claim_address(self._instance, address=self._engine.address, ttl_s=ttl_s)
            )
        except Unavailable as error:
            if error.kind not in ("oom", "readonly", "misconf"):
                raise
            return False
        return True

    def _note_namesake(self, other: str) -> None:
        """Another server that advertises this one's address; empty: none has lately. Told once, until it is over."""
        now = asyncio.get_running_loop().time()
        if other:
            self._address_shared_until = now + self._settings.owner_timeout_s
            if not self._overview.address_shared:
                log.warning(
                    "another server advertises the same address: trainers that are sent there may meet either, and be"
                    " sent there again; give each its own (advertise)",
                    address=self._engine.address,
                    instance=self._instance,
                    other=other,
                )
        self._overview.address_shared = now < self._address_shared_until

    async def _watch_usage(self, redis: EmbeddedRedis) -> None:
        while True:
            with contextlib.suppress(OSError):  # its files are being rewritten
                self._overview.own_redis_usage = await redis.usage()
            await asyncio.sleep(USAGE_CHECK_S)

    async def _watch_access(self) -> None:
        while True:
            await asyncio.sleep(ACCESS_CHECK_S)
            self._access.refresh()
            self._calls.end(lambda who, _: self._access.objection(who))

    async def _unload_idle(self) -> None:
        released, rounds = 0, 0
        while True:
            await asyncio.sleep(min(self._settings.policy_idle_s, 10.0))
            await self._engine.unload_idle(idle_s=self._settings.policy_idle_s)
            if released != self._engine.released:
                released, rounds = self._engine.released, 2  # some of their work may end only now
            if rounds:
                rounds -= 1
                gc.collect()  # the errors that ended that work hold frames, with steps of megabytes in them
            await asyncio.to_thread(give_back_freed)

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a background task ended", exc_info=error)

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(settings: Settings, *, part: Part | None = None) -> int:
    """Serves until SIGTERM or SIGINT; a second one ends at once. Returns the exit status.

    One of several processes ends at once when its parent does, and otherwise in order, however many signals it gets.
    """
    logs.configure(level=settings.log_level, form=settings.log_format, process=part.number if part else None)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    cores = (os.cpu_count() or 1) // (part.processes if part else 1)
    torch.set_num_threads(max(1, cores - 1))  # a core is left to the event loop during long work
    tune_allocator()
    try:
        asyncio.run(_run(settings, part))
    except (SettingsError, StoreError, OSError, ValueError) as error:
        log.error("the server did not start", error=str(error))
        print(f"equipoise serve: {error}", file=sys.stderr)
        return START_FAILED
    return 0


async def _run(settings: Settings, part: Part | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set if part else _stopper(stop))
    server = Server(settings, part=part)
    if part is not None:
        threading.Thread(target=_hear_parent, args=(loop, server), name="parent", daemon=True).start()
    await server.run(stop)


def _hear_parent(loop: asyncio.AbstractEventLoop, server: Server) -> None:
    """Reads what the parent says: one line once all processes serve, and the end of the pipe when it has ended.

    It then ends at once, as if it had been killed, too: nothing is in the way of a server that is started anew.
    """
    if os.read(sys.stdin.fileno(), 1):
        asyncio.run_coroutine_threadsafe(server.meet_others(), loop)
        while os.read(sys.stdin.fileno(), 1):
            pass
    os._exit(1)


def _stopper(stop: asyncio.Event) -> Callable[[], None]:
    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    return on_signal


def _announce(ready_file: Path | None, *, address: str, metrics_address: str) -> None:
    """Tells whoever waits that the server serves; the file appears whole."""
    if ready_file is None:
        return
    facts = {"address": address, "metrics_address": metrics_address, "pid": os.getpid()}
    unfinished = ready_file.with_name(f"{ready_file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(facts), encoding="utf-8")
    unfinished.replace(ready_file)


def _build_facts() -> dict[str, str]:
    return {"version": version("equipoise"), "python": platform.python_version(), "grpcio": version("grpcio")}


def _engine_limits(settings: Settings) -> EngineLimits:
    return EngineLimits(
        trainer_idle_s=settings.trainer_idle_s,
        max_trainers=settings.max_trainers,
        max_queued_steps=settings.max_queued_steps,
        max_queued_bytes=settings.max_queued_bytes,
        log_timeout_s=settings.log_timeout_s,
        max_backlog_bytes=settings.max_backlog_bytes,
        max_backlogs_bytes=settings.max_backlogs_bytes,
        sweep_min_bytes=settings.sweep_min_bytes,
        sweep_bytes_per_s=settings.sweep_bytes_per_s,
    )


def _service_limits(settings: Settings, device: str) -> ServiceLimits:
    return ServiceLimits(
        max_batch_examples=settings.max_batch_examples,
        max_examples=settings.max_examples,
        max_message_bytes=settings.max_message_bytes,
        max_streams=settings.max_streams,
        max_import_bytes=settings.max_import_bytes,
        max_inflight_bytes=settings.max_inflight_bytes,
        max_tenant_inflight_bytes=settings.max_tenant_inflight_bytes,
        write_timeout_s=settings.write_timeout_s,
        first_message_timeout_s=settings.first_message_timeout_s,
        build_version=version("equipoise"),
        device=device,
    )


def _grpc_options(settings: Settings, *, shares_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.http2.bdp_probe", 0),  # else a stream that is not read fills the memory with what it sends
        ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
        ("grpc.so_reuseport", int(shares_port)),  # a second server on the port must fail, not share it
        ("grpc.http2.min_ping_interval_without_data_ms", round(settings.min_ping_interval_s * 1000)),
        # A client that reads slowly measures its bandwidth with a ping a second: that is no abuse yet.
        ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
    ]
