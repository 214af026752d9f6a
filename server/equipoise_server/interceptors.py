"""What surrounds every RPC: errors become statuses, messages are decoded safely, calls are counted and logged."""

from __future__ import annotations  # grpc's classes are generic for the type checker only

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog
from google.protobuf.message import DecodeError

from equipoise_server import logs
from equipoise_server.errors import Code, ServiceError, internal, invalid
from equipoise_server.security import Access, Caller
from equipoise_server.status import grpc_code, trailing_metadata

log = structlog.get_logger("equipoise.rpc")

ACCESS_CODES = (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)


class RpcTelemetry(Protocol):
    """Receives facts about RPCs; every method is cheap and never raises."""

    def rpc_started(self, *, method: str, kind: str) -> None:
        """A call of `/package.Service/Method` began; kind is `unary`, or `server_`, `client_` or `bidi_stream`."""
        ...

    def rpc_handled(self, *, method: str, kind: str, code: str, seconds: float) -> None:
        """It ended with a canonical code (UPPER_SNAKE)."""
        ...

    def access_refused(self, *, reason: str) -> None:
        """A call was refused because of who made it, for `reason` (the ErrorInfo's)."""
        ...

    def message_received(self, *, method: str, kind: str) -> None:
        """A message came in."""
        ...

    def message_sent(self, *, method: str, kind: str) -> None:
        """A message went out."""
        ...


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a message that is no valid protobuf of its type."""

    type_name: str

    def error(self) -> ServiceError:
        """The error for the caller."""
        return invalid("MALFORMED_REQUEST", "request", f"the bytes are no valid {self.type_name}")


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


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """The outermost layer: nobody without access gets in, and nothing but a ServiceError's status gets out.

    What else goes wrong is an opaque INTERNAL.
    """

    def __init__(self, telemetry: RpcTelemetry, access: Access) -> None:
        self._telemetry = telemetry
        self._access = access

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
        request_kind = "stream" if handler.request_streaming else "unary"
        response_kind = "stream" if handler.response_streaming else "unary"
        behavior = getattr(handler, f"{request_kind}_{response_kind}")
        call = Call(handler_call_details.method, handler)
        make = getattr(grpc, f"{request_kind}_{response_kind}_rpc_method_handler")
        caller = self._admit(handler_call_details)
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            self._guard(behavior, call, caller),
            # What comes from a stranger is not even parsed.
            request_deserializer=self._deserializer(call) if isinstance(caller, Caller) else None,
            response_serializer=self._serializer(call),
        )
        return wrapped

    def _admit(self, details: grpc.HandlerCallDetails) -> Caller | ServiceError:
        try:
            return self._access.admit(details.method, tuple(details.invocation_metadata or ()))
        except ServiceError as error:
            return error

    def _count_unknown(self, method: str) -> None:
        self._telemetry.rpc_started(method=method, kind="unary")
        self._telemetry.rpc_handled(method=method, kind="unary", code="UNIMPLEMENTED", seconds=0.0)

    def _deserializer(self, call: Call) -> Callable[[bytes], object]:
        deserialize = call.handler.request_deserializer
        type_name = getattr(getattr(deserialize, "__self__", None), "__name__", "request")

        def decode(data: bytes) -> object:
            self._telemetry.message_received(method=call.method, kind=call.kind)
            try:
                return data if deserialize is None else deserialize(data)
            except DecodeError:
                return Malformed(type_name)

        return decode

    def _serializer(self, call: Call) -> Callable[[Any], bytes]:
        serialize = call.handler.response_serializer

        def encode(message: Any) -> bytes:
            self._telemetry.message_sent(method=call.method, kind=call.kind)
            return message if serialize is None else serialize(message)

        return encode

    def _guard(
        self, behavior: Callable[..., Any], call: Call, caller: Caller | ServiceError
    ) -> Callable[..., Awaitable[Any]]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            started = time.perf_counter()
            self._telemetry.rpc_started(method=call.method, kind=call.kind)
            code = grpc.StatusCode.OK
            try:
                with logs.bound(request_id=logs.new_id(), method=call.method):
                    return await self._serve(behavior, request, context, call=call, caller=caller)
            except ServiceError as error:
                code = grpc_code(error)
                if error.code in ACCESS_CODES:
                    self._telemetry.access_refused(reason=error.reason)
                await abort(context, error)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except grpc.aio.AbortError:
                code = context.code() or grpc.StatusCode.UNKNOWN
                raise
            except Exception:
                if context.cancelled():  # the caller has left in the middle of an answer: no fault of ours
                    code = grpc.StatusCode.CANCELLED
                    raise
                code = grpc.StatusCode.INTERNAL
                await abort(context, _bug(call))
            finally:
                seconds = time.perf_counter() - started
                self._telemetry.rpc_handled(method=call.method, kind=call.kind, code=code.name, seconds=seconds)
                log.debug("rpc", method=call.method, code=code.name, seconds=round(seconds, 6), peer=context.peer())

        return guarded

    async def _serve(
        self,
        behavior: Callable[..., Any],
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
        *,
        call: Call,
        caller: Caller | ServiceError,
    ) -> Any:
        if isinstance(caller, ServiceError):
            raise caller
        with self._access.serving(caller, streaming=call.kind != "unary"):
            try:
                return await _invoke(behavior, request, context)
            except asyncio.CancelledError:
                if error := self._access.ended():
                    raise error from None
                raise


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ServiceError) -> None:
    """Ends the RPC with the error's status and details."""
    await context.abort(grpc_code(error), str(error), trailing_metadata(error))


async def _invoke(behavior: Callable[..., Any], request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    if isinstance(request, Malformed):
        raise request.error()
    result = behavior(request, context)
    if hasattr(result, "__aiter__"):
        async with aclosing(result):
            async for message in result:
                await context.write(message)
        return None
    return await result


def _bug(call: Call) -> ServiceError:
    """INTERNAL with an opaque id; what happened is in the log under it."""
    error_id = logs.new_id()
    log.exception("unexpected error", method=call.method, error_id=error_id)
    return internal(error_id)
