"""What surrounds every RPC: errors become statuses, messages are decoded safely, calls are counted and logged."""

from __future__ import annotations  # grpc's classes are generic for the type checker only

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog

from equipoise_server import logs
from equipoise_server.engine import Wish
from equipoise_server.errors import Code, ServiceError, internal, invalid
from equipoise_server.messages import MessageKind, Pace, Received
from equipoise_server.security import Access, Caller, Calls
from equipoise_server.status import grpc_code, trailing_metadata

log = structlog.get_logger("equipoise.rpc")

LARGE_REQUESTS = frozenset({"Exchange", "UpdateWeights", "ReadWeights", "ImportPolicy"})
"""Methods whose requests hold rows, or tables."""
MAX_SMALL_BYTES = 64 << 10
"""Of a request of any other method."""
POLICY_HEADER = "x-equipoise-policy"
"""Names the policy of a call."""
PLACEMENT_HEADER = "x-equipoise-placement"
"""Where a policy should be that no server owns: `here`, `stay`, or absent; see `Wish`."""

wished: ContextVar[Wish] = ContextVar("wished", default=Wish.ANYWHERE)
"""What the call says of that."""
WRITE_ENDS_S = 1.0
"""How long a write that is cut short is waited for; who does not read keeps it from ending."""


class RpcTelemetry(Protocol):
    """Receives facts about RPCs; every method is cheap and never raises."""

    def rpc_started(self, *, method: str, kind: str) -> None:
        """A call of `/package.Service/Method` began; kind is `unary`, or `server_`, `client_` or `bidi_stream`."""
        ...

    def rpc_handled(self, *, method: str, kind: str, code: str, seconds: float) -> None:
        """It ended with a canonical code (UPPER_SNAKE)."""
        ...

    def refused(self, *, reason: str) -> None:
        """A call was refused for `reason` (the ErrorInfo's)."""
        ...

    def message_received(self, *, method: str, kind: str) -> None:
        """A message came in."""
        ...

    def message_sent(self, *, method: str, kind: str) -> None:
        """A message went out."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """One RPC under way."""

    method: str
    handler: grpc.RpcMethodHandler[Any, Any]

    @property
    def kind(self) -> str:
        """Which sides stream."""
        if self.handler.request_streaming:
            return "bidi_stream" if self.handler.response_streaming else "client_stream"
        return "server_stream" if self.handler.response_streaming else "unary"

    @property
    def behavior(self) -> Callable[..., Any]:
        """The servicer's method."""
        asks = "stream" if self.handler.request_streaming else "unary"
        answers = "stream" if self.handler.response_streaming else "unary"
        found: Callable[..., Any] = getattr(self.handler, f"{asks}_{answers}")
        return found


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """The outermost layer: nobody without access gets in, and nothing but a ServiceError's status gets out.

    What else goes wrong is an opaque INTERNAL.

    To gRPC every method is a stream both ways, which is the same on the wire: so a call is refused, counted and
    bounded in time before its first message is read, and a caller who never sends one holds nothing.

    Args:
        telemetry: told of every call.
        access: who may call.
        calls: how many at once.
        message_timeout_s: how long a call may take to send its message, or each of those that it answers at the end.
        write_timeout_s: how long an answer may wait for a caller who does not read.
    """

    def __init__(
        self,
        telemetry: RpcTelemetry,
        access: Access,
        calls: Calls,
        *,
        message_timeout_s: float,
        write_timeout_s: float,
    ) -> None:
        self._telemetry = telemetry
        self._access = access
        self._calls = calls
        self._message_timeout_s = message_timeout_s
        self._write_timeout_s = write_timeout_s
        self._pace = Pace()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self._count_unknown(handler_call_details.method)
            return None
        call = Call(handler_call_details.method, handler)
        policy = str(dict(handler_call_details.invocation_metadata or ()).get(POLICY_HEADER, ""))
        caller = self._admit(handler_call_details)
        wish = _wish(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(
            self._guard(call, caller, wish),  # answers through context.write
            # What comes from a stranger is not even parsed.
            request_deserializer=self._deserializer(call, caller, policy) if isinstance(caller, Caller) else None,
            response_serializer=self._serializer(call),
        )

    def _admit(self, details: grpc.HandlerCallDetails) -> Caller | ServiceError:
        try:
            return self._access.admit(details.method, tuple(details.invocation_metadata or ()))
        except ServiceError as error:
            return error

    def _count_unknown(self, method: str) -> None:
        self._telemetry.rpc_started(method=method, kind="unary")
        self._telemetry.rpc_handled(method=method, kind="unary", code="UNIMPLEMENTED", seconds=0.0)

    def _deserializer(self, call: Call, caller: Caller, policy: str) -> Callable[[bytes], Received]:
        parse = call.handler.request_deserializer or bytes
        kind = MessageKind(
            name=getattr(getattr(parse, "__self__", None), "__name__", "request"),
            parse=parse,
            max_bytes=0 if call.method.rpartition("/")[2] in LARGE_REQUESTS else MAX_SMALL_BYTES,
        )
        share = policy if caller.token is None else caller.tenant.name

        def receive(data: bytes) -> Received:
            self._telemetry.message_received(method=call.method, kind=call.kind)
            return Received(data, kind, self._pace, share)

        return receive

    def _serializer(self, call: Call) -> Callable[[Any], bytes]:
        serialize = call.handler.response_serializer

        def encode(message: Any) -> bytes:
            self._telemetry.message_sent(method=call.method, kind=call.kind)
            return message if serialize is None else serialize(message)

        return encode

    def _guard(self, call: Call, caller: Caller | ServiceError, wish: Wish) -> Callable[..., Awaitable[None]]:
        async def guarded(messages: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            started = time.perf_counter()
            self._telemetry.rpc_started(method=call.method, kind=call.kind)
            code = grpc.StatusCode.OK
            wished.set(wish)
            try:
                with logs.bound(request_id=logs.new_id(), method=call.method):
                    await self._serve(messages, context, call=call, caller=caller)
            except ServiceError as error:
                code = grpc_code(error)
                self._telemetry.refused(reason=error.reason)
                await abort(context, error.bare())
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except grpc.aio.AbortError:
                code = context.code() or grpc.StatusCode.UNKNOWN
                raise
            except grpc.aio.BaseError as error:  # the caller has left in the middle of an answer: no fault of ours
                code = grpc.StatusCode.CANCELLED
                raise asyncio.CancelledError from error
            except Exception:
                code = grpc.StatusCode.INTERNAL
                bug = _bug(call)
                self._telemetry.refused(reason=bug.reason)
                await abort(context, bug)
            finally:
                seconds = time.perf_counter() - started
                self._telemetry.rpc_handled(method=call.method, kind=call.kind, code=code.name, seconds=seconds)
                log.debug("rpc", method=call.method, code=code.name, seconds=round(seconds, 6), peer=context.peer())

        return guarded

    async def _serve(
        self,
        messages: Any,
        context: grpc.aio.ServicerContext[Any, Any],
        *,
        call: Call,
        caller: Caller | ServiceError,
    ) -> None:
        if isinstance(caller, ServiceError):
            raise caller
        with self._calls.serving(caller, method=call.method, is_stream=call.kind != "unary"):
            try:
                request = await self._request(call, messages, context, caller)
                await self._invoke(call.behavior, request, context)
            except asyncio.CancelledError:
                if error := self._calls.ended():
                    raise error from None
                raise

    async def _invoke(
        self, behavior: Callable[..., Any], request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        result = behavior(request, context)
        if hasattr(result, "__aiter__"):
            begun = False
            async with aclosing(result):
                async for message in result:
                    await self._write(message, context, begun=begun)
                    begun = True
        elif (message := await result) is not None:
            await self._write(message, context, begun=False)

    async def _write(self, message: Any, context: grpc.aio.ServicerContext[Any, Any], *, begun: bool) -> None:
        """Who reads no answers must not hold what they are made of: tables of the moment, and a place among readers."""
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await (context.write(message) if begun else whole(context.write(message)))
        except TimeoutError:
            description = f"no answer was read for {self._write_timeout_s:g} s (write_timeout_s)"
            raise ServiceError(Code.DEADLINE_EXCEEDED, "NOT_READ", description) from None

    async def _request(
        self, call: Call, messages: Any, context: grpc.aio.ServicerContext[Any, Any], caller: Caller
    ) -> Any:
        if call.kind == "bidi_stream":  # what it waits for is its own affair
            return _parsed(messages)
        received = await self._read_first(context, caller)
        if call.kind == "client_stream":
            return self._messages(received, context)
        if received is grpc.aio.EOF:
            raise invalid("MALFORMED_REQUEST", "request", "the call ended without a message")
        return await received.message()

    async def _messages(self, first: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        received = first
        while received is not grpc.aio.EOF:
            yield await received.message()
            received = await self._read(context)

    async def _read_first(self, context: grpc.aio.ServicerContext[Any, Any], caller: Caller) -> Any:
        end_turn, size = await self._calls.read_turn(caller), 0
        try:
            received = await self._read(context)
            size = 0 if received is grpc.aio.EOF else received.num_bytes
            return received
        finally:
            end_turn(size)

    async def _read(self, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            async with asyncio.timeout(self._message_timeout_s):
                return await context.read()
        except TimeoutError:
            description = f"no message within {self._message_timeout_s:g} s (first_message_timeout_s)"
            raise ServiceError(Code.DEADLINE_EXCEEDED, "NO_MESSAGE", description) from None


async def whole(write: Coroutine[Any, Any, None]) -> None:
    """Makes the first write of a call. Where it is cut short, waits a moment for its end.

    gRPC notes that the headers have left at the end of a call's first write. Without that note they would be sent again
    with the status, which gRPC refuses: the call could never be ended.
    """
    writing = asyncio.ensure_future(write)
    writing.add_done_callback(lambda done: done.cancelled() or done.exception())  # the caller has left: nobody asks
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing], timeout=WRITE_ENDS_S)
        raise


async def _parsed(messages: AsyncIterator[Received]) -> AsyncIterator[Any]:
    async for received in messages:
        yield await received.message()


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ServiceError) -> None:
    """Ends the RPC with the error's status and details."""
    await context.abort(grpc_code(error), str(error), trailing_metadata(error))


def _wish(details: grpc.HandlerCallDetails) -> Wish:
    said = dict(details.invocation_metadata or ()).get(PLACEMENT_HEADER, "")
    return next((wish for wish in Wish if wish == said), Wish.ANYWHERE)


def _bug(call: Call) -> ServiceError:
    """INTERNAL with an opaque id; what happened is in the log under it."""
    error_id = logs.new_id()
    log.exception("unexpected error", method=call.method, error_id=error_id)
    return internal(error_id)
