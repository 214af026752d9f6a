"""gRPC channels: how one is opened, which ones a client holds, and the headers of every call."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import grpc

from equipoise import forks
from equipoise.errors import ClientClosedError, EquipoiseError, EventLoopError, ForkError, UnavailableError
from equipoise.security import Security, Stamp
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub

MAX_MESSAGE_BYTES = 16 << 20
"""Largest message either side takes, bytes."""

POLICY_HEADER = "x-equipoise-policy"
"""Names the policy of a call, so that proxies can route without reading bodies."""

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that is paused or cut off is noticed within 15 s. Without ping_timeout it takes a minute.
    ("grpc.keepalive_time_ms", 8_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The session has its own backoff, and `calls.Attempts` its pauses; the channel's must not slow them down.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # One connection per client: a shared one would mix unrelated clients.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
)
"""Options of a channel."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server, and how it is reached.

    Attributes:
        address: `host:port`.
        security: TLS and token.
        connection: another number is another connection; one address may lead to many servers.
    """

    address: str
    security: Security
    connection: int = 0

    def __post_init__(self) -> None:
        self.security.check_address(self.address)

    @classmethod
    def at(cls, address: str, security: Security | None) -> "Server":
        """The server; without `security`, what the environment says."""
        return cls(address, Security.from_environment() if security is None else security)

    def channel(self) -> grpc.Channel:
        """A new channel; it connects when it is used.

        Raises:
            AccessDeniedError: a file of the credentials cannot be read.
            ForkError: this process was forked from one that was connected.
        """
        credentials = self._prepare()
        if credentials is None:
            return grpc.insecure_channel(self.address, options=OPTIONS)
        return grpc.secure_channel(self.address, credentials, options=OPTIONS)

    def aio_channel(self) -> grpc.aio.Channel:
        """As `channel`, for asyncio."""
        credentials = self._prepare()
        if credentials is None:
            return grpc.aio.insecure_channel(self.address, options=OPTIONS)
        return grpc.aio.secure_channel(self.address, credentials, options=OPTIONS)

    def headers(self, policy: str = "") -> tuple[tuple[str, str], ...]:
        """Metadata of a call: the token, and the policy it is about, if it is about one."""
        return (*self.security.headers(), *(((POLICY_HEADER, policy),) if policy else ()))

    def _prepare(self) -> grpc.ChannelCredentials | None:
        if forks.cut_off():
            raise ForkError
        forks.note_connection()
        return self.security.credentials()


_Channel = TypeVar("_Channel", grpc.Channel, grpc.aio.Channel)

_Key: TypeAlias = tuple[Server, Stamp]
"""A channel serves one server as long as the files of its certificates stay as they are."""


class _Pool(Generic[_Channel]):
    """The channels of one client, and how many use each."""

    def __init__(self) -> None:
        self._channels: dict[_Key, _Channel] = {}
        self._users: Counter[_Key] = Counter()
        self._closed = False

    def _check_open(self) -> None:
        """A channel opened after `close` would never be closed."""
        if self._closed:
            raise ClientClosedError

    def _cut_off(self, error: BaseException) -> bool:
        """Whether `close` ended a call: gRPC has several errors for that, and none says it."""
        answered = isinstance(error, EquipoiseError) and not isinstance(error, UnavailableError)
        return self._closed and not answered

    def _unused(self, needed: _Key) -> list[_Channel]:
        """Takes out the channels that nobody uses, but for the one that is needed now."""
        keys = [key for key in self._channels if key != needed and not self._users[key]]
        return [self._channels.pop(key) for key in keys]


class Channels(_Pool[grpc.Channel]):
    """The channels of one client, one for each server in use: its stream and its other calls share them.

    A channel to another server, or one with new certificates, takes the place of those that nobody uses any more. Safe
    to use from several threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    @contextmanager
    def stub(self, server: Server) -> Iterator[Any]:
        """The server's calls. Their channel stays open within the block.

        Raises:
            AccessDeniedError: a file of the credentials cannot be read.
            ClientClosedError: `close` was called, before or meanwhile.
            ForkError: this process was forked from one that was connected.
        """
        key = server, server.security.stamp()
        with self._lock:
            self._check_open()
            for channel in self._unused(key):
                channel.close()
            if key not in self._channels:
                self._channels[key] = server.channel()
            self._users[key] += 1
            stub = PolicyServiceStub(self._channels[key])
        try:
            yield stub
        except Exception as error:
            if self._cut_off(error):
                raise ClientClosedError from error
            raise
        finally:
            with self._lock:
                self._users[key] -= 1

    def close(self) -> None:
        """Closes all, for good; calls under way end."""
        with self._lock:
            self._closed = True
            while self._channels:
                self._channels.popitem()[1].close()


class AioChannels(_Pool[grpc.aio.Channel]):
    """As `Channels`, for asyncio: they belong to the event loop in which they are first used."""

    def __init__(self) -> None:
        super().__init__()
        self._loop: asyncio.AbstractEventLoop | None = None

    def check_loop(self) -> None:
        """Raises EventLoopError in another event loop than before."""
        running = asyncio.get_running_loop()
        self._loop = self._loop or running
        if self._loop is not running:
            raise EventLoopError(
                "this client was first used in another event loop, such as that of an earlier asyncio.run(): make a"
                " client for each loop; state_dict() and load_state_dict() carry a trainer over"
            )

    @asynccontextmanager
    async def stub(self, server: Server) -> AsyncIterator[Any]:
        """As `Channels.stub`.

        Raises:
            EventLoopError: this is another event loop than before.
        """
        self._check_open()
        self.check_loop()
        key = server, server.security.stamp()
        if key not in self._channels:
            self._channels[key] = server.aio_channel()
        stub = PolicyServiceStub(self._channels[key])
        self._users[key] += 1
        try:
            for channel in self._unused(key):
                await channel.close()
            yield stub
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()  # a call that is cut off looks like a cancelled task
            if self._cut_off(error) and not (task and task.cancelling()):
                raise ClientClosedError from error
            raise
        finally:
            self._users[key] -= 1

    async def close(self) -> None:
        """Closes all, for good; calls under way end."""
        self._closed = True
        while self._channels:
            await self._channels.popitem()[1].close()
