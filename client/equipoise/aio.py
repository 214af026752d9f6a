"""The client for asyncio: the names, arguments and promises of `equipoise.PolicyClient` and `equipoise.PolicyAdmin`.

What asks the server is awaited. `submit`, `weights`, `stats`, `state_dict` and `load_state_dict` ask nobody and are
plain calls. A client belongs to the event loop it was first used in.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import archive, calls, errors
from equipoise.calls import Call, Field
from equipoise.channel import Server
from equipoise.policies import ListedPolicy, PolicySpec, PolicyStatus, ServerInfo
from equipoise.results import StepResult
from equipoise.route import Route
from equipoise.security import Security
from equipoise.session import Opening, Session
from equipoise.trainer import Trainer
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise.window import Ticket
from equipoise.wire import StepFields

__all__ = ["PolicyAdmin", "PolicyClient"]

logger = logging.getLogger("equipoise")

T = TypeVar("T")


class PolicyClient(Trainer):
    """As `equipoise.PolicyClient`, for asyncio.

    Example:
        >>> async with PolicyClient("localhost:50051", policy="run-7", num_examples=50_000) as client:
        ...     weights = (await client.step(ids, contributions=contributions)).weights
    """

    _stream: "_Stream | None"
    _admin: "PolicyAdmin | None"

    async def step(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> StepResult:
        """As `equipoise.PolicyClient.step`."""
        stream = self._connected()
        return await stream.settle(self._session.step(ids, fields, now=monotonic(), waits=True))

    def submit(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> None:
        """As `equipoise.PolicyClient.submit`; a plain call, within a running event loop."""
        stream = self._connected()
        self._session.step(ids, fields, now=monotonic(), waits=False)
        stream.notify()

    async def read(self, ids: ArrayLike | None = None, *, step: int | None = None) -> StepResult:
        """As `equipoise.PolicyClient.read`."""
        stream = self._connected()
        return await stream.settle(self._session.read(ids, step=step, now=monotonic()))

    async def flush(self, timeout: float | None = None, *, durable: bool = False) -> bool:
        """As `equipoise.PolicyClient.flush`."""
        done = await self._connected().flush(self._patience if timeout is None else timeout, durable=durable)
        self._session.raise_unreported()
        return done

    async def read_weights(
        self, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> NDArray[np.float32]:
        """As `equipoise.PolicyClient.read_weights`."""
        return await self.admin.read_weights(self.policy, field, ids, rows=rows)

    async def preload(self) -> None:
        """As `equipoise.PolicyClient.preload`."""
        status = await self.status()
        ids = np.arange(min(status.spec.num_examples, self._options.limits.cached_examples))
        weights = await self.read_weights(ids=ids)
        self._session.preload(weights, uid=status.uid, num_examples=status.spec.num_examples)

    async def sample_examples(
        self, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        """As `equipoise.PolicyClient.sample_examples`."""
        return await self.admin.sample_examples(self.policy, count, with_replacement=with_replacement, seed=seed)

    async def status(self) -> PolicyStatus:
        """As `equipoise.PolicyClient.status`."""
        return await self.admin.get(self.policy)

    def watch(self, *, min_interval: float = 1.0) -> AsyncIterator[PolicyStatus]:
        """As `equipoise.PolicyClient.watch`."""
        return self.admin.watch(self.policy, min_interval=min_interval)

    async def server_info(self) -> ServerInfo:
        """As `equipoise.PolicyClient.server_info`."""
        return await self.admin.server_info()

    async def delete(self) -> None:
        """As `equipoise.PolicyClient.delete`."""
        await self.admin.delete(self.policy)

    @property
    def admin(self) -> "PolicyAdmin":
        """As `equipoise.PolicyClient.admin`."""
        self._check_open()
        if self._admin is None:
            self._admin = PolicyAdmin(self.address, timeout=self._options.timeout.call, security=self._route.security)
        return self._admin

    async def close(self) -> None:
        """As `equipoise.PolicyClient.close`."""
        if self._closed:
            return
        self._closed = True
        if self._admin is not None:
            await self._admin.close()
        if self._stream is None:
            return
        end = monotonic() + self._options.timeout.close
        while not self._session.unreachable and monotonic() < end:
            if await self._stream.flush(_PROBE_SECONDS, durable=False):
                break
        self._note_unanswered()
        await self._stream.close(max(0.1, end - monotonic()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _start(self, trainer_id: str | None) -> None:
        super()._start(trainer_id)
        self._stream = None
        self._admin = None

    def _connected(self) -> "_Stream":
        self._check_open()
        if self._stream is None:
            self._stream = _Stream(self._session, self._route)
        return self._stream


class PolicyAdmin:
    """As `equipoise.PolicyAdmin`, for asyncio."""

    def __init__(self, address: str, *, timeout: float = 10.0, security: Security | None = None) -> None:
        self.address = address
        self._timeout = timeout
        self._route = Route(address, security)
        self._channels: dict[Server, grpc.aio.Channel] = {}

    async def create(self, spec: PolicySpec) -> PolicyStatus:
        """As `equipoise.PolicyAdmin.create`."""
        return await self._do(calls.create(spec))

    async def fork(self, source: str, name: str) -> PolicyStatus:
        """As `equipoise.PolicyAdmin.fork`."""
        return await self._do(calls.fork(source, name))

    async def get(self, policy: str) -> PolicyStatus:
        """As `equipoise.PolicyAdmin.get`."""
        return await self._do(calls.get(policy))

    async def list_policies(self, prefix: str = "") -> AsyncIterator[ListedPolicy]:
        """As `equipoise.PolicyAdmin.list_policies`."""
        token, more = "", True
        while more:
            page, token = await self._do(calls.list_page(prefix, token))
            for policy in page:
                yield policy
            more = bool(token)

    async def delete(self, policy: str, *, uid: str = "") -> None:
        """As `equipoise.PolicyAdmin.delete`."""
        await self._do(calls.delete(policy, uid=uid))

    def watch(self, policy: str, *, min_interval: float = 1.0) -> AsyncIterator[PolicyStatus]:
        """As `equipoise.PolicyAdmin.watch`."""
        return self._stream(calls.watch(policy, min_interval=min_interval), timeout=None)

    async def read_weights(
        self, policy: str, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> NDArray[np.float32]:
        """As `equipoise.PolicyAdmin.read_weights`."""
        values = calls.Values(rows)
        async for chunk in self._stream(calls.read_values(policy, field, ids, rows), timeout=None):
            values.add(chunk)
        return values.array()

    async def sample_examples(
        self, policy: str, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        """As `equipoise.PolicyAdmin.sample_examples`."""
        return await self._do(calls.sample(policy, count, with_replacement=with_replacement, seed=seed))

    async def export_policy(self, policy: str, path: str | Path) -> int:
        """As `equipoise.PolicyAdmin.export_policy`."""
        await self.get(policy)  # finds the owner
        state = await asyncio.to_thread(archive.export_policy, self._route.server, policy)
        await asyncio.to_thread(state.save, Path(path))
        return state.version

    async def import_policy(self, path: str | Path, name: str) -> PolicyStatus:
        """As `equipoise.PolicyAdmin.import_policy`."""
        state = await asyncio.to_thread(archive.PolicyArchive.load, Path(path))
        return await asyncio.to_thread(archive.import_policy, self._route.server, state, name)

    async def server_info(self) -> ServerInfo:
        """As `equipoise.PolicyAdmin.server_info`."""
        return await self._do(calls.server_info())

    async def close(self) -> None:
        """Disconnects."""
        for channel in self._channels.values():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, call: Call[T]) -> T:
        for attempt in count(1):
            server = self._route.server
            try:
                method = getattr(self._stub(server), call.method)
                metadata = server.headers(call.policy)
                return call.parse(await method(call.request, timeout=self._timeout, metadata=metadata))
            except grpc.RpcError as failure:
                error = errors.from_rpc(failure, address=server.address)
                if not self._route.repeats(error, method=call.method) or attempt == self._route.attempts:
                    raise error from failure
        raise AssertionError("unreachable")

    async def _stream(self, call: Call[T], *, timeout: float | None) -> AsyncIterator[T]:
        for attempt in count(1):
            server, begun = self._route.server, False
            method = getattr(self._stub(server), call.method)
            stream = method(call.request, timeout=timeout, metadata=server.headers(call.policy))
            try:
                async for message in stream:
                    begun = True
                    yield call.parse(message)
                return
            except grpc.RpcError as failure:
                error = errors.from_rpc(failure, address=server.address)
                repeats = self._route.repeats(error, method=call.method)
                if begun or not repeats or attempt == self._route.attempts:
                    raise error from failure
            finally:
                stream.cancel()

    def _stub(self, server: Server) -> Any:
        if server not in self._channels:
            self._channels[server] = server.aio_channel()
        return PolicyServiceStub(self._channels[server])


class _Signal:
    """Wakes all who wait for a change."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Something has changed."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, timeout: float | None) -> None:
        """Waits for a change, at most so many seconds."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await waiter
        finally:
            self._waiters.discard(waiter)


class _Stream:
    """Carries one session: a task that opens the stream, reads it, and opens it again.

    All over one channel, or over a new one to another server or after certificates were replaced.
    """

    def __init__(self, session: Session, route: Route) -> None:
        self._session = session
        self._route = route
        self._open_channel()
        self._work = _Signal()
        self._answers = _Signal()
        self._call: Any = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name="equipoise-stream")

    def notify(self) -> None:
        """The session has something to do."""
        self._work.notify()

    async def settle(self, ticket: Ticket) -> StepResult:
        """Waits until a ticket is settled or has expired."""
        self._work.notify()
        # While the server is lost answers are there at once: even then a loop of steps must let its stream reconnect.
        await asyncio.sleep(0)
        while not ticket.settled and (rest := ticket.deadline - monotonic()) > 0:
            await self._answers.wait(rest)
        self._session.expire(ticket, monotonic())
        return ticket.value()

    async def flush(self, timeout: float, *, durable: bool) -> bool:
        """Waits until every step is answered (and durable); whether that is so."""
        end = monotonic() + timeout
        probe_at = 0.0
        while not self._session.flushed(durable=durable) and (rest := end - (now := monotonic())) > 0:
            if durable and now >= probe_at:
                self._session.probe(now)
                self._work.notify()
                probe_at = now + _PROBE_SECONDS
            await self._answers.wait(min(rest, _PROBE_SECONDS))
        return self._session.flushed(durable=durable)

    async def close(self, timeout: float) -> None:
        """Ends the stream, within the timeout."""
        self._session.fail(errors.ClientClosedError("the client was closed"), monotonic())
        self._notify_all()
        self._task.cancel()
        await asyncio.wait([self._task], timeout=timeout)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._channel.close()

    def _notify_all(self) -> None:
        self._work.notify()
        self._answers.notify()

    async def _run(self) -> None:
        while (opening := await self._next_opening()) is not None:
            error: errors.EquipoiseError | None = None
            try:
                await self._converse(opening)
            except grpc.RpcError as failure:
                error = errors.from_rpc(failure, address=self._address)
            except errors.EquipoiseError as failure:
                error = failure
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # there is one: this
                    raise
                # A call that ended with CANCELLED, by the peer or by our watchdog, looks like a cancelled task.
                error = errors.UnavailableError(f"{self._address}: the stream was cancelled")
            except Exception:
                logger.exception("%s: a bug in the client ended its stream", self._address)
                error = errors.EquipoiseError(f"{self._address}: a bug in the client ended its stream")
            self._route.turn(error)
            self._session.ended(error, monotonic())
            self._notify_all()

    def _open_channel(self) -> None:
        self._server = self._route.server
        self._address = self._server.address
        self._certificates = self._server.security.stamp()
        self._channel = self._server.aio_channel()
        self._stub: Any = PolicyServiceStub(self._channel)

    async def _next_opening(self) -> Opening | None:
        while self._session.failure is None:
            at = self._session.connect_at
            now = monotonic()
            if at is not None and at <= now:
                return self._session.begin()
            await self._work.wait(None if at is None else at - now)
        return None

    async def _converse(self, opening: Opening) -> None:
        timeout = self._session.options.timeout.connect
        if self._server != self._route.server or self._certificates != self._server.security.stamp():
            await self._channel.close()
            self._open_channel()
        metadata = self._server.headers(self._session.options.spec.name)
        if opening.create is not None:
            await self._stub.CreatePolicy(opening.create, timeout=timeout, metadata=metadata)
        if opening.asks_limits:
            info = await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout, metadata=metadata)
            self._session.limit(info.max_batch_examples)
        call = self._stub.Exchange(self._messages(opening.generation), metadata=metadata)
        # A server that takes the stream and says nothing must not hold it for ever.
        watchdog = asyncio.get_running_loop().call_later(timeout, self._cancel_unopened, call, opening.generation)
        try:
            async for message in call:
                self._session.received(message, monotonic())
                self._notify_all()
                if self._session.left:
                    return
        finally:
            watchdog.cancel()
            call.cancel()
        raise errors.UnavailableError(f"{self._address}: the server ended the stream")

    async def _messages(self, generation: int) -> AsyncIterator[pb.ExchangeRequest]:
        while True:
            while (message := self._session.next_message(generation)) is None:
                if self._session.is_void(generation):
                    return
                await self._work.wait(None)
            yield message

    def _cancel_unopened(self, call: Any, generation: int) -> None:
        if self._session.is_opening(generation):
            call.cancel()


_PROBE_SECONDS = 0.02
"""How often a flush asks whether the steps are durable, seconds."""
