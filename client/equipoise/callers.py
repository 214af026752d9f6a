"""The callers of a session: each gets what he waits for, weights or an error, once."""

import logging

from equipoise.errors import EquipoiseError
from equipoise.results import Outcome, StepResult
from equipoise.stats import Stats
from equipoise.view import PolicyView
from equipoise.window import Ticket

logger = logging.getLogger("equipoise")


class Callers:
    """See the module.

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
