"""The times without a server: noted once each, and waited through with backoff; and what no waiting mends."""

import logging
from collections.abc import Callable

from equipoise import errors
from equipoise.errors import EquipoiseError
from equipoise.options import SessionOptions

logger = logging.getLogger("equipoise")

_PERMANENT = (
    errors.PolicyNotFoundError,
    errors.PolicyExistsError,
    errors.AccessDeniedError,
    errors.QuotaError,
    errors.UnsupportedError,
)
"""What no retry mends before the first opening; later, in `continue` mode, an operator may mend it."""


def is_final(error: EquipoiseError, *, continues: bool, opened_before: bool) -> bool:
    """Whether an error ends a session for good, and is no outage."""
    if isinstance(error, errors.TrainerReplacedError | errors.InvalidRequestError):
        return True
    if isinstance(error, errors.PolicyChangedError):
        return not continues
    return isinstance(error, _PERMANENT) and not (continues and opened_before)


class Outage:
    """See the module.

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
