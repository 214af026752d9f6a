"""The client for asyncio: the names, arguments and promises of `equipoise.PolicyClient` and `equipoise.PolicyAdmin`.

What asks the server is awaited. `submit`, `weights`, `stats`, `state_dict` and `load_state_dict` ask nobody and are
plain calls. A client belongs to the event loop it was first used in.
"""

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import archive, calls, errors
from equipoise.aio_stream import Stream
from equipoise.calls import Call, Field
from equipoise.channel import Server
from equipoise.policies import ListedPolicy, PolicySpec, PolicyStatus, ServerInfo
from equipoise.results import StepResult
from equipoise.route import Route
from equipoise.security import Security, Stamp
from equipoise.session import PROBE_SECONDS
from equipoise.trainer import Trainer
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise.wire import StepFields

__all__ = ["PolicyAdmin", "PolicyClient"]

T = TypeVar("T")


class PolicyClient(Trainer):
    """As `equipoise.PolicyClient`, for asyncio.

    Example:
        >>> async with PolicyClient("localhost:50051", policy="run-7", num_examples=50_000) as client:
        ...     weights = (await client.step(ids, contributions=contributions)).weights
    """

    _stream: Stream | None
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
            if await self._stream.flush(PROBE_SECONDS, durable=False):
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

    def _connected(self) -> Stream:
        self._check_open()
        if self._stream is None:
            self._stream = Stream(self._session, self._route)
        return self._stream


class PolicyAdmin:
    """As `equipoise.PolicyAdmin`, for asyncio."""

    def __init__(self, address: str, *, timeout: float = 10.0, security: Security | None = None) -> None:
        self.address = address
        self._timeout = timeout
        self._route = Route(address, security)
        self._channels: dict[tuple[Server, Stamp], grpc.aio.Channel] = {}

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
        key = server, server.security.stamp()  # a new connection once certificates were replaced
        if key not in self._channels:
            self._channels[key] = server.aio_channel()
        return PolicyServiceStub(self._channels[key])
