"""What the sync and the asyncio client share: their options, and all that needs no network."""

import logging
import os
import random
import re
import secrets
import threading
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise.config import Backoff, Limits, Timeout
from equipoise.errors import ClientClosedError, InvalidRequestError
from equipoise.options import SessionOptions, WhenLost
from equipoise.policies import Durability, PolicySpec, SettingValue, check_name
from equipoise.route import Route
from equipoise.security import Security
from equipoise.session import Session
from equipoise.stats import Stats

logger = logging.getLogger("equipoise")

TRAINER_ID = re.compile(r"[ -~]{1,128}")

ADDRESS = "localhost:50051"
"""Where a server listens unless told otherwise."""


class Trainer:
    """One trainer of one policy; see `equipoise.PolicyClient` for the arguments."""

    def __init__(
        self,
        address: str = ADDRESS,
        *,
        policy: str,
        num_examples: int | None = None,
        rule: str = "",
        settings: Mapping[str, SettingValue] | None = None,
        durability: Durability | None = None,
        reference_nats: float | None = None,
        trainer_id: str | None = None,
        when_lost: WhenLost = "continue",
        max_staleness: int = 1000,
        timeout: Timeout | None = None,
        backoff: Backoff | None = None,
        limits: Limits | None = None,
        security: Security | None = None,
    ) -> None:
        if num_examples is not None and num_examples < 1:
            raise InvalidRequestError(field="num_examples", value=num_examples, rule="must be at least 1")
        if trainer_id is not None and not TRAINER_ID.fullmatch(trainer_id):
            raise InvalidRequestError(
                field="trainer_id", value=repr(trainer_id), rule="must be 1 to 128 printable ASCII characters"
            )
        self.address = address
        self._route = Route(address, security)
        self.policy = check_name(policy)
        self._options = SessionOptions(
            spec=PolicySpec(
                name=policy,
                num_examples=num_examples or 0,
                rule=rule,
                settings=dict(settings or {}),
                durability=durability,
                reference_nats=reference_nats,
            ),
            when_lost=when_lost,
            max_staleness=max_staleness,
            timeout=timeout or Timeout(),
            backoff=backoff or Backoff(),
            limits=limits or Limits(),
        )
        self._closed = False
        self._start(trainer_id)

    @property
    def trainer_id(self) -> str:
        """Id of this trainer: random unless it was given; a forked child has its own."""
        self._follow_fork()
        return self._session.trainer_id

    @property
    def stats(self) -> Stats:
        """A copy of the counters."""
        self._follow_fork()
        with self._lock:
            return self._session.stats

    def for_policy(self, policy: str) -> Self:
        """A client with the same options, of another policy of the same server: one that was forked or imported."""
        options = self._options
        return type(self)(
            self.address,
            policy=policy,
            num_examples=options.spec.num_examples or None,
            rule=options.spec.rule,
            settings=options.spec.settings,
            durability=options.spec.durability,
            reference_nats=options.spec.reference_nats,
            when_lost=options.when_lost,
            max_staleness=options.max_staleness,
            timeout=options.timeout,
            backoff=options.backoff,
            limits=options.limits,
            security=self._route.security,
        )

    def weights(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Per id the weight of the newest answer that held it, else 1: float32 [len(ids)]. Asks nobody, never waits.

        All 1 when more than `max_staleness` steps are newer than the newest answer.
        """
        self._follow_fork()
        with self._lock:
            return self._session.cached_weights(ids)

    def state_dict(self) -> dict[str, Any]:
        """What a restarted trainer needs to go on exactly once, for its checkpoint: strings, integers and bytes.

        A policy does not roll back: to go on from an older checkpoint, fork or import a policy.
        """
        self._follow_fork()
        with self._lock:
            return self._session.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where the client stopped that gave `state`; before the first step.

        Raises:
            InvalidRequestError: the state is not one of this policy, or this client was used already.
        """
        self._follow_fork()
        with self._lock:
            self._session.load_state_dict(state)

    def _start(self, trainer_id: str | None) -> None:
        """Begins a session, and the connection-less state around it."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # Of its own, so that a trainer's seeded generator stays as it is.
        jitter = random.SystemRandom().random
        self._session = Session(self._options, trainer_id=trainer_id or secrets.token_hex(16), random=jitter)

    def _follow_fork(self) -> None:
        """In a forked child: a connection, a numbering and a trainer_id of its own."""
        if os.getpid() != self._pid:
            self._leave_to_parent()
            self._start(None)

    def _leave_to_parent(self) -> None:
        """Lets go of nothing that the parent uses."""

    @property
    def _patience(self) -> float:
        """How long a flush waits unless told otherwise, seconds."""
        timeout = self._options.timeout
        return timeout.wait if self._options.when_lost == "wait" else timeout.call

    def _note_unanswered(self) -> None:
        unacked = self._session.stats.unacked
        if unacked:
            logger.warning("%s: closed with %d steps that the server has not answered", self.policy, unacked)

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosedError(f"{self.policy}: the client was closed")
