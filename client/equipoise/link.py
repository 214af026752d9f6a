"""The stream of a session as it stands, and the times without one: outages, and errors that no waiting mends."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from equipoise import errors
from equipoise.errors import EquipoiseError
from equipoise.options import SessionOptions
from equipoise.v1 import policy_pb2 as pb

logger = logging.getLogger("equipoise")

_PERMANENT = (
    errors.PolicyNotFoundError,
    errors.PolicyExistsError,
    errors.AccessDeniedError,
    errors.QuotaError,
    errors.UnsupportedError,
)
"""What no retry mends before the first opening; later, in `continue` mode, an operator may mend it."""

MAX_FOLLOWED = 3
"""Servers that are asked one after another without a wait, each named by the one before."""


class LinkState(Enum):
    """How the stream of a session stands."""

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
    """

    generation: int
    create: pb.CreatePolicyRequest | None


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
        self._followed = 0

    def connect(self, now: float) -> None:
        """Plans a stream, unless there is one or one is planned."""
        if self.state is LinkState.DOWN and self.connect_at is None:
            self.connect_at = now

    def begin(self, first_message: pb.OpenRequest) -> int:
        """A stream is about to be opened with a message, which tells the server its generation."""
        assert self.state is LinkState.DOWN
        self.state = LinkState.OPENING
        self.connect_at = None
        self.generation += 1
        first_message.attempt = self.generation
        self._first_message = first_message
        return self.generation

    def take_first_message(self) -> pb.OpenRequest | None:
        """The message that opens the stream; None: it was taken."""
        message, self._first_message = self._first_message, None
        return message

    @property
    def has_first_message(self) -> bool:
        """Whether the message that opens the stream waits to be taken."""
        return self._first_message is not None

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
        self._followed = 0

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

    def follow(self, error: EquipoiseError, now: float) -> bool:
        """Plans a stream to the server that an error names instead; whether it does, and that is worth no wait."""
        named = isinstance(error, errors.OwnershipError) and errors.OWNER in error.metadata
        if not named or self._followed == MAX_FOLLOWED:
            return False
        self._followed += 1
        self.connect_at = now
        return True


def is_final(error: EquipoiseError, *, continues: bool, opened_before: bool) -> bool:
    """Whether an error ends a session for good, and is no outage."""
    if isinstance(error, errors.TrainerReplacedError | errors.InvalidRequestError):
        return True
    if isinstance(error, errors.PolicyChangedError):
        return not continues
    return isinstance(error, _PERMANENT) and not (continues and opened_before)


class Outage:
    """The times without a server: each is logged once, and waited through with backoff.

    Args:
        options: how the session behaves.
        random: uniform numbers in [0, 1), for jitter.
    """

    def __init__(self, options: SessionOptions, *, random: Callable[[], float]) -> None:
        self.active = False
        """Whether the server is known to be lost, or silent, now."""
        self.count = 0
        """How many outages there were."""
        self._options = options
        self._random = random
        self._attempts = 0

    def begin(self, cause: str) -> None:
        """The server is lost or silent; logged when it is news."""
        if self.active:
            return
        self.active = True
        self.count += 1
        then = "training goes on with the newest weights known" if self._options.continues else "waiting for it"
        logger.warning("%s: the server is lost (%s); %s", self._options.spec.name, cause, then)

    def end(self) -> None:
        """The server spoke; logged when it is news."""
        if self.active:
            self.active = False
            logger.info("%s: the server answers again", self._options.spec.name)

    def delay(self, error: EquipoiseError) -> float:
        """How long to wait before the next attempt to connect, seconds."""
        delay = self._options.backoff.delay(self._attempts, self._random)
        self._attempts += 1
        return max(delay, error.retry_after or 0.0)

    def recover(self) -> None:
        """A step was answered: the next loss starts with the shortest wait."""
        self._attempts = 0
