"""The client for asyncio: the names, arguments and promises of `equipoise.PolicyClient` and `equipoise.PolicyAdmin`.

Methods that ask the server are coroutines, or asynchronous iterators. `submit`, `weights`, `stats`, `state_dict` and
`load_state_dict` ask nobody and are plain methods. A client belongs to the event loop in which it is first used; in
another one its methods raise `EventLoopError`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import calls
from equipoise.aio_stream import Stream
from equipoise.archive import ArchiveReader, PolicyArchive
from equipoise.calls import Attempts, Call, Field, ValuesChunk
from equipoise.channel import AioChannels
from equipoise.errors import PolicyNotFoundError
from equipoise.policies import ListedPolicy, PolicySpec, PolicyStatus, ServerInfo
from equipoise.results import StepResult
from equipoise.route import Route
from equipoise.security import Security
from equipoise.session import PROBE_SECONDS
from equipoise.trainer import Trainer
from equipoise.wire import StepFields

__all__ = ["PolicyAdmin", "PolicyClient"]

T = TypeVar("T")


class PolicyClient(Trainer):
    """The connection of one trainer to one policy, for asyncio.

    Arguments, results and errors are those of `equipoise.PolicyClient` and its methods.

    Example:
        >>> async with PolicyClient("localhost:50051", policy="run-7", num_examples=50_000) as client:
        ...     weights = (await client.step(ids, contributions=contributions)).weights
    """

    _stream: Stream | None
    _admin: "PolicyAdmin | None"

    async def step(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> StepResult:
        """Sends the statistics of one training step, and waits for the weights of its examples."""
        stream = self._connected()
        return await stream.settle(self._session.step(ids, fields, now=monotonic(), waits=True))

    def submit(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> None:
        """Sends the statistics of one training step without waiting for an answer."""
        stream = self._connected()
        self._session.step(ids, fields, now=monotonic(), waits=False)
        stream.notify()

    async def read(self, ids: ArrayLike | None = None, *, step: int | None = None) -> StepResult:
        """Reads weights over the training stream: they include every step that this client has made before."""
        stream = self._connected()
        return await stream.settle(self._session.read(ids, step=step, now=monotonic()))

    async def flush(self, timeout: float | None = None, *, durable: bool = False) -> bool:
        """Waits until the server has answered every step."""
        done = await self._connected().flush(self._patience if timeout is None else timeout, durable=durable)
        self._session.raise_unreported()
        return done

    async def read_weights(
        self, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> NDArray[np.float32]:
        """Reads the weights or the scores of the policy's examples."""
        return await self.admin.read_weights(self.policy, field, ids, rows=rows)

    async def preload(self) -> None:
        """Reads the weights of all examples, up to `limits.cached_examples`, so that `weights` knows them."""
        status = await self.status()
        ids = np.arange(min(status.spec.num_examples, self._options.limits.cached_examples))
        weights = await self.read_weights(ids=ids)
        self._session.preload(weights, uid=status.uid, num_examples=status.spec.num_examples)

    async def sample_examples(
        self, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        """Draws example ids with probability proportional to their weights."""
        try:
            return await self.admin.sample_examples(self.policy, count, with_replacement=with_replacement, seed=seed)
        except PolicyNotFoundError:
            if (spec := self._session.missing) is None:
                raise
        await self.admin.create(spec)
        return await self.admin.sample_examples(self.policy, count, with_replacement=with_replacement, seed=seed)

    async def status(self) -> PolicyStatus:
        """Returns the status of the policy."""
        return await self.admin.get(self.policy)

    def watch(self, *, min_interval: float = 1.0) -> AsyncIterator[PolicyStatus]:
        """Yields the status now, and again whenever it changes, at most once every `min_interval` seconds."""
        return self.admin.watch(self.policy, min_interval=min_interval)

    async def server_info(self) -> ServerInfo:
        """Returns the server's version, device, rules and limits."""
        return await self.admin.server_info()

    async def delete(self) -> None:
        """Deletes the policy and everything it has learnt."""
        await self.admin.delete(self.policy)

    @property
    def admin(self) -> "PolicyAdmin":
        """Calls about any policy of the same server, over this client's connection."""
        self._check_open()
        if self._admin is None:
            timeout = self._options.timeout.call
            self._admin = PolicyAdmin._beside(self.address, self._route, self._channels, timeout=timeout)
        return self._admin

    async def close(self) -> None:
        """Waits for the answers to submitted steps if the server is there, then disconnects; within `timeout.close`."""
        if self._closed:
            return
        self._closed = True
        if self._left_to_parent():
            return
        end = monotonic() + self._options.timeout.close
        if self._stream is not None:
            self._channels.check_loop()
            while not self._session.unreachable and monotonic() < end:
                if await self._stream.flush(PROBE_SECONDS, durable=False):
                    break
            self._note_unanswered()
            await self._stream.close(max(0.1, end - monotonic()))
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.1, end - monotonic())):
                await self._channels.close()
        self._leave()

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
        self._channels = AioChannels()

    def _connected(self) -> Stream:
        self._check_open()
        self._channels.check_loop()
        if self._stream is None:
            self._stream = Stream(self._session, self._route, self._channels)
        return self._stream


