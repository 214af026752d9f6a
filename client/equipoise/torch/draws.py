"""Ids drawn by the server, one request ahead of their use."""

import logging
from concurrent.futures import Future
from threading import Thread
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import InvalidRequestError, PolicyNotFoundError, UnavailableError

logger = logging.getLogger("equipoise")


class Sampling(Protocol):
    """What draws ids by weight: a `PolicyClient`."""

    def sample_examples(
        self, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        """Draws ids: uint64 [count]."""


class Draws:
    """Draw number 0, 1, 2, ... of one process; while one is used the next is under way.

    Args:
        client: what draws.
        num_examples: N.
        seed: equal seeds draw equal ids from equal weights.
        timeout: longest wait for a draw, seconds; then the draw is uniform.
        distinct: whether the ids of a draw differ.
    """

    def __init__(
        self, client: Sampling, num_examples: int, *, seed: int, timeout: float, distinct: bool = False
    ) -> None:
        self.lost = False
        """Whether the newest draw was uniform because the server did not answer."""
        self.fallbacks = 0
        """How many draws were uniform for that reason."""
        self.client = client
        """What draws; may be exchanged."""
        self._num_examples = num_examples
        self._seed = seed
        self._timeout = timeout
        self._distinct = distinct
        self._rank = 0
        self._size = 1
        self._coming: Future[NDArray[np.uint64]] | None = None

    def check(self) -> None:
        """Raises InvalidRequestError if the policy is known to have more or fewer examples, which would never come."""
        known = getattr(self.client, "num_examples", None)
        if known not in (None, self._num_examples):
            rule = f"must be that of the policy, {known}"
            raise InvalidRequestError(field="num_examples", value=self._num_examples, rule=rule)

    def begin(self, *, rank: int, size: int) -> None:
        """Draws to come are of `size` ids, and differ from those of processes of another rank."""
        self._rank, self._size = rank, size

    def take(self, number: int) -> NDArray[np.uint64]:
        """Ids of a draw, [size]; asks for the next one.

        Raises:
            EquipoiseError: what no retry mends.
        """
        self.check()
        ids = self._wait(number)
        if self._coming is None:
            self._ask(number + 1)
        self._note(lost=ids is None)
        if ids is None:
            return self.uniform(number)
        if int(ids.max()) >= self._num_examples:
            raise InvalidRequestError(
                field="num_examples", value=self._num_examples, rule=f"the policy has more: it gave id {ids.max()}"
            )
        return ids

    def uniform(self, number: int) -> NDArray[np.uint64]:
        """What the draw of this number is without a server, [size]."""
        generator = self._generator(number)
        if self._distinct:
            return generator.choice(self._num_examples, self._size, replace=False).astype(np.uint64)
        return generator.integers(self._num_examples, size=self._size, dtype=np.uint64)

    @property
    def coming(self) -> NDArray[np.uint64] | None:
        """The draw that is under way, once it is there; None: there is none, or not in time."""
        try:
            return None if self._coming is None else self._coming.result(self._timeout)
        except (TimeoutError, UnavailableError, PolicyNotFoundError):
            return None

    @coming.setter
    def coming(self, ids: NDArray[np.uint64] | None) -> None:
        self._coming = None
        if ids is not None:
            self._coming = Future()
            self._coming.set_result(ids)

    def _wait(self, number: int) -> NDArray[np.uint64] | None:
        """The draw that comes; None: not in time."""
        coming = self._coming or self._ask(number)
        try:
            # Who draws batch by batch does not wait for every one of them while the server is away.
            ids = coming.result(0.0 if self.lost and self._distinct else self._timeout)
        except TimeoutError as error:
            if isinstance(error, UnavailableError):
                self._coming = None
            return None  # a draw that is late serves the next time
        except (UnavailableError, PolicyNotFoundError):  # a policy appears with the first step
            ids = None
        self._coming = None
        return ids

    def _ask(self, number: int) -> Future[NDArray[np.uint64]]:
        self._coming = future = Future[NDArray[np.uint64]]()
        seed = int(self._generator(number).integers(2**63))
        Thread(target=self._draw, args=(future, seed), name="equipoise-draw", daemon=True).start()
        return future

    def _draw(self, future: Future[NDArray[np.uint64]], seed: int) -> None:
        try:
            future.set_result(self.client.sample_examples(self._size, with_replacement=not self._distinct, seed=seed))
        except BaseException as error:
            future.set_exception(error)

    def _generator(self, number: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, self._rank, number))

    def _note(self, *, lost: bool) -> None:
        self.fallbacks += lost
        if lost != self.lost:
            logger.warning(
                "the server does not answer: drawing examples uniformly" if lost else "drawing examples by weight again"
            )
        self.lost = lost
