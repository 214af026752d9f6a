"""The newest weights that are known of a policy whose examples are few, server or not."""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from equipoise.errors import PolicyNotFoundError, require
from equipoise.results import Source, StepResult

logger = logging.getLogger("equipoise")


class Reading(Protocol):
    """What tells weights: a `PolicyClient`."""

    def read(self, ids: ArrayLike | None = None) -> StepResult:
        """The weights of ids: float32 [B]."""


class NewestWeights:
    """The weights of all S examples.

    Args:
        client: what tells them; None: they are 1.
        count: S.

    Attributes:
        client: the same; may be exchanged.
        version: (epoch, version) of the policy that they belong to.
        lost: whether the server did not tell the newest ones.
        fallbacks: how often it did not.
    """

    def __init__(self, client: Reading | None, count: int) -> None:
        self.client = client
        self.version = (0, 0)
        self.lost = False
        self.fallbacks = 0
        self._count = count
        self._weights: NDArray[np.float64] | None = None
        self.check()

    def check(self) -> None:
        """Raises InvalidRequestError if the policy is known to have more or fewer examples."""
        known = getattr(self.client, "num_examples", None)
        rule = f"must be as many as the policy has examples, {known}"
        require(known in (None, self._count), field="sources", value=self._count, rule=rule)

    def read(self) -> NDArray[np.float64]:
        """What the server says, else the last that it said, else ones: [S].

        Raises:
            EquipoiseError: what no retry mends; with `when_lost="wait"`, the server did not answer in time.
        """
        if self.client is not None:
            served = self._ask(self.client)
            self.check()
            self._note(lost=not served)
        return np.ones(self._count) if self._weights is None else self._weights

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        weights = None if self._weights is None else torch.from_numpy(self._weights.copy())
        return {"weights": weights, "epoch": self.version[0], "version": self.version[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the last known weights from a checkpoint."""
        self._weights = None if state["weights"] is None else state["weights"].numpy().copy()
        self.version = state["epoch"], state["version"]

    def _ask(self, client: Reading) -> bool:
        """Whether the server answers."""
        try:
            found = client.read(np.arange(self._count))
        except PolicyNotFoundError:  # a policy appears with the first step
            return False
        if found.source is Source.SERVED:
            self._weights, self.version = found.weights.astype(np.float64), (found.epoch, found.version)
        return found.source is Source.SERVED

    def _note(self, *, lost: bool) -> None:
        self.fallbacks += lost
        if lost and not self.lost:
            instead = "natural shares" if self._weights is None else "the last known weights"
            logger.warning("the server does not answer: mixing sources by %s", instead)
        elif self.lost and not lost:
            logger.warning("mixing sources by weight again")
        self.lost = lost
