"""Steps and reads, from when they are made until they are answered and durable; and the callers who wait for them."""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from equipoise import errors
from equipoise.errors import EquipoiseError
from equipoise.options import Limits
from equipoise.results import Outcome, Stats, StepResult
from equipoise.view import PolicyView
from equipoise.wire import Request

logger = logging.getLogger("equipoise")

SUSPECT_BYTES = 64 << 10
"""No limit on the way is below this."""
SUSPECT_STREAMS = 5
"""How many streams end at a message before it is given up."""


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """A step or read, from when it is made until it is answered (and, a step, durable).

    Attributes:
        request: what is sent.
        made: how many steps the client had made, this one included.
        since: when it was made, seconds.
        deadline: when its caller stops waiting, seconds.
        waits: whether there is a caller who waits.
        sequence: position among the trainer's steps, from 1; 0: a read.
        answered: whether the server answered it.
        result: what its caller gets; None until settled, and for errors.
        error: what its caller gets instead.
    """

    request: Request
    made: int
    since: float
    deadline: float
    waits: bool
    sequence: int = 0
    answered: bool = False
    result: StepResult | None = None
    error: EquipoiseError | None = None

    @property
    def settled(self) -> bool:
        """Whether its caller has something to go on with."""
        return self.result is not None or self.error is not None

    def value(self) -> StepResult:
        """What its caller gets; raises when that is an error."""
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def number(self, sequence: int) -> None:
        """Gives a step its position among the trainer's steps."""
        self.sequence = sequence
        self.request.message.sequence = sequence


class Window:
    """The steps that are not durable yet, kept for replay, in the order of their sequences, without gaps."""

    def __init__(self, *, limits: Limits) -> None:
        self._limits = limits
        self._steps: deque[Ticket] = deque()
        self._bytes = 0
        self.last_sequence = 0
        """Sequence of the newest step ever added."""

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._steps)

    @property
    def first_sequence(self) -> int:
        """Sequence of the oldest step kept; that of the next step when none is."""
        return self.last_sequence + 1 - len(self._steps)

    def full_for(self, request: Request) -> bool:
        """Whether a step does not fit."""
        if len(self._steps) >= self._limits.window_steps:
            return True
        return bool(self._steps) and self._bytes + request.size > self._limits.window_bytes

    def add(self, ticket: Ticket) -> None:
        """Appends a step and gives it the next sequence."""
        self.last_sequence += 1
        ticket.number(self.last_sequence)
        self._steps.append(ticket)
        self._bytes += ticket.request.size

    def forget_oldest(self) -> bool:
        """Lets go of the oldest step if it was answered; whether it did."""
        if not self._steps or not self._steps[0].answered:
            return False
        self._pop()
        return True

    def release(self, durable_sequence: int) -> None:
        """Lets go of the steps that are answered and durable."""
        while self._steps and self._steps[0].answered and self._steps[0].sequence <= durable_sequence:
            self._pop()

    def renumber(self, last_sequence: int) -> None:
        """Numbers the steps kept anew, from the one after `last_sequence`."""
        self.last_sequence = last_sequence
        for ticket in self._steps:
            self.last_sequence += 1
            ticket.number(self.last_sequence)

    def drop(self, *, through: int) -> int:
        """Lets go of the steps up to a sequence; how many of them were not answered."""
        unanswered = 0
        while self._steps and self._steps[0].sequence <= through:
            unanswered += not self._steps[0].answered
            self._pop()
        return unanswered

    def remove(self, ticket: Ticket) -> None:
        """Lets go of a step that the server does not have; those behind it move up."""
        self._steps.remove(ticket)
        self._bytes -= ticket.request.size
        self.last_sequence -= 1
        for later in self._steps:
            if later.sequence > ticket.sequence:
                later.number(later.sequence - 1)

    def _pop(self) -> None:
        self._bytes -= self._steps.popleft().request.size


class Callers:
    """Those who wait for tickets: each gets weights or an error, once.

    Args:
        policy: name of the policy, for messages.
        view: what is known of it.
        stats: counters, kept here.
    """

    def __init__(self, policy: str, *, view: PolicyView, stats: Stats) -> None:
        self._policy = policy
        self._view = view
        self._stats = stats
        self._untold: EquipoiseError | None = None

    def raise_untold(self) -> None:
        """Raises, once, what was refused of steps that nobody waited for."""
        if self._untold is not None:
            error, self._untold = self._untold, None
            raise error

    def settle(self, ticket: Ticket, outcome: StepResult | EquipoiseError, now: float) -> None:
        """Gives a caller what he waits for, if he still does."""
        if ticket.settled or not ticket.waits:
            return
        if isinstance(outcome, StepResult):
            ticket.result = outcome
        else:
            ticket.error = outcome
        self._stats.longest_stall = max(self._stats.longest_stall, now - ticket.since)

    def fall_back(self, ticket: Ticket, now: float, outcome: Outcome = Outcome.PENDING) -> None:
        """Gives a caller the newest weights known."""
        if ticket.settled or not ticket.waits:
            return
        self._stats.fallbacks += 1
        request = ticket.request
        if request.reads:
            outcome = Outcome.DROPPED
        self.settle(ticket, self._view.fallback(request.answer_ids, outcome, knows=not request.of_row), now)

    def refuse(self, ticket: Ticket, error: EquipoiseError, now: float) -> None:
        """The server refused what a caller sent; one who has gone on learns it at his next call."""
        self._stats.refused += 1
        if ticket.settled or not ticket.waits:
            logger.error("%s: step %d was refused: %s", self._policy, ticket.sequence, error)
            self._untold = self._untold or error
        self.settle(ticket, error, now)


@dataclass(slots=True)
class Suspect:
    """A message, larger than any that was answered, at which streams end.

    A proxy's limit shows in no other way: it resets the stream, and a trainer who sends the message again and again
    trains without a server from then on.
    """

    ticket: Ticket
    streams: int = 0

    def verdict(self) -> EquipoiseError | None:
        """What its caller is told once enough streams have ended at it; None: it may have been chance."""
        if self.streams < SUSPECT_STREAMS:
            return None
        size = self.ticket.request.size
        return errors.InvalidRequestError(
            field="ids",
            value=f"a message of {size} bytes",
            rule=f"{self.streams} streams ended at it: something on the way to the server seems to take no message of"
            " this size (a proxy's limit); send fewer rows at once",
        )
