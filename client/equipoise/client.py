"""The client for synchronous code."""

from collections.abc import Iterator
from time import monotonic
from types import TracebackType
from typing import Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.admin import PolicyAdmin
from equipoise.calls import Field
from equipoise.policies import PolicyStatus, ServerInfo
from equipoise.results import StepResult
from equipoise.stream import Stream
from equipoise.trainer import Trainer
from equipoise.window import Ticket
from equipoise.wire import StepFields


class PolicyClient(Trainer):
    """A trainer's connection to one policy. Connects on first use; safe to use from several threads.

    Example:
        >>> with PolicyClient("localhost:50051", policy="run-7", num_examples=50_000, rule="ema_sign") as client:
        ...     for ids, batch in loader:
        ...         losses, contributions = statistics(model, batch)
        ...         weights = client.step(ids, contributions=contributions, losses=losses).weights
        ...         (torch.from_numpy(weights) * losses).mean().backward()

    Args:
        address: `host:port` of the server; several with commas between them, to go on at another when one is lost.
        policy: name of the policy, `[a-z0-9][a-z0-9._-]{0,127}`.
        num_examples: N. When given, the policy is created unless it exists; else it must exist.
        rule: name of the rule; empty: the server's default.
        settings: settings of the rule by name.
        durability: `logged` (default): a step is answered once it is in the server's log; `behind`: at once.
        reference_nats: ln|V|, nats: the loss of a uniform guess, for the compression ratio.
        trainer_id: id of this trainer; default: random. Two live clients must not share one.
        when_lost: what a step does when the server is lost: `continue` with the newest weights known (a step never
            raises for the network), or `wait` for the server up to a deadline, for runs that must be reproducible.
        max_staleness: most steps that weights served before may be older than the newest step, with `continue`;
            beyond it weights are uniform.
        timeout: deadlines.
        backoff: waits between attempts to connect.
        limits: how much is kept.
        security: TLS and token; default: what the environment says (`EQUIPOISE_TOKEN`, ..., see `equipoise.Security`).
    """

    _admin: PolicyAdmin | None
    _stream: Stream | None

    def step(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> StepResult:
        """Sends a step's statistics and waits for weights.

        Args:
            ids: integers [B] in [0, N): the example of each row; may repeat.
            **fields: contributions, losses, scored, target_loss, guard_loss, step, weights_for, all_examples: see
                `equipoise.wire.StepFields`.

        Raises:
            InvalidRequestError: the input breaks a rule; nothing was sent.
            StepRefusedError: the server refused the step; it changed nothing.
            EquipoiseError: with `when_lost="wait"`, no answer before the deadline or state lost; in both modes, what no
                retry mends: no such policy, access denied, trainer replaced.
        """
        stream = self._connected()
        with self._lock:
            return self._finish(stream, self._session.step(ids, fields, now=monotonic(), waits=True))

    def submit(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> None:
        """Sends a step's statistics and never waits; `weights` gives what is answered.

        When the window is full the statistics are dropped and counted (`when_lost="continue"`).

        Raises:
            InvalidRequestError: the input breaks a rule; nothing was sent.
            StepRefusedError: the server refused an earlier step.
            WindowFullError: the window is full (`when_lost="wait"`).
            EquipoiseError: what no retry mends.
        """
        stream = self._connected()
        with self._lock:
            self._session.step(ids, fields, now=monotonic(), waits=False)
            stream.notify()

    def read(self, ids: ArrayLike | None = None, *, step: int | None = None) -> StepResult:
        """Reads the weights of ids [B] (None: of all N), as of all steps made before. Raises as `step` does.

        With `step`, for rule `trajectory`: those of this row; uniform once the server is lost (`when_lost="continue"`).
        """
        stream = self._connected()
        with self._lock:
            return self._finish(stream, self._session.read(ids, step=step, now=monotonic()))

    def flush(self, timeout: float | None = None, *, durable: bool = False) -> bool:
        """Waits until every step is answered (with `durable`: and in the server's store).

        Args:
            timeout: longest wait, seconds; default: `timeout.wait` with `when_lost="wait"`, else `timeout.call`.
            durable: whether to wait for the store too.

        Returns:
            Whether that is so now.

        Raises:
            StepRefusedError: the server refused a submitted step.
            EquipoiseError: what no retry mends.
        """
        stream = self._connected()
        with self._lock:
            done = stream.flush(self._patience if timeout is None else timeout, durable=durable)
            self._session.raise_unreported()
            return done

    def read_weights(
        self, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> NDArray[np.float32]:
        """Served weights or the rule's scores (NaN where never scored): float32 [len(ids)], or [N] without ids.

        With `rows`, for rule `trajectory`: the weights of these rows, float32 [len(rows), N], or [len(rows),
        len(ids)]; without, the mean weight of each example over all rows.
        """
        return self.admin.read_weights(self.policy, field, ids, rows=rows)

    def preload(self) -> None:
        """Reads the weights of all examples, up to `limits.cached_examples`: `weights` knows them from then on.

        For a trainer that joins, or comes back to, a policy that has learnt already.
        """
        status = self.status()
        weights = self.read_weights(ids=np.arange(min(status.spec.num_examples, self._options.limits.cached_examples)))
        with self._lock:
            self._session.preload(weights, uid=status.uid, num_examples=status.spec.num_examples)

    def sample_examples(
        self, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        """Draws ids with probability proportional to their weights: uint64 [count].

        Equal seed, version and arguments give equal ids.
        """
        return self.admin.sample_examples(self.policy, count, with_replacement=with_replacement, seed=seed)

    def status(self) -> PolicyStatus:
        """The policy as it stands."""
        return self.admin.get(self.policy)

    def watch(self, *, min_interval: float = 1.0) -> Iterator[PolicyStatus]:
        """The status now and whenever it changes, at most once per `min_interval` seconds."""
        return self.admin.watch(self.policy, min_interval=min_interval)

    def server_info(self) -> ServerInfo:
        """The server."""
        return self.admin.server_info()

    def delete(self) -> None:
        """Deletes the policy."""
        self.admin.delete(self.policy)

    @property
    def admin(self) -> PolicyAdmin:
        """Calls about any policy of the same server, over a connection of their own."""
        self._check_open()
        self._follow_fork()
        if self._admin is None:
            self._admin = PolicyAdmin(self.address, timeout=self._options.timeout.call, security=self._route.security)
        return self._admin

    def close(self) -> None:
        """Waits for submitted steps if the server is there, and disconnects; within `timeout.close`."""
        if self._closed:
            return
        self._follow_fork()
        self._closed = True
        if self._admin is not None:
            self._admin.close()
        if self._stream is None:
            return
        end = monotonic() + self._options.timeout.close
        with self._lock:
            while not self._session.unreachable and not self._stream.flush(0.02, durable=False) and monotonic() < end:
                pass
            self._note_unanswered()
        self._stream.close(max(0.1, end - monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self, stream: Stream, ticket: Ticket) -> StepResult:
        """Waits for a ticket; the caller holds the lock."""
        stream.notify()
        stream.wait(ticket)
        return ticket.value()

    def _start(self, trainer_id: str | None) -> None:
        super()._start(trainer_id)
        self._stream = None
        self._admin = None

    def _connected(self) -> Stream:
        self._check_open()
        self._follow_fork()
        with self._lock:
            if self._stream is None:
                self._stream = Stream(self._session, self._route, lock=self._lock)
            return self._stream

    def _leave_to_parent(self) -> None:
        # Kept for ever: letting go of the parent's connection would close it, which hangs without the parent's threads.
        _inherited.extend((self._stream, self._admin))


_inherited: list[object] = []
