"""One trainer's conversation with one policy, without I/O: the whole logic of both clients.

A transport tells the session what happened and when (`begin`, `received`, `ended`, `expire`) and sends what
`next_message` gives. The session numbers steps, keeps those that are not durable, decides what is replayed to the next
stream, and gives every caller weights or an error.

Two modes. `continue`: training never stops. A step waits for its answer until its deadline; from then on, or from a
lost stream on, until the server is heard again, steps are answered at once from what was served before, while they are
kept and sent again. `wait`: steps wait, and what was lost is an error.
"""

import logging
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import errors, wire
from equipoise.errors import EquipoiseError
from equipoise.link import Link, LinkState, Opening, Outage, is_final
from equipoise.memory import Checkpoint, Memory
from equipoise.options import SessionOptions
from equipoise.policies import PolicySpec
from equipoise.results import OUTCOMES, Outcome, Stats, StepResult
from equipoise.tickets import SUSPECT_BYTES, Callers, Suspect, Ticket, Window
from equipoise.v1 import policy_pb2 as pb
from equipoise.view import PolicyView

logger = logging.getLogger("equipoise")

PROBE_SECONDS = 0.02
"""How often a flush asks whether the steps are durable, seconds."""


class Session:
    """One trainer's conversation with one policy, without I/O.

    Args:
        options: how it behaves.
        trainer_id: id of the trainer.
        random: uniform numbers in [0, 1), for jitter.
        answered: hears how long each answer of the server took, seconds.
    """

    def __init__(
        self,
        options: SessionOptions,
        *,
        trainer_id: str,
        random: Callable[[], float],
        answered: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.options = options
        self._answered = answered
        self.trainer_id = trainer_id
        self.failure: EquipoiseError | None = None
        """What ended the session for good."""
        self._random = random
        self._client_id = secrets.token_hex(8)
        self._stats = Stats()
        self._view = PolicyView(
            num_examples=options.spec.num_examples,
            max_staleness=options.max_staleness,
            cached_examples=options.limits.cached_examples,
        )
        self._window = Window(limits=options.limits)
        self._reads: deque[Ticket] = deque()
        self._outbox: deque[Ticket] = deque()
        self._in_flight: deque[Ticket] = deque()
        self._link = Link()
        self._outage = Outage(options, random=random)
        self._callers = Callers(options.spec.name, view=self._view, stats=self._stats)
        self._memory = Memory(
            policy=options.spec.name, view=self._view, window=self._window, stats=self._stats, complain=self._complain
        )
        self._create = options.spec.num_examples > 0
        self._lost_policy = False
        self._loaded: int | None = None
        self._suspect: Suspect | None = None
        self._largest_answered = 0
        self._warned: set[str] = set()

    # What a caller asks for.

    def step(self, ids: ArrayLike | None, fields: wire.StepFields, *, now: float, waits: bool) -> Ticket:
        """Makes a step; `waits`: its caller waits for the answer (and else learns of a refusal at a later call).

        Raises:
            EquipoiseError: the input breaks a rule, the session has failed, or an earlier step was refused.
        """
        self.raise_unreported()
        request = wire.build_step(ids, fields, self._view.bounds)
        self._view.made += 1
        self._stats.steps += 1
        ticket = self._ticket(request, now, waits=waits)
        if not self._make_room(request):
            return self._turn_away(ticket, now)
        self._window.add(ticket)
        self._stats.unacked += 1
        if self._link.state is LinkState.OPEN:  # else the next opening finds it in the window
            self._outbox.append(ticket)
        self.connect(now)
        if self._outage.active and self._continues:
            self._callers.fall_back(ticket, now)
        return ticket

    @property
    def missing(self) -> PolicySpec | None:
        """The policy to make where it is not found: it was given, and no opening or answer has told of it yet."""
        return self.options.spec if self._create and not (self._view.uid or self._lost_policy) else None

    def read(self, ids: ArrayLike | None, *, step: int | None = None, now: float) -> Ticket:
        """Makes a read.

        Raises:
            EquipoiseError: the ids break a rule, the session has failed, or an earlier step was refused.
        """
        self.raise_unreported()
        return self._read(wire.build_read(ids, self._view.bounds, step=step), now)

    def probe(self, now: float) -> None:
        """Asks how far the steps are durable, unless an answer that will tell is under way already."""
        if self._link.state is LinkState.OPEN and not (self._outage.active or self._in_flight or self._outbox):
            self._read(wire.build_read([0], wire.Bounds()), now)

    def cached_weights(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Per id the weight of the newest answer that held it, else 1; all 1 beyond `max_staleness`."""
        return self._view.weights(self._known_ids(ids))[0]

    def knows(self, ids: ArrayLike) -> NDArray[np.bool_]:
        """Whether the weight of each id is known."""
        return self._view.knows(self._known_ids(ids))

    def preload(self, weights: NDArray[np.float32], *, uid: str, num_examples: int) -> None:
        """Takes note of the weights of the first examples of a policy, where no answer has told them yet."""
        if self._view.uid in ("", uid):  # else it is another incarnation, as the next opening will find out
            self._view.uid = uid
            self._view.resize(num_examples)
            self._view.preload(weights)

    def raise_unreported(self) -> None:
        """Raises what ended the session, or once what was refused of steps that nobody waited for."""
        if self.failure is not None:
            raise self.failure
        self._callers.raise_untold()

    @property
    def num_examples(self) -> int:
        """N; 0: not known yet."""
        return self._view.bounds.num_examples

    @property
    def stats(self) -> Stats:
        """A copy of the counters."""
        return replace(
            self._stats,
            undurable=len(self._window),
            outages=self._outage.count,
            staleness=self._view.staleness,
            connected=self.is_open and not self._outage.active,
        )

    @property
    def unreachable(self) -> bool:
        """Whether the server is known to be lost, or silent, now."""
        return self._outage.active or self.failure is not None

    def flushed(self, *, durable: bool) -> bool:
        """Whether every step is answered (and durable)."""
        return self.failure is not None or (not self._window if durable else self._stats.unacked == 0)

    def expire(self, ticket: Ticket, now: float) -> None:
        """The caller of a step or read has waited long enough."""
        if ticket.settled:
            return
        self._outage.begin(f"no answer within {now - ticket.since:.3g} s")
        if self._continues:
            self._callers.fall_back(ticket, now)
            return
        what = f"step {ticket.sequence}" if ticket.sequence else "a read"
        self._callers.settle(
            ticket,
            errors.DeadlineError(
                f"{self._name}: {what} was not answered within {now - ticket.since:.3g} s; it may still be applied"
            ),
            now,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a restarted trainer needs to go on exactly once: strings, integers and bytes."""
        return Checkpoint.of(self._view, self._window, policy=self._name, trainer_id=self.trainer_id).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where another session stopped; before the first step.

        Raises:
            InvalidRequestError: the state is not one of this policy, or the session was used already.
        """
        checkpoint = Checkpoint.from_dict(state, policy=self._name)
        if self._view.made or self._link.generation:
            raise errors.InvalidRequestError(field="state", rule="must be loaded before the client is used")
        self.trainer_id = checkpoint.trainer_id
        self._loaded = checkpoint.sequence
        checkpoint.restore(self._view, self._window)
        self._stats.unacked += len(self._window)

    # What a transport asks and tells.

    @property
    def connect_at(self) -> float | None:
        """When the next stream may be opened; None: there is one, or nobody has asked for anything yet."""
        return self._link.connect_at

    def replans(self, connect_at: float | None) -> bool:
        """Whether a transport that waits until then must look again."""
        return self.failure is not None or self._link.connect_at != connect_at

    def connect(self, now: float) -> None:
        """Asks for a stream, unless there is one or one is planned."""
        if self.failure is None:
            self._link.connect(now)

    def begin(self) -> Opening:
        """A stream is about to be opened."""
        message = pb.OpenRequest(
            policy=self._name, trainer_id=self.trainer_id, uid=self._view.uid, client_id=self._client_id
        )
        return Opening(
            generation=self._link.begin(message),
            create=pb.CreatePolicyRequest(policy=self.options.spec.to_proto()) if self._create else None,
        )

    def next_message(self, generation: int) -> pb.ExchangeRequest | None:
        """What to send now on a stream; None: nothing."""
        if self.is_void(generation):
            return None
        if (opening := self._link.take_first_message()) is not None:
            return pb.ExchangeRequest(open=opening)
        if not self._may_send:
            return None
        self._in_flight.append(self._outbox.popleft())
        return self._in_flight[-1].request.exchange

    def has_message(self, generation: int) -> bool:
        """Whether `next_message` gives one now, or never will again."""
        return self._may_send or self._link.has_first_message or self.is_void(generation)

    def is_void(self, generation: int) -> bool:
        """Whether nothing more is to be sent on a stream, ever."""
        return self.failure is not None or not self._link.carries(generation)

    def is_opening(self, generation: int) -> bool:
        """Whether a stream waits for the answer to its opening."""
        return self._link.is_opening(generation)

    @property
    def is_open(self) -> bool:
        """Whether the server has opened the stream of now."""
        return self._link.state in (LinkState.OPEN, LinkState.LEAVING)

    @property
    def left(self) -> bool:
        """Whether the stream has nothing more to give: the transport ends it."""
        return self.failure is not None or (self._link.state is LinkState.LEAVING and not self._in_flight)

    def received(self, message: pb.ExchangeResponse, now: float) -> None:
        """A message arrived.

        Raises:
            EquipoiseError: it cannot be; the transport ends the stream and calls `ended` with the error.
        """
        kind = message.WhichOneof("message")
        if kind == "opened":
            self._open(message.opened, now)
        elif kind == "step":
            self._answer(message.step, now)
        elif kind == "reconnect":
            self._link.leave(message.reconnect.within_ms / 1000)
        if self.failure is None:
            self._outage.end()

    def ended(self, error: EquipoiseError | None, now: float) -> None:
        """The stream ended, or could not be opened; None: it was `left`. That, and to be sent on, is no outage."""
        if self.failure is not None:
            return
        self._note_suspect()
        unsettled = [t for t in (*self._in_flight, *self._outbox, *self._reads) if t.request.reads and not t.settled]
        self._link.end()
        self._reads = deque(unsettled)
        self._in_flight.clear()
        self._outbox.clear()
        if error is None:
            self._link.rejoin(now, jitter=self._random())
        elif self._link.follow(error, now):
            pass
        elif is_final(error, continues=self._continues, opened_before=bool(self._link.opened)):
            self.fail(error, now)
        else:
            self._lose_stream(error, now)

    def fail(self, error: EquipoiseError, now: float) -> None:
        """Ends the session for good: everyone who waits gets the error, and so does every later call."""
        self.failure = error
        self._link.connect_at = None
        for ticket in (*self._window, *self._reads, *self._in_flight, *self._outbox):
            self._callers.settle(ticket, error, now)
        for queue in (self._reads, self._in_flight, self._outbox):
            queue.clear()

    # Tickets.

    @property
    def _may_send(self) -> bool:
        """Whether a step or read can go out now."""
        room = len(self._in_flight) < self.options.limits.in_flight
        return room and bool(self._outbox) and self._link.state is LinkState.OPEN

    @property
    def _name(self) -> str:
        return self.options.spec.name

    @property
    def _continues(self) -> bool:
        return self.options.continues

    def _known_ids(self, ids: ArrayLike) -> NDArray[np.uint64]:
        return wire.example_ids("ids", ids, wire.Bounds(num_examples=self._view.bounds.num_examples))

    def _ticket(self, request: wire.Request, now: float, *, waits: bool) -> Ticket:
        patience = self.options.patience(connected_before=self._link.opened > 0)
        return Ticket(request=request, made=self._view.made, since=now, deadline=now + patience, waits=waits)

    def _read(self, request: wire.Request, now: float) -> Ticket:
        ticket = self._ticket(request, now, waits=True)
        self.connect(now)
        if self._outage.active and self._continues:
            self._callers.fall_back(ticket, now)
        elif self._link.state is LinkState.OPEN:
            self._outbox.append(ticket)
        else:
            self._reads.append(ticket)
        return ticket

    def _make_room(self, request: wire.Request) -> bool:
        while self._window.full_for(request):
            # Without a stream nobody knows whether a server lives that has what was answered but is not durable.
            if self._link.state is not LinkState.OPEN or not self._window.forget_oldest():
                return False
            self._stats.forgotten += 1
            self._warn("forgotten", "steps are answered but not durable, and the window is full: letting the oldest go")
        return True

    def _turn_away(self, ticket: Ticket, now: float) -> Ticket:
        if not self._continues:
            raise errors.WindowFullError(
                f"{self._name}: {len(self._window)} steps wait for their answers; "
                "wait for them with flush(), or raise limits.window_steps and limits.window_bytes"
            )
        self._stats.dropped += 1
        self._warn("dropped", "the window is full: dropping the statistics of new steps until the server answers")
        self._callers.fall_back(ticket, now, Outcome.DROPPED)
        return ticket

    # Openings.

    def _open(self, message: pb.OpenResponse, now: float) -> None:
        if self._link.state is not LinkState.OPENING:
            raise errors.ServerBugError(f"{self._name}: the server opened a stream twice")
        self._view.resize(message.num_examples)
        ours = self._window.last_sequence if self._loaded is None else self._loaded
        self._memory.reconcile(message, last_sequence=ours, was_lost=self._lost_policy, now=now)
        if self.failure is not None:
            return
        self._stats.reconnects += self._link.opened > 0
        self._link.open()
        self._create = self._lost_policy = False
        self._loaded = None
        self._view.durable_sequence = message.durable_sequence
        self._view.limit(max_batch_examples=message.max_batch_examples, max_message_bytes=message.max_message_bytes)
        self._window.release(message.durable_sequence)
        self._refuse_oversized(message.last_sequence, now)
        self._outbox.extend(t for t in self._window if not t.answered or t.sequence > message.last_sequence)
        self._outbox.extend(self._reads)
        self._reads.clear()

    def _refuse_oversized(self, last_sequence: int, now: float) -> None:
        """Gives up what the server, or something on the way to it, never takes: else it would be sent for ever."""
        steps = [ticket for ticket in self._window if ticket.sequence > last_sequence]
        for ticket in (*steps, *self._reads):
            error: EquipoiseError | None = wire.oversize(ticket.request, self._view.bounds)
            if error is None and self._suspect is not None and self._suspect.ticket is ticket:
                error = self._suspect.verdict()
            if error is None:
                continue
            if ticket.request.reads:
                self._reads.remove(ticket)
            else:
                self._stats.unacked -= not ticket.answered
                self._window.remove(ticket)
            self._callers.refuse(ticket, error, now)

    def _note_suspect(self) -> None:
        """The stream is ending: was it the oldest message without an answer, once more?"""
        first = self._in_flight[0] if self._in_flight else None
        if first is None:
            return
        if self._suspect is None or self._suspect.ticket is not first:
            size = first.request.size
            self._suspect = Suspect(first) if size > max(SUSPECT_BYTES, self._largest_answered) else None
        if self._suspect is not None:
            self._suspect.streams += 1

    def _complain(self, text: str, now: float) -> None:
        """The server's state does not go together with ours: the end in `wait` mode, logged in `continue` mode."""
        if self._continues:
            logger.error("%s; going on with what is there", text)
        elif self.failure is None:
            self.fail(errors.StateLostError(text), now)

    # Answers.

    def _answer(self, answer: pb.StepResponse, now: float) -> None:
        ticket = self._in_flight[0] if self._in_flight else None
        if ticket is None or ticket.sequence != answer.sequence:
            raise errors.ServerBugError(f"{self._name}: the server answered sequence {answer.sequence} out of order")
        refused = answer.outcome == pb.OUTCOME_REFUSED
        weights = wire.float32s(answer.weights)
        ids = ticket.request.answer_ids
        if not refused and (answer.outcome not in OUTCOMES or len(weights) != len(ids)):
            raise errors.ServerBugError(
                f"{self._name}: the server answered sequence {answer.sequence} with outcome {answer.outcome} and "
                f"{len(weights)} weights for {len(ids)} ids"
            )
        self._memory.observe(answer.epoch, answer.version, now)
        if self.failure is not None:
            return
        self._in_flight.popleft()
        self._largest_answered = max(self._largest_answered, ticket.request.size)
        self._outage.recover()
        is_new = not ticket.answered and not ticket.request.reads
        if not ticket.answered:
            self._answered(now - ticket.since)
        ticket.answered = True
        self._stats.unacked -= is_new
        if refused:
            if is_new or ticket.request.reads:  # a replay is refused again: its caller knows
                error = errors.from_status(answer.error, sequence=answer.sequence)
                self._callers.refuse(ticket, error, now)
        else:
            self._stats.applied += is_new and answer.outcome == pb.OUTCOME_APPLIED
            self._stats.duplicates += is_new and answer.outcome == pb.OUTCOME_DUPLICATE
            if not ticket.request.of_row:
                self._view.serve(answer, ids, weights, made=ticket.made)
            self._callers.settle(ticket, StepResult.served(answer, weights), now)
        self._view.durable_sequence = max(self._view.durable_sequence, answer.durable_sequence)
        self._window.release(self._view.durable_sequence)

    # Losses.

    def _lose_stream(self, error: EquipoiseError, now: float) -> None:
        if isinstance(error, errors.PolicyNotFoundError | errors.PolicyChangedError) and not isinstance(
            error, errors.PolicyDeletedError
        ):
            # The server's store has lost the policy, or someone made another: go on with a new one.
            self._create = self.options.spec.num_examples > 0
            self._lost_policy = self._lost_policy or bool(self._view.uid)
            self._view.uid = ""
        self._link.connect_at = now + self._outage.delay(error)
        self._outage.begin(str(error))
        if self._continues:
            for ticket in (*self._window, *self._reads):
                self._callers.fall_back(ticket, now)
            self._reads.clear()

    def _warn(self, topic: str, text: str) -> None:
        """Logs once per session and topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning("%s: %s", self._name, text)
