"""Calls by the generated stub alone, past everything that our client does about a failure."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

from equipoise.v1.policy_pb2_grpc import PolicyServiceStub

T = TypeVar("T")

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Options of a channel that shares its connection with no other."""


@contextmanager
def connected(address: str) -> Iterator[PolicyServiceStub]:
    """A stub with a connection of its own."""
    with grpc.insecure_channel(address, options=OWN_CONNECTION) as channel:
        yield PolicyServiceStub(channel)


def reason(failure: grpc.RpcError) -> str:
    """Our word for why a call failed; the code where we have none."""
    info = error_details_pb2.ErrorInfo()
    carried = dict(failure.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    for detail in status_pb2.Status.FromString(carried).details:
        detail.Unpack(info)
    return info.reason or failure.code().name


def patiently(call: Callable[[], T], *, within_s: float = 120.0) -> T:
    """Repeats a call that a server cannot carry out now: it loads the policy, or Redis is slow on a busy machine."""
    end = monotonic() + within_s
    while True:
        try:
            return call()
        except grpc.RpcError as failure:
            if failure.code() is not grpc.StatusCode.UNAVAILABLE or monotonic() > end:
                raise
        sleep(0.05)
