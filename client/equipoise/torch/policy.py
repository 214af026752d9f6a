"""A policy as a job sees it: what its rule is to be told, and when it answers."""

from typing import Any, Final, Protocol, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.errors import UnavailableError
from equipoise.results import Source
from equipoise.torch.errors import CaptureError
from equipoise.torch.schedule import Schedule
from equipoise.wire import StepFields

LOSSES_FIRST: Final = frozenset({"strata"})
"""Rules that give weights for losses, before they know contributions: in the same step, also at a first visit. They
compare losses with those of the target, where these are told."""


class Policy(Protocol):
    """What gives weights for statistics: a `PolicyClient`."""

    def weights(self, ids: ArrayLike) -> NDArray[np.float32]:
        """The newest weights known."""

    def submit(self, ids: ArrayLike | None = None, **fields: Unpack[StepFields]) -> None:
        """Sends statistics and does not wait."""


def rule_of(client: Any) -> str | None:
    """The name of a policy's rule, of a client that was not given it from the server; None: that is lost."""
    rule: str | None = getattr(client, "rule", "")
    if rule or not hasattr(client, "admin"):
        return rule
    try:
        found = client.read([0], step=0).source is Source.SERVED  # it makes the policy, if there is none
        rule = client.admin.get(client.policy).spec.rule if found else None
    except UnavailableError:
        return None
    return rule


def check_told_enough(rule: str | None, schedule: Schedule, *, sampled: bool) -> None:
    """A rule is told what it needs, by what is measured.

    Args:
        rule: its name; None: it is not known.
        schedule: which batches are measured.
        sampled: whether examples are drawn by weight.

    Raises:
        CaptureError: it may need more.
    """
    if rule in LOSSES_FIRST or not (schedule.compare_every or (schedule.leaves_out and not sampled)):
        return
    why = f"rule {rule} needs" if rule else "the policy's rule is not known, and may need"
    raise CaptureError(
        f"{schedule}: {why} contributions of every row; those of some, or losses of the target, are enough for "
        f"{', '.join(sorted(LOSSES_FIRST))}: give PolicyClient(rule=...); those of some also where examples are drawn "
        "by weight: give sampled=True"
    )
