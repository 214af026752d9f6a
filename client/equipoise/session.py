"""One trainer's conversation with one policy, without I/O: the whole logic of both clients.

A transport tells the session what happened and when (`begin`, `received`, `lost`, `expire`) and sends what
`next_message` gives. The session numbers steps, keeps those that are not durable, decides what is replayed to the next
stream, and gives every caller weights or an error.

Two modes. `continue`: training never stops. A step waits for its answer until its deadline; from then on, or from a
lost stream on, until the server is heard again, steps are answered at once from what was served before, while they are
kept and sent again. `wait`: steps wait, and what was lost is an error.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import errors, wire
from equipoise.config import Backoff, Limits, Timeout
from equipoise.errors import EquipoiseError
from equipoise.policies import PolicySpec
from equipoise.results import OUTCOMES, Outcome, Source, StepResult
from equipoise.stats import Stats
from equipoise.v1 import policy_pb2 as pb
from equipoise.weights_cache import WeightsCache
from equipoise.window import Ticket, Window

logger = logging.getLogger("equipoise")

WhenLost: TypeAlias = Literal["continue", "wait"]
"""What a step does when the server is lost: go on with the newest weights known, or wait."""

_PERMANENT = (
    errors.InvalidRequestError,
    errors.PolicyNotFoundError,
    errors.PolicyExistsError,
    errors.AccessDeniedError,
    errors.UnsupportedError,
)
"""What no retry mends before the first opening; later, in `continue` mode, an operator may mend it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """How a session behaves.

    Attributes:
        spec: the policy; with num_examples 0 it must exist.
        when_lost: see the module.
        max_staleness: most steps that weights served before may be older than the newest step, to be used at all.
        timeout: deadlines.
        backoff: waits between attempts to connect.
        limits: how much is kept.
    """

    spec: PolicySpec
    when_lost: WhenLost
    max_staleness: int
    timeout: Timeout
    backoff: Backoff
    limits: Limits

    def __post_init__(self) -> None:
        if self.when_lost not in ("continue", "wait"):
            raise errors.InvalidRequestError(
                field="when_lost", value=self.when_lost, rule="must be 'continue' or 'wait'"
            )
        if self.max_staleness < 0:
            raise errors.InvalidRequestError(
                field="max_staleness", value=self.max_staleness, rule="must not be negative"
            )


class Link(Enum):
    """State of the stream."""

    DOWN = "down"
    OPENING = "opening"
    OPEN = "open"
    LEAVING = "leaving"
    """The server asked to reconnect; answers to what was sent are still coming."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a transport does to open a stream.

    Attributes:
        create: the policy to create first; None: it exists.
        generation: number of the stream; what belongs to an earlier one is void.
    """

    create: pb.CreatePolicyRequest | None
    generation: int