class PolicyAdmin:
    """Creates, lists, reads, copies and deletes the policies of a server, for asyncio.

    Arguments, results and errors are those of `equipoise.PolicyAdmin` and its methods.

    Example:
        >>> async with PolicyAdmin("localhost:50051") as admin:
        ...     async for policy in admin.list_policies("run-"):
        ...         print(policy.spec.name)
    """

    def __init__(self, address: str, *, timeout: float = 10.0, security: Security | None = None) -> None:
        self.address = address
        self._timeout = timeout
        self._route = Route(address, security)
        self._channels = AioChannels()
        self._owns_channels = True

    @classmethod
    def _beside(cls, address: str, route: Route, channels: AioChannels, *, timeout: float) -> "PolicyAdmin":
        """As `equipoise.PolicyAdmin._beside`."""
        admin = cls(address, timeout=timeout, security=route.security)
        admin._route, admin._channels, admin._owns_channels = route, channels, False
        return admin

    async def create(self, spec: PolicySpec) -> PolicyStatus:
        """Creates a policy with uniform weights."""
        return await self._do(calls.create(spec))

    async def fork(self, source: str, name: str) -> PolicyStatus:
        """Creates the policy `name` with the current state of the policy `source`."""
        return await self._do(calls.fork(source, name))

    async def get(self, policy: str) -> PolicyStatus:
        """Returns the status of a policy."""
        return await self._do(calls.get(policy))

    async def list_policies(self, prefix: str = "") -> AsyncIterator[ListedPolicy]:
        """Yields the policies whose names start with `prefix`, sorted by name."""
        token, more = "", True
        while more:
            page, token = await self._do(calls.list_page(prefix, token))
            for policy in page:
                yield policy
            more = bool(token)

    async def delete(self, policy: str, *, uid: str = "") -> None:
        """Deletes a policy and everything it has learnt."""
        await self._do(calls.delete(policy, uid=uid))

    def watch(self, policy: str, *, min_interval: float = 1.0) -> AsyncIterator[PolicyStatus]:
        """Yields the status now, and again whenever it changes, at most once every `min_interval` seconds."""
        return self._answers(calls.watch(policy, min_interval=min_interval))

    async def read_weights(
        self, policy: str, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> NDArray[np.float32]:
        """Reads the weights or the scores of a policy's examples."""
        values = calls.Values(rows)
        async for chunk in self.read_chunks(policy, field, ids, rows=rows):
            values.add(chunk)
        return values.array()

    def read_chunks(
        self, policy: str, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> AsyncIterator[ValuesChunk]:
        """As `read_weights`, but yields the values piece by piece, in order, for policies too large to hold at once."""
        return self._answers(calls.read_values(policy, field, ids, rows))

    async def sample_examples(
        self, policy: str, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        """Draws example ids with probability proportional to their weights."""
        return await self._do(calls.sample(policy, count, with_replacement=with_replacement, seed=seed))

    async def export_policy(self, policy: str, path: str | Path) -> int:
        """Writes the whole state of a policy to a .npz file, which `numpy.load` can read."""
        reader = ArchiveReader()
        async for message in self._answers(calls.export_state(policy)):
            reader.add(message)
        archive = reader.archive()
        await asyncio.to_thread(archive.save, Path(path))
        return archive.version

    async def import_policy(self, path: str | Path, name: str) -> PolicyStatus:
        """Creates the policy `name` with the state that `export_policy` wrote to a file. Its version starts at 0."""
        archive = await asyncio.to_thread(PolicyArchive.load, Path(path))
        return await self._do(calls.import_state(name, archive.messages(name)))

    async def server_info(self) -> ServerInfo:
        """Returns the server's version, device, rules and limits."""
        return await self._do(calls.server_info())

    async def close(self) -> None:
        """Disconnects. Calls under way fail. The admin of a `PolicyClient` leaves the client connected."""
        if self._owns_channels:
            await self._channels.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, call: Call[T]) -> T:
        [answer] = [answer async for answer in self._answers(call)]
        return answer

    async def _answers(self, call: Call[T]) -> AsyncIterator[T]:
        attempts = Attempts(call, self._route, timeout=self._timeout)
        for server in attempts:
            async with self._channels.stub(server) as stub:
                try:
                    answer = attempts.begin(stub)
                    if call.streams:
                        async for message in answer:
                            yield attempts.read(message)
                    else:
                        yield attempts.read(await answer)
                    return
                except grpc.RpcError as failure:
                    pause = attempts.fail(failure)
                finally:
                    attempts.end()
            await asyncio.sleep(pause)
