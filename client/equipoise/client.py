"""The client for synchronous training loops."""

from collections.abc import Iterator
from time import monotonic
from types import TracebackType
from typing import Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.admin import PolicyAdmin
from equipoise.calls import Field
from equipoise.channel import Channels
from equipoise.errors import PolicyNotFoundError
from equipoise.policies import PolicyStatus, ServerInfo
from equipoise.results import StepResult
from equipoise.session import PROBE_SECONDS
from equipoise.stream import Stream
from equipoise.tickets import Ticket
from equipoise.trainer import Trainer
from equipoise.wire import StepFields


class PolicyClient(Trainer):
    """The connection of one trainer to one policy.

    The client connects when it is first used, reconnects by itself, and may be used from several threads. By default a
    lost server never stops training: a step then returns the newest weights known, keeps its statistics, and sends them
    again once the server is back. Each step is applied exactly once.

    A client belongs to the process that made it. Processes that are forked after its first call, such as the workers of
    a DataLoader, are safe as long as they do not use it; in them every method raises `ForkError`.

    Example:
        >>> with PolicyClient("localhost:50051", policy="run-7", num_examples=50_000, rule="ema_sign") as client:
        ...     for ids, batch in loader:
        ...         losses, contributions = statistics(model, batch)
        ...         weights = client.step(ids, contributions=contributions, losses=losses).weights
        ...         (torch.from_numpy(weights) * losses).mean().backward()

    Args:
        address: `host:port` of the server. With several, separated by commas, the client goes on at another server when
            one is lost.
        policy: name of the policy. It matches `[a-z0-9][a-z0-9._-]{0,127}`.
        num_examples: N, the number of training examples; their ids are the integers in [0, N). The policy is created
            with this size unless it exists. None: the policy must exist.
        rule: name of the rule that turns statistics into weights. Empty: the server's default.
        settings: settings of the rule by name. The rule's defaults hold for the others.
        durability: `"logged"`, the default, answers a step once it is in the server's log; `"behind"` answers at once.
        reference_nats: ln|V|, the loss of a uniform guess, nats. The server reports the compression ratio if it is set.
        trainer_id: id of this trainer, 1 to 128 printable ASCII characters. None: a random one. Two live clients must
            not share an id.
        when_lost: what a step does when the server is lost. `"continue"`, the default, returns the newest weights
            known. `"wait"` waits up to `timeout.wait` seconds and then raises, for runs that must be reproducible.
        max_staleness: how many steps old the newest weights may be and still be used while the server is lost. Beyond
            that, all weights are 1.
        timeout: deadlines, see `Timeout`.
        backoff: waits between attempts to connect, see `Backoff`.
        limits: how many steps and weights are kept, see `Limits`.
        security: TLS and token. By default the environment decides, see `Security.from_environment`.
        metrics: shows what this client sees, see `equipoise.metrics`. None: nobody.

    Raises:
        InvalidRequestError: an argument breaks a rule; the message names argument, value and rule.
    """

    _admin: PolicyAdmin | None
    _stream: Stream | None

    def step(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> StepResult:
        """Sends the statistics of one training step, and waits for the weights of its examples.

        A step needs at least one of `contributions`, `losses`, `reference_losses`, `gradient_sketches`, `successes`,
        `target_loss` and `guard_loss`; `rules.md` in the folder that `equipoise contract` shows tells which of them a
        rule needs.

        Args:
            ids: integers [B] in [0, N), the example of each row. An id may repeat: its rows count as one example with
                the mean of their statistics.
            **fields: the statistics by name, most of them arrays [B], and options; `equipoise.wire.StepFields` has all.

        Returns:
            The weights, float32 [B] with mean 1 over all examples of the policy, and where they come from. Multiply the
            loss of each example with its weight, and take the mean over the batch.

        Raises:
            InvalidRequestError: an argument breaks a rule. Nothing was sent.
            StepRefusedError: the server refused this step, or one that was submitted before. It changed nothing.
            DeadlineError: with `when_lost="wait"`, the server did not answer in time. The step may still be applied.
            StateLostError: with `when_lost="wait"`, the server has lost steps that it had acknowledged.
            PolicyNotFoundError: there is no such policy, and `num_examples` was not given.
            PolicyExistsError: the policy exists and differs from what was asked for.
            AccessDeniedError: the server does not allow this client to train the policy.
            TrainerReplacedError: another client uses the same `trainer_id`.
            ForkError: this process was forked from one that was connected.
            ClientClosedError: the client was closed.
        """
        stream = self._connected()
        with self._lock:
            return self._finish(stream, self._session.step(ids, fields, now=monotonic(), waits=True))

    def submit(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> None:
        """Sends the statistics of one training step without waiting for an answer.

        Read the weights later with `weights`, which does not wait either. At most `limits.window_steps` steps are on
        their way; beyond that, with `when_lost="continue"`, statistics are dropped and counted in `stats.dropped`.

        Args:
            ids: integers [B] in [0, N), the example of each row.
            **fields: as in `step`.

        Raises:
            InvalidRequestError: an argument breaks a rule. Nothing was sent.
            StepRefusedError: the server refused a step that was submitted before.
            WindowFullError: with `when_lost="wait"`, there is no room for another step.
            EquipoiseError: as in `step`, for what no retry mends.
        """
        stream = self._connected()
        with self._lock:
            self._session.step(ids, fields, now=monotonic(), waits=False)
            stream.notify()

    def read(self, ids: ArrayLike | None = None, *, step: int | None = None) -> StepResult:
        """Reads weights over the training stream: they include every step that this client has made before.

        Args:
            ids: integers [B] in [0, N); None: all N examples, at most `ServerInfo.max_batch_examples`.
            step: for rule `trajectory`, the training step (row) whose weights to read. While the server is lost these
                are uniform.

        Returns:
            The weights, float32 [B] or [N], and where they come from.

        Raises:
            EquipoiseError: as in `step`.
        """
        stream = self._connected()
        with self._lock:
            return self._finish(stream, self._session.read(ids, step=step, now=monotonic()))

    def flush(self, timeout: float | None = None, *, durable: bool = False) -> bool:
        """Waits until the server has answered every step.

        Args:
            timeout: longest wait, seconds. None: `timeout.wait` with `when_lost="wait"`, else `timeout.call`.
            durable: wait until every step is in the server's store, too.

        Returns:
            True if that is so, False if the time was up before.

        Raises:
            StepRefusedError: the server refused a step that was submitted.
            EquipoiseError: as in `step`, for what no retry mends.
        """
        stream = self._connected()
        with self._lock:
            done = stream.flush(self._patience if timeout is None else timeout, durable=durable)
            self._session.raise_unreported()
            return done

    def read_weights(
        self, field: Field = "weight", ids: ArrayLike | None = None, *, rows: range | None = None
    ) -> NDArray[np.float32]:
        """Reads the weights or the scores of the policy's examples; see `PolicyAdmin.read_weights`.

        Args:
            field: `"weight"` or `"score"`, the statistic that the rule keeps of each example, NaN if never scored; of
                rule `strata` also `"loss"` and `"stratum"`.
            ids: integers [B] in [0, N); None: all N examples.
            rows: for rule `trajectory`, the training steps whose weights to read.

        Returns:
            float32 [B] or [N]; with `rows`, float32 [len(rows), B] or [len(rows), N].

        Raises:
            EquipoiseError: the call failed; other than `step`, this asks the server and needs an answer.
        """
        return self.admin.read_weights(self.policy, field, ids, rows=rows)

    def preload(self) -> None:
        """Reads the weights of all examples, up to `limits.cached_examples`, so that `weights` knows them.

        Use it when a trainer joins, or comes back to, a policy that has learnt already.

        Raises:
            EquipoiseError: the call failed.
        """
        status = self.status()
        weights = self.read_weights(ids=np.arange(min(status.spec.num_examples, self._options.limits.cached_examples)))
        with self._lock:
            self._session.preload(weights, uid=status.uid, num_examples=status.spec.num_examples)

    def sample_examples(
        self, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        """Draws example ids with probability proportional to their weights; see `PolicyAdmin.sample_examples`.

        A policy that does not exist yet is created first, as by a first step.

        Args:
            count: number of ids to draw, in [1, 2^32).
            with_replacement: whether an id may be drawn more than once.
            seed: integer in [0, 2^64). The same seed gives the same ids as long as the policy does not change.

        Returns:
            uint64 [count].

        Raises:
            EquipoiseError: the call failed.
        """
        try:
            return self.admin.sample_examples(self.policy, count, with_replacement=with_replacement, seed=seed)
        except PolicyNotFoundError:
            if (spec := self._session.missing) is None:
                raise
        self.admin.create(spec)
        return self.admin.sample_examples(self.policy, count, with_replacement=with_replacement, seed=seed)

    def status(self) -> PolicyStatus:
        """Returns the status of the policy."""
        return self.admin.get(self.policy)

    def watch(self, *, min_interval: float = 1.0) -> Iterator[PolicyStatus]:
        """Yields the status now, and again whenever it changes, at most once every `min_interval` seconds."""
        return self.admin.watch(self.policy, min_interval=min_interval)

    def server_info(self) -> ServerInfo:
        """Returns the server's version, device, rules and limits."""
        return self.admin.server_info()

    def delete(self) -> None:
        """Deletes the policy and everything it has learnt."""
        self.admin.delete(self.policy)

    @property
    def admin(self) -> PolicyAdmin:
        """Calls about any policy of the same server, over this client's connection."""
        self._check_open()
        if self._admin is None:
            timeout = self._options.timeout.call
            self._admin = PolicyAdmin._beside(self.address, self._route, self._channels, timeout=timeout)
        return self._admin

    def close(self) -> None:
        """Waits for the answers to submitted steps if the server is there, then disconnects; within `timeout.close`."""
        if self._closed:
            return
        self._closed = True
        if self._left_to_parent():
            return
        end = monotonic() + self._options.timeout.close
        if self._stream is not None:
            with self._lock:
                while not self._session.unreachable and monotonic() < end:
                    if self._stream.flush(PROBE_SECONDS, durable=False):
                        break
                self._note_unanswered()
            self._stream.close(max(0.1, end - monotonic()))
        self._channels.close()
        self._leave()

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
        self._channels = Channels()

    def _connected(self) -> Stream:
        self._check_open()
        with self._lock:
            if self._stream is None:
                self._stream = Stream(self._session, self._route, self._channels, lock=self._lock)
            return self._stream
