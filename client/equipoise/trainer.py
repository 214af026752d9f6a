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

from equipoise import forks
from equipoise.errors import ClientClosedError, ForkError, is_integer, require
from equipoise.options import Backoff, ClientMetrics, Limits, SessionOptions, Timeout, WhenLost
from equipoise.policies import Durability, PolicySpec, SettingValue, check_name
from equipoise.results import Stats
from equipoise.route import Route
from equipoise.security import Security
from equipoise.session import Session

logger = logging.getLogger("equipoise")

TRAINER_ID = re.compile(r"[ -~]{1,128}")

ADDRESS = "localhost:50051"
"""Where a server listens unless told otherwise."""


class Trainer:
    """One trainer of one policy, without a connection. `equipoise.PolicyClient` documents the arguments."""

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
        metrics: ClientMetrics | None = None,
    ) -> None:
        if num_examples is not None:
            fits = is_integer(num_examples, 1, 1 << 63)
            require(fits, field="num_examples", value=num_examples, rule="must be an integer in [1, 2^63)")
        if trainer_id is not None:
            fits = isinstance(trainer_id, str) and TRAINER_ID.fullmatch(trainer_id) is not None
            require(fits, field="trainer_id", value=trainer_id, rule="must be 1 to 128 printable ASCII characters")
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
        self._metrics = metrics
        self._start(trainer_id)

    @property
    def trainer_id(self) -> str:
        """The id of this trainer: the one that was given, or a random one. A forked child has an id of its own."""
        self._follow_fork()
        return self._session.trainer_id

    @property
    def rule(self) -> str:
        """Name of the policy's rule, as it was given; empty: it was not."""
        return self._options.spec.rule

    @property
    def num_examples(self) -> int | None:
        """N, as it was given or as the server said when a stream was opened; None: not known yet."""
        return self._session.num_examples or None

    @property
    def stats(self) -> Stats:
        """The client's counters, as a copy."""
        self._follow_fork()
        with self._lock:
            return self._session.stats

    def for_policy(self, policy: str) -> Self:
        """Returns a new client of another policy of the same server, such as a fork, with the same options.

        Raises:
            InvalidRequestError: the name is none for a policy.
        """
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
            metrics=self._metrics,
        )

    def weights(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Returns the newest weights known, without asking the server or waiting.

        Args:
            ids: integers [B] in [0, N).

        Returns:
            float32 [B]: for each id the weight in the newest answer that held it, 1 if there was none. All are 1 when
            more than `max_staleness` steps are newer than the newest answer.

        Raises:
            InvalidRequestError: an id is out of range.
        """
        self._follow_fork()
        with self._lock:
            return self._session.cached_weights(ids)

    def knows(self, ids: ArrayLike) -> NDArray[np.bool_]:
        """Whether an answer, or `preload`, has told the weight of each id; without asking the server or waiting.

        Args:
            ids: integers [B] in [0, N).

        Returns:
            bool [B].
        """
        self._follow_fork()
        with self._lock:
            return self._session.knows(ids)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a restarted trainer needs to go on exactly once, to be saved: strings, integers and bytes.

        A policy does not roll back. To go on from an older checkpoint, fork or import a policy.
        """
        self._follow_fork()
        with self._lock:
            return self._session.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up where the client stopped that gave `state`. Call it before the first step.

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
        self._session = Session(
            self._options, trainer_id=trainer_id or secrets.token_hex(16), random=jitter, answered=self._answered
        )
        if self._metrics is not None:
            self._metrics.joined(self, self._options)

    def _answered(self, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.answered(self.policy, seconds)

    def _leave(self) -> None:
        """The client is closing."""
        if self._metrics is not None:
            self._metrics.left(self)

    def _follow_fork(self) -> None:
        """In a forked child: a numbering and a trainer_id of its own; ForkError if the parent was connected."""
        if forks.cut_off():
            raise ForkError
        if os.getpid() != self._pid:
            self._start(None)

    def _left_to_parent(self) -> bool:
        """Whether what this client holds is its parent's: this process was forked from it, and has not used it."""
        return os.getpid() != self._pid

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
        self._follow_fork()
