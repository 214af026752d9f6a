"""Calls about any policy of a server."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import archive, calls, errors
from equipoise.calls import Call, Field
from equipoise.channel import Server
from equipoise.policies import ListedPolicy, PolicySpec, PolicyStatus, ServerInfo
from equipoise.route import Route
from equipoise.security import Security, Stamp
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub

T = TypeVar("T")


class PolicyAdmin:
    """Creates, lists, reads, copies and deletes policies.

    Every call raises an error of `equipoise.errors` when it fails.

    Args:
        address: `host:port` of the server, or several with commas between them: the next is asked when one is lost.
        timeout: deadline of each call that does not stream, seconds. Calls that stream have none: a lost server ends
            them within 15 s.
        security: TLS and token; default: what the environment says.
    """

    def __init__(self, address: str, *, timeout: float = 10.0, security: Security | None = None) -> None:
        self.address = address
        self._timeout = timeout
        self._route = Route(address, security)
        self._channels: dict[tuple[Server, Stamp], grpc.Channel] = {}

    def create(self, spec: PolicySpec) -> PolicyStatus:
        """Creates a policy, uniform; returns the existing one when what is given here equals it.

        Raises:
            PolicyExistsError: a policy of this name exists and differs.
        """
        return self._do(calls.create(spec))

    def fork(self, source: str, name: str) -> PolicyStatus:
        """Creates the policy `name` with the state of `source`."""
        return self._do(calls.fork(source, name))

    def get(self, policy: str) -> PolicyStatus:
        """A policy as it stands.

        Raises:
            PolicyNotFoundError: there is none of this name.
        """
        return self._do(calls.get(policy))

    def list_policies(self, prefix: str = "") -> Iterator[ListedPolicy]:
        """All policies whose names start with `prefix`, by name."""
        token, more = "", True
        while more:
            page, token = self._do(calls.list_page(prefix, token))
            yield from page
            more = bool(token)

    def delete(self, policy: str, *, uid: str = "") -> None:
        """Deletes a policy; with `uid`, only that incarnation."""
        self._do(calls.delete(policy, uid=uid))

    def watch(self, policy: str, *, min_interval: float = 1.0) -> Iterator[PolicyStatus]:
        """The status now and whenever it changes, at most once per `min_interval` seconds."""
        return self._stream(calls.watch(policy, min_interval=min_interval), timeout=None)

    def read_weights(
        self, policy: str, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> NDArray[np.float32]:
        """Served weights or the rule's scores (NaN where never scored): float32 [len(ids)], or [N] without ids.

        With `rows`, for rule `trajectory`: the weights of these rows, float32 [len(rows), N], or [len(rows),
        len(ids)]; without, the mean weight of each example over all rows.
        """
        values = calls.Values(rows)
        for chunk in self._stream(calls.read_values(policy, field, ids, rows), timeout=None):
            values.add(chunk)
        return values.array()

    def sample_examples(
        self, policy: str, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        """Draws ids with probability proportional to their weights: uint64 [count]."""
        return self._do(calls.sample(policy, count, with_replacement=with_replacement, seed=seed))

    def export_policy(self, policy: str, path: str | Path) -> int:
        """Writes the whole state of a policy to a .npz file; returns its version."""
        self.get(policy)  # finds the owner
        state = archive.export_policy(self._route.server, policy)
        state.save(Path(path))
        return state.version

    def import_policy(self, path: str | Path, name: str) -> PolicyStatus:
        """Creates the policy `name` with the state that `export_policy` wrote.

        Raises:
            PolicyExistsError: there is one of this name.
        """
        return archive.import_policy(self._route.server, archive.PolicyArchive.load(Path(path)), name)

    def server_info(self) -> ServerInfo:
        """The server."""
        return self._do(calls.server_info())

    def close(self) -> None:
        """Disconnects."""
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, call: Call[T]) -> T:
        for attempt in count(1):
            server = self._route.server
            try:
                method = getattr(self._stub(server), call.method)
                return call.parse(method(call.request, timeout=self._timeout, metadata=server.headers(call.policy)))
            except grpc.RpcError as failure:
                error = errors.from_rpc(failure, address=server.address)
                if not self._route.repeats(error, method=call.method) or attempt == self._route.attempts:
                    raise error from failure
        raise AssertionError("unreachable")

    def _stream(self, call: Call[T], *, timeout: float | None) -> Iterator[T]:
        for attempt in count(1):
            server, begun = self._route.server, False
            method = getattr(self._stub(server), call.method)
            stream = method(call.request, timeout=timeout, metadata=server.headers(call.policy))
            try:
                for message in stream:
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
            self._channels[key] = server.channel()
        return PolicyServiceStub(self._channels[key])
