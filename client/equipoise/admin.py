"""Calls about any policy of a server."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import calls
from equipoise.archive import PolicyArchive
from equipoise.calls import Attempts, Call, Field, ValuesChunk
from equipoise.channel import Channels
from equipoise.policies import ListedPolicy, PolicySpec, PolicyStatus, ServerInfo
from equipoise.route import Route
from equipoise.security import Security

T = TypeVar("T")


class PolicyAdmin:
    """Creates, lists, reads, copies and deletes the policies of a server. Safe to use from several threads.

    Every method asks the server, and raises an error of `equipoise.errors` when the call fails: `UnavailableError` when
    the server cannot be reached, `DeadlineError` when it does not answer in time, `AccessDeniedError` when it does not
    allow the call.

    Example:
        >>> with PolicyAdmin("localhost:50051") as admin:
        ...     for policy in admin.list_policies("run-"):
        ...         print(policy.spec.name, admin.get(policy.spec.name).effective_examples)

    Args:
        address: `host:port` of the server. With several, separated by commas, the next one is asked when one is lost.
        timeout: deadline of each call, seconds. Calls that move whole policies or follow one (`read_weights`, `watch`,
            `export_policy`, `import_policy`) have none; a lost server ends them within 15 s.
        security: TLS and token. By default the environment decides, see `Security.from_environment`.
    """

    def __init__(self, address: str, *, timeout: float = 10.0, security: Security | None = None) -> None:
        self.address = address
        self._timeout = timeout
        self._route = Route(address, security)
        self._channels = Channels()
        self._owns_channels = True

    @classmethod
    def _beside(cls, address: str, route: Route, channels: Channels, *, timeout: float) -> "PolicyAdmin":
        """One that uses a client's route and channels, and leaves them open."""
        admin = cls(address, timeout=timeout, security=route.security)
        admin._route, admin._channels, admin._owns_channels = route, channels, False
        return admin

    def create(self, spec: PolicySpec) -> PolicyStatus:
        """Creates a policy with uniform weights.

        If a policy of this name exists and agrees with every field that `spec` sets, nothing changes and the call
        returns that policy.

        Raises:
            PolicyExistsError: a policy of this name exists and differs.
            InvalidRequestError: the server does not know the rule, or a setting is out of its range.
            QuotaError: there is no room for another policy, or for so many examples.
        """
        return self._do(calls.create(spec))

    def fork(self, source: str, name: str) -> PolicyStatus:
        """Creates the policy `name` with the current state of the policy `source`.

        Raises:
            PolicyNotFoundError: there is no policy `source`.
            PolicyExistsError: there is a policy `name` already.
        """
        return self._do(calls.fork(source, name))

    def get(self, policy: str) -> PolicyStatus:
        """Returns the status of a policy.

        Raises:
            PolicyNotFoundError: there is no policy of this name.
        """
        return self._do(calls.get(policy))

    def list_policies(self, prefix: str = "") -> Iterator[ListedPolicy]:
        """Yields the policies whose names start with `prefix`, sorted by name."""
        token, more = "", True
        while more:
            page, token = self._do(calls.list_page(prefix, token))
            yield from page
            more = bool(token)

    def delete(self, policy: str, *, uid: str = "") -> None:
        """Deletes a policy and everything it has learnt.

        Args:
            policy: name of the policy.
            uid: delete it only if this is its `PolicyStatus.uid`, so that a policy made anew under the name stays.

        Raises:
            PolicyNotFoundError: there is no policy of this name.
            PolicyChangedError: the policy has another uid.
        """
        self._do(calls.delete(policy, uid=uid))

    def watch(self, policy: str, *, min_interval: float = 1.0) -> Iterator[PolicyStatus]:
        """Yields the status now, and again whenever it changes, at most once every `min_interval` seconds.

        Raises:
            PolicyNotFoundError: there is no policy of this name.
            PolicyDeletedError: the policy was deleted meanwhile.
        """
        return self._answers(calls.watch(policy, min_interval=min_interval))

    def read_weights(
        self, policy: str, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> NDArray[np.float32]:
        """Reads the weights or the scores of a policy's examples.

        Args:
            policy: name of the policy.
            field: `"weight"`, the served weight, with mean 1 over all examples; or `"score"`, the statistic that the
                rule keeps of each example, such as the moving average of its contributions, NaN if never scored. Of
                rule `strata` also `"loss"`, the smoothed loss in nats, and `"stratum"`, the number of its stratum.
            ids: integers [B] in [0, N), the examples to read; None: all N.
            rows: for rule `trajectory`, the training steps whose weights to read. Without it, the weight of an example
                is its mean over all steps.

        Returns:
            float32 [B] or [N]; with `rows`, float32 [len(rows), B] or [len(rows), N].

        Raises:
            PolicyNotFoundError: there is no policy of this name.
            InvalidRequestError: an id or row is out of range, or the rule keeps no such field.
        """
        values = calls.Values(rows)
        for chunk in self.read_chunks(policy, field, ids, rows=rows):
            values.add(chunk)
        return values.array()

    def read_chunks(
        self, policy: str, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> Iterator[ValuesChunk]:
        """As `read_weights`, but yields the values piece by piece, in order, for policies too large to hold at once.

        Each piece holds float32 `values`, the `offset` of the first in the whole, and the `version` of the policy that
        they belong to: steps that are made meanwhile show in later pieces.
        """
        return self._answers(calls.read_values(policy, field, ids, rows))

    def sample_examples(
        self, policy: str, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        """Draws example ids with probability proportional to their weights.

        Args:
            policy: name of the policy.
            count: number of ids to draw, in [1, 2^32).
            with_replacement: whether an id may be drawn more than once.
            seed: integer in [0, 2^64). The same seed gives the same ids as long as the policy does not change. None:
                the server chooses one.

        Returns:
            uint64 [count].

        Raises:
            PolicyNotFoundError: there is no policy of this name.
            InvalidRequestError: `count` or `seed` is out of range.
        """
        return self._do(calls.sample(policy, count, with_replacement=with_replacement, seed=seed))

    def export_policy(self, policy: str, path: str | Path) -> int:
        """Writes the whole state of a policy to a .npz file, which `numpy.load` can read.

        An existing file is replaced once the new one is complete.

        Returns:
            The version of the policy that was written.

        Raises:
            PolicyNotFoundError: there is no policy of this name.
            OSError: the file cannot be written.
        """
        archive = PolicyArchive.from_messages(self._answers(calls.export_state(policy)))
        archive.save(Path(path))
        return archive.version

    def import_policy(self, path: str | Path, name: str) -> PolicyStatus:
        """Creates the policy `name` with the state that `export_policy` wrote to a file. Its version starts at 0.

        Raises:
            PolicyExistsError: there is a policy of this name already.
            ArchiveError: the file is no exported policy.
            OSError: the file cannot be read.
        """
        return self._do(calls.import_state(name, PolicyArchive.load(Path(path)).messages(name)))

    def server_info(self) -> ServerInfo:
        """Returns the server's version, device, rules and limits."""
        return self._do(calls.server_info())

    def close(self) -> None:
        """Disconnects. Calls under way fail. The admin of a `PolicyClient` leaves the client connected."""
        if self._owns_channels:
            self._channels.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, call: Call[T]) -> T:
        [answer] = self._answers(call)
        return answer

    def _answers(self, call: Call[T]) -> Iterator[T]:
        attempts = Attempts(call, self._route, timeout=self._timeout)
        for server in attempts:
            with self._channels.stub(server) as stub:
                try:
                    answer = attempts.begin(stub)
                    yield from map(attempts.read, answer if call.streams else (answer,))
                    return
                except grpc.RpcError as failure:
                    pause = attempts.fail(failure)
                finally:
                    attempts.end()
            time.sleep(pause)
