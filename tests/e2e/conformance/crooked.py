"""A server that is wrong in some respects: it forwards every call to a real one and changes what comes back."""

from __future__ import annotations  # grpc's classes are generic for the type checker only

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import grpc

Change: TypeAlias = Callable[[str, bytes], bytes]
"""From the method and an answer to the answer that the client gets."""

Metadata: TypeAlias = tuple[tuple[str, Any], ...]

UNBOUNDED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
FORWARDED = ("authorization", "x-equipoise-policy")


class Crooked(grpc.GenericRpcHandler):
    """Forwards bytes, whatever the method.

    Args:
        upstream: the honest server.
        change: of each answer.
        trailing: of the metadata that end a call of a method.
        missing: beginnings of methods that are not there.
    """

    def __init__(
        self,
        upstream: grpc.Channel,
        *,
        change: Change = lambda method, data: data,
        trailing: Callable[[str, Metadata], Metadata] = lambda method, metadata: metadata,
        missing: tuple[str, ...] = (),
    ) -> None:
        self._upstream = upstream
        self._change = change
        self._trailing = trailing
        self._missing = missing

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        if method.startswith(self._missing or ("nothing",)):
            return None
        return grpc.stream_stream_rpc_method_handler(lambda requests, context: self._forward(method, requests, context))

    def _forward(self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        metadata = [(key, value) for key, value in context.invocation_metadata() if key in FORWARDED]
        calling: Any = self._upstream.stream_stream(method)
        call = calling(_until_the_client_leaves(requests), metadata=metadata, timeout=context.time_remaining())
        context.add_callback(call.cancel)
        try:
            for data in call:
                yield self._change(method, data)
        except grpc.RpcError as failure:
            context.set_trailing_metadata(self._trailing(method, tuple(failure.trailing_metadata())))
            context.abort(failure.code(), failure.details())


def _until_the_client_leaves(requests: Iterator[bytes]) -> Iterator[bytes]:
    with suppress(grpc.RpcError):
        yield from requests


@contextmanager
def crooked(address: str, **wrong: Any) -> Iterator[str]:
    """The address of a server before the one at `address`; `wrong`: see `Crooked`."""
    server = grpc.server(ThreadPoolExecutor(max_workers=16), options=UNBOUNDED)
    with grpc.insecure_channel(address, options=UNBOUNDED) as upstream:
        server.add_generic_rpc_handlers((Crooked(upstream, **wrong),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(grace=None).wait()