class Session:
    """See the module.

    Args:
        options: how it behaves.
        trainer_id: id of the trainer.
        random: uniform numbers in [0, 1).
    """

    def __init__(self, options: SessionOptions, *, trainer_id: str, random: Callable[[], float]) -> None:
        self.options = options
        self.trainer_id = trainer_id
        self.generation = 0
        self.connect_at: float | None = None
        """When the next stream may be opened; None: there is one, or nobody has asked for anything yet."""
        self.failure: EquipoiseError | None = None
        """What ended the session for good."""
        self._random = random
        self._stats = Stats()
        self._link = Link.DOWN
        self._outage = False
        self._attempts = 0
        self._streams = 0
        self._bounds = wire.Bounds(num_examples=options.spec.num_examples)
        self._create = options.spec.num_examples > 0
        self._cache = WeightsCache(capacity=options.limits.cached_examples)
        self._cache.resize(options.spec.num_examples)
        self._window = Window(limits=options.limits)
        self._reads: deque[Ticket] = deque()
        self._outbox: deque[Ticket] = deque()
        self._in_flight: deque[Ticket] = deque()
        self._unreported: EquipoiseError | None = None
        self._warned: set[str] = set()
        self._uid = ""
        self._lost_policy = False
        self._unopened = False
        self._leave_within = 0.0
        self._seen = (0, 0)
        self._durable_sequence = 0
        self._made = 0
        self._made_when_served: int | None = None
        self._loaded = False

    # What a caller asks for.

    def step(self, ids: ArrayLike | None, fields: wire.StepFields, *, now: float, waits: bool) -> Ticket:
        """Makes a step; `waits`: its caller waits for the answer (and else learns of a refusal at the next call).

        Raises:
            EquipoiseError: the input breaks a rule, or the session has failed, or an earlier step was refused.
        """
        self.raise_unreported()
        request = wire.build_step(ids, fields, self._bounds)
        self._made += 1
        self._stats.steps += 1
        ticket = self._ticket(request, now, waits=waits)
        if not self._make_room(request):
            return self._turn_away(ticket, now)
        self._window.add(ticket)
        if self._link is Link.OPEN:  # else the next opening finds it in the window
            self._outbox.append(ticket)
        self._stats.unacked += 1
        self._wake(now)
        if self._outage and self._continues:
            self._fall_back(ticket, now)
        return ticket

    def read(self, ids: ArrayLike, *, now: float) -> Ticket:
        """Makes a read.

        Raises:
            EquipoiseError: the ids break a rule, or the session has failed.
        """
        self.raise_unreported()
        return self._read(wire.build_read(ids, self._bounds), now)

    def probe(self, now: float) -> None:
        """Asks how far the steps are durable, unless an answer that will tell is under way already."""
        if self._link is Link.OPEN and not self._in_flight and not self._outbox:
            self._read(wire.build_read([0], wire.Bounds()), now)

    def cached_weights(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Per id the weight of the newest answer that held it, else 1; all 1 beyond `max_staleness`."""
        rows = wire.example_ids("ids", ids, wire.Bounds(num_examples=self._bounds.num_examples))
        if self.staleness > self.options.max_staleness:
            return np.ones(len(rows), np.float32)
        return self._cache.lookup(rows)[0]

    def raise_unreported(self) -> None:
        """Raises what ended the session, or once what was refused of steps that nobody waited for."""
        if self.failure is not None:
            raise self.failure
        if self._unreported is not None:
            error, self._unreported = self._unreported, None
            raise error

    @property
    def staleness(self) -> int:
        """How many steps were made since the newest one whose answer has come (since the start, without one)."""
        return self._made - (self._made_when_served or 0)

    @property
    def stats(self) -> Stats:
        """A copy of the counters."""
        return replace(self._stats, undurable=len(self._window))

    @property
    def unreachable(self) -> bool:
        """Whether the server is known to be lost, or silent, now."""
        return self._outage

    def flushed(self, *, durable: bool) -> bool:
        """Whether every step is answered (and durable)."""
        return self.failure is not None or (not self._window if durable else self._stats.unacked == 0)

    # What a transport asks and tells.

    def connect(self, now: float) -> None:
        """Asks for a stream."""
        self._wake(now)

    def begin(self, now: float) -> Opening:
        """A stream is about to be opened."""
        assert self._link is Link.DOWN
        assert self.connect_at is not None
        self.generation += 1
        self.connect_at = None
        self._link = Link.OPENING
        self._unopened = True
        create = pb.CreatePolicyRequest(policy=self.options.spec.to_proto()) if self._create else None
        return Opening(create=create, generation=self.generation)

    def next_message(self) -> pb.ExchangeRequest | None:
        """What to send now; None: nothing."""
        if self._link is Link.OPENING and self._unopened:
            self._unopened = False
            opening = pb.OpenRequest(policy=self.options.spec.name, trainer_id=self.trainer_id, uid=self._uid)
            return pb.ExchangeRequest(open=opening)
        if self._link is not Link.OPEN or not self._outbox or len(self._in_flight) >= self.options.limits.in_flight:
            return None
        ticket = self._outbox.popleft()
        self._in_flight.append(ticket)
        return pb.ExchangeRequest(step=ticket.request.message)

    @property
    def opened(self) -> bool:
        """Whether the stream is open."""
        return self._link in (Link.OPEN, Link.LEAVING)

    @property
    def down(self) -> bool:
        """Whether there is no stream."""
        return self._link is Link.DOWN

    @property
    def left(self) -> bool:
        """Whether the stream has nothing more to give: the transport ends it and calls `leave`."""
        return self._link is Link.LEAVING and not self._in_flight

    def limit(self, max_batch_examples: int) -> None:
        """The server's largest batch is known."""
        self._bounds = replace(self._bounds, max_batch_examples=max_batch_examples)

    def received(self, message: pb.ExchangeResponse, now: float) -> None:
        """A message arrived.

        Raises:
            EquipoiseError: it cannot be; the transport ends the stream and calls `lost` with the error.
        """
        kind = message.WhichOneof("message")
        if kind == "opened":
            self._opened(message.opened, now)
        elif kind == "step":
            self._answered(message.step, now)
        elif kind == "reconnect":
            self._link = Link.LEAVING
            self._leave_within = message.reconnect.within_ms / 1000
        if self._outage and self.failure is None:
            self._outage = False
            logger.info("%s: the server answers again", self.options.spec.name)

    def leave(self, now: float) -> None:
        """The stream ended because the server asked to reconnect: no outage."""
        self._link = Link.DOWN
        self._outbox.clear()
        self.connect_at = now + self._random() * self._leave_within

    def lost(self, error: EquipoiseError, now: float) -> None:
        """The stream ended, or could not be opened."""
        waiting = [t for t in (*self._in_flight, *self._outbox) if t.request.reads and not t.settled]
        self._link = Link.DOWN
        self._in_flight.clear()
        self._outbox.clear()
        self._reads = deque(waiting)
        if self._is_final(error):
            self.fail(error, now)
            return
        self._adapt(error)
        delay = self.options.backoff.delay(self._attempts, self._random)
        self.connect_at = now + max(delay, error.retry_after or 0.0)
        self._attempts += 1
        self._begin_outage(str(error))
        if self._continues:
            for ticket in (*self._window, *waiting):
                self._fall_back(ticket, now)
            self._reads.clear()

    def expire(self, ticket: Ticket, now: float) -> None:
        """The caller of a step or read has waited long enough."""
        if ticket.settled:
            return
        self._begin_outage(f"no answer within {now - ticket.since:.3g} s")
        if self._continues:
            self._fall_back(ticket, now)
            return
        what = f"step {ticket.sequence}" if ticket.sequence else "a read"
        ticket.error = errors.DeadlineError(
            f"{self.options.spec.name}: {what} was not answered within {now - ticket.since:.3g} s; "
            "it is kept and may still be applied"
        )
        self._note_stall(ticket, now)

    def fail(self, error: EquipoiseError, now: float) -> None:
        """Ends the session for good: everyone who waits gets the error, and so does every later call."""
        self.failure = error
        self.connect_at = None
        self._link = Link.DOWN
        for ticket in (*self._window, *self._reads, *self._in_flight, *self._outbox):
            if not ticket.settled:
                ticket.error = error
                self._note_stall(ticket, now)
        self._reads.clear()
        self._in_flight.clear()
        self._outbox.clear()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """What a restarted trainer needs to go on exactly once: strings, integers and bytes."""
        return {
            "format": 1,
            "policy": self.options.spec.name,
            "trainer_id": self.trainer_id,
            "uid": self._uid,
            "sequence": self._window.last_sequence,
            "durable_sequence": self._durable_sequence,
            "epoch": self._seen[0],
            "version": self._seen[1],
            "window": [ticket.request.message.SerializeToString() for ticket in self._window],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where another session stopped; before the first step.

        Raises:
            InvalidRequestError: the state is not one of this policy, or the session was used already.
        """
        for field, want in (("format", 1), ("policy", self.options.spec.name)):
            if state.get(field) != want:
                raise errors.InvalidRequestError(
                    field=f"state[{field!r}]", value=repr(state.get(field)), rule=f"must be {want!r}"
                )
        if self._made or self._streams or self._link is not Link.DOWN:
            raise errors.InvalidRequestError(field="state", rule="must be loaded before the client is used")
        self.trainer_id = state["trainer_id"]
        self._uid = state["uid"]
        self._seen = (state["epoch"], state["version"])
        self._durable_sequence = state["durable_sequence"]
        self._loaded = True
        self._window.renumber(state["sequence"] - len(state["window"]))
        for data in state["window"]:
            message = pb.StepRequest.FromString(data)
            ids = wire.answer_ids(message, self._bounds.num_examples)
            request = wire.Request(message=message, answer_ids=ids, reads=False)
            self._window.add(Ticket(request=request, made=0, since=0.0, deadline=0.0, waits=False))
            self._stats.unacked += 1

    # Inside.

    @property
    def _continues(self) -> bool:
        return self.options.when_lost == "continue"

    def _ticket(self, request: wire.Request, now: float, *, waits: bool) -> Ticket:
        timeout = self.options.timeout
        patience = timeout.wait
        if self._continues:
            patience = timeout.step if self._streams else max(timeout.step, timeout.connect)
        return Ticket(request=request, made=self._made, since=now, deadline=now + patience, waits=waits)

    def _read(self, request: wire.Request, now: float) -> Ticket:
        ticket = self._ticket(request, now, waits=True)
        self._wake(now)
        if self._outage and self._continues:
            self._fall_back(ticket, now)
        elif self._link is Link.OPEN:
            self._outbox.append(ticket)
        else:
            self._reads.append(ticket)
        return ticket

    def _make_room(self, request: wire.Request) -> bool:
        while self._window.full_for(request):
            if not self._window.forget_oldest():
                return False
            self._stats.forgotten += 1
            self._warn("forgotten", "steps are answered but not durable, and the window is full: letting the oldest go")
        return True

    def _turn_away(self, ticket: Ticket, now: float) -> Ticket:
        if not self._continues:
            raise errors.WindowFullError(
                f"{self.options.spec.name}: {len(self._window)} steps wait for their answers; "
                "wait for them with flush(), or raise limits.window_steps and limits.window_bytes"
            )
        self._stats.dropped += 1
        self._warn("dropped", "the window is full: dropping the statistics of new steps until the server answers")
        self._fall_back(ticket, now, outcome=Outcome.DROPPED)
        return ticket

    def _wake(self, now: float) -> None:
        if self._link is Link.DOWN and self.connect_at is None:
            self.connect_at = now

    def _opened(self, message: pb.OpenResponse, now: float) -> None:
        if self._link is not Link.OPENING:
            raise errors.ServerBugError("the server opened a stream twice")
        self._check_num_examples(message.num_examples)
        self._reconcile(message, now)
        if self.failure is not None:
            return
        self._link = Link.OPEN
        self._create = False
        self._stats.reconnects += self._streams > 0
        self._streams += 1
        self._loaded = False
        self._durable_sequence = message.durable_sequence
        self._window.release(message.durable_sequence)
        replayed = [t for t in self._window if not t.answered or t.sequence > message.last_sequence]
        self._outbox.extend((*replayed, *self._reads))
        self._reads.clear()

    def _check_num_examples(self, num_examples: int) -> None:
        if self._bounds.num_examples != num_examples:
            self._bounds = replace(self._bounds, num_examples=num_examples)
            self._cache.resize(num_examples)

    def _reconcile(self, message: pb.OpenResponse, now: float) -> None:
        """Brings our numbering together with what the server holds of this trainer."""
        name, last, ours = self.options.spec.name, message.last_sequence, self._window.last_sequence
        if self._uid != message.uid:
            if self._uid or self._lost_policy:
                self._cache.clear()
                self._lose(self._durable_sequence, f"{name} is another incarnation of the policy now", now)
            self._uid, self._seen, self._lost_policy = message.uid, (0, 0), False
            self._window.renumber(last)
        elif last > ours:
            text = f"{name} is {last - ours} steps of this trainer ahead of the state that was loaded"
            if self._loaded and not self._continues:
                self.fail(errors.StateLostError(f"{text}: fork or import a policy to resume an old checkpoint"), now)
                return
            self._warn("ahead", text)
            self._stats.unacked -= sum(not t.answered for t in self._window)
            self._window.drop_applied(last)
        elif last + 1 < self._window.first_sequence:
            missing = self._window.first_sequence - 1 - last
            self._lose(missing, f"{name} has lost {missing} steps of this trainer that it had acknowledged", now)
            self._window.renumber(last)
        self._observe(message.epoch, message.version, now)

    def _lose(self, steps: int, text: str, now: float) -> None:
        self._stats.lost += steps
        if self._continues:
            logger.error("%s; going on with what is there", text)
        else:
            self.fail(errors.StateLostError(text), now)

    def _observe(self, epoch: int, version: int, now: float) -> None:
        """Holds the promise that (epoch, version) never goes back."""
        if (epoch, version) < self._seen:
            self._stats.regressions += 1
            text = f"{self.options.spec.name} went back from (epoch, version) {self._seen} to {(epoch, version)}"
            if self._continues:
                self._warn("regression", text)
            elif self.failure is None:
                self.fail(errors.StateLostError(text), now)
        self._seen = (epoch, version)

    def _answered(self, answer: pb.StepResponse, now: float) -> None:
        if not self._in_flight or self._in_flight[0].sequence != answer.sequence:
            raise errors.ServerBugError(f"the server answered sequence {answer.sequence} out of order")
        ticket = self._in_flight[0]
        weights = wire.float32s(answer.weights)
        refused = answer.outcome == pb.OUTCOME_REFUSED
        if not refused and (answer.outcome not in OUTCOMES or len(weights) != len(ticket.request.answer_ids)):
            raise errors.ServerBugError(
                f"the server answered sequence {answer.sequence} with outcome {answer.outcome} and "
                f"{len(weights)} weights for {len(ticket.request.answer_ids)} ids"
            )
        self._in_flight.popleft()
        self._attempts = 0
        self._observe(answer.epoch, answer.version, now)
        if self.failure is not None:
            return
        first_answer = not ticket.answered and not ticket.request.reads
        ticket.answered = True
        self._stats.unacked -= first_answer
        if refused:
            self._refuse(ticket, answer, now)
        else:
            self._serve(ticket, answer, weights, now, first_answer=first_answer)
        self._durable_sequence = max(self._durable_sequence, answer.durable_sequence)
        self._window.release(self._durable_sequence)

    def _serve(
        self, ticket: Ticket, answer: pb.StepResponse, weights: NDArray[np.float32], now: float, *, first_answer: bool
    ) -> None:
        outcome = OUTCOMES[answer.outcome]
        if first_answer:
            self._stats.applied += outcome is Outcome.APPLIED
            self._stats.duplicates += outcome is Outcome.DUPLICATE
        self._cache.store(ticket.request.answer_ids, weights, version=answer.version)
        self._made_when_served = max(self._made_when_served or 0, ticket.made)
        if ticket.settled or not ticket.waits:
            return
        ticket.result = StepResult(
            weights=weights,
            source=Source.SERVED,
            outcome=outcome,
            version=answer.version,
            epoch=answer.epoch,
            durable_sequence=answer.durable_sequence,
            staleness=0,
        )
        self._note_stall(ticket, now)

    def _refuse(self, ticket: Ticket, answer: pb.StepResponse, now: float) -> None:
        self._stats.refused += 1
        error = errors.from_status(answer.error, sequence=answer.sequence)
        if ticket.settled or not ticket.waits:
            logger.error("%s: step %d was refused: %s", self.options.spec.name, ticket.sequence, error)
            self._unreported = self._unreported or error
            return
        ticket.error = error
        self._note_stall(ticket, now)

    def _fall_back(self, ticket: Ticket, now: float, *, outcome: Outcome = Outcome.PENDING) -> None:
        """Gives a caller the newest weights known."""
        if ticket.settled or not ticket.waits:
            return
        ids = ticket.request.answer_ids
        weights, known = self._cache.lookup(ids)
        staleness = self.staleness
        stale = staleness <= self.options.max_staleness and bool(known.any())
        ticket.result = StepResult(
            weights=weights if stale else np.ones(len(ids), np.float32),
            source=Source.STALE if stale else Source.UNIFORM,
            outcome=Outcome.DROPPED if ticket.request.reads else outcome,
            version=self._seen[1],
            epoch=self._seen[0],
            durable_sequence=self._durable_sequence,
            staleness=staleness,
        )
        self._stats.fallbacks += 1
        self._note_stall(ticket, now)

    def _note_stall(self, ticket: Ticket, now: float) -> None:
        self._stats.longest_stall = max(self._stats.longest_stall, now - ticket.since)

    def _is_final(self, error: EquipoiseError) -> bool:
        if isinstance(error, errors.TrainerReplacedError | errors.InvalidRequestError):
            return True
        if not self._streams:
            return isinstance(error, _PERMANENT)
        lost = isinstance(error, errors.PolicyNotFoundError | errors.PolicyChangedError)
        return not self._continues and (lost or isinstance(error, _PERMANENT))

    def _adapt(self, error: EquipoiseError) -> None:
        """Makes the next opening fit this one's error: a policy that is gone, but not deleted, is created anew."""
        if isinstance(error, errors.PolicyDeletedError):
            return
        if isinstance(error, errors.PolicyNotFoundError):
            self._create = self.options.spec.num_examples > 0
        elif not isinstance(error, errors.PolicyChangedError):
            return
        self._lost_policy = self._lost_policy or bool(self._uid)
        self._uid = ""

    def _begin_outage(self, cause: str) -> None:
        if self._outage:
            return
        self._outage = True
        self._stats.outages += 1
        then = "training goes on with the newest weights known" if self._continues else "waiting for it"
        logger.warning("%s: the server is lost (%s); %s", self.options.spec.name, cause, then)

    def _warn(self, topic: str, text: str) -> None:
        """Logs once per session and topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning("%s: %s", self.options.spec.name, text)
