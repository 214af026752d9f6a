"""The steps of one trainer that are not durable yet, kept for replay."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from equipoise.config import Limits
from equipoise.errors import EquipoiseError
from equipoise.results import StepResult
from equipoise.wire import Request


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """A step or read, from when it is made until it is answered (and, a step, durable).

    Attributes:
        request: what is sent.
        made: how many steps the client had made, this one included.
        since: when it was made, seconds.
        deadline: when its caller stops waiting, seconds.
        waits: whether there is a caller who waits.
        answered: whether the server answered it.
        result: what its caller gets; None until settled, and for errors.
        error: what its caller gets instead.
    """

    request: Request
    made: int
    since: float
    deadline: float
    waits: bool
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

    @property
    def sequence(self) -> int:
        """Position among the trainer's steps, from 1; 0: a read."""
        return self.request.message.sequence


class Window:
    """Steps in the order of their sequences, without gaps."""

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
        size = self._bytes + request.message.ByteSize()
        return len(self._steps) >= self._limits.window_steps or (bool(self._steps) and size > self._limits.window_bytes)

    def add(self, ticket: Ticket) -> None:
        """Appends a step and gives it the next sequence."""
        self.last_sequence += 1
        ticket.request.message.sequence = self.last_sequence
        self._steps.append(ticket)
        self._bytes += ticket.request.message.ByteSize()

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
            ticket.request.message.sequence = self.last_sequence

    def drop(self, *, through: int) -> int:
        """Lets go of the steps up to a sequence; how many of them were not answered."""
        unanswered = 0
        while self._steps and self._steps[0].sequence <= through:
            unanswered += not self._steps[0].answered
            self._pop()
        return unanswered

    def _pop(self) -> None:
        self._bytes -= self._steps.popleft().request.message.ByteSize()
