"""The stream of a session as it stands: down, opening, open, or about to be left."""

from dataclasses import dataclass
from enum import Enum

from equipoise.v1 import policy_pb2 as pb


class LinkState(Enum):
    """See the module."""

    DOWN = "down"
    OPENING = "opening"
    OPEN = "open"
    LEAVING = "leaving"
    """The server asked to reconnect; answers to what was sent are still coming."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a transport does to open a stream.

    Attributes:
        generation: number of the stream; what belongs to an earlier one is void.
        create: the policy to create first; None: it exists.
        asks_limits: whether to ask the server for its limits first, and tell them to `limit`.
    """

    generation: int
    create: pb.CreatePolicyRequest | None
    asks_limits: bool


class Link:
    """Streams come one after another, each with a number, its generation, from 1."""

    def __init__(self) -> None:
        self.state = LinkState.DOWN
        self.generation = 0
        self.opened = 0
        """How many streams the server has opened."""
        self.connect_at: float | None = None
        """When the next stream may be opened; None: there is one, or nobody has asked for anything yet."""
        self._first_message: pb.OpenRequest | None = None
        self._leave_within = 0.0

    def connect(self, now: float) -> None:
        """Plans a stream, unless there is one or one is planned."""
        if self.state is LinkState.DOWN and self.connect_at is None:
            self.connect_at = now

    def begin(self, first_message: pb.OpenRequest) -> int:
        """A stream is about to be opened with a message: its generation."""
        assert self.state is LinkState.DOWN
        self.state = LinkState.OPENING
        self.connect_at = None
        self.generation += 1
        self._first_message = first_message
        return self.generation

    def take_first_message(self) -> pb.OpenRequest | None:
        """The message that opens the stream; None: it was taken."""
        message, self._first_message = self._first_message, None
        return message

    def carries(self, generation: int) -> bool:
        """Whether a stream is the one of now."""
        return generation == self.generation and self.state is not LinkState.DOWN

    def is_opening(self, generation: int) -> bool:
        """Whether a stream waits for the answer to its opening."""
        return generation == self.generation and self.state is LinkState.OPENING

    def open(self) -> None:
        """The server has opened the stream."""
        self.state = LinkState.OPEN
        self.opened += 1

    def leave(self, within_s: float) -> None:
        """The server asks to reconnect within so many seconds."""
        self.state = LinkState.LEAVING
        self._leave_within = within_s

    def end(self) -> None:
        """The stream ended."""
        self.state = LinkState.DOWN
        self.connect_at = None

    def rejoin(self, now: float, *, jitter: float) -> None:
        """Plans the stream that the server asked for; `jitter` in [0, 1) spreads the trainers that come back."""
        self.connect_at = now + jitter * self._leave_within
