"""Rows held by a policy server, under its rule `trajectory`."""

from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from equipoise import PolicyClient, Timeout
from equipoise.errors import DeadlineError, WindowFullError
from equipoise_trainer.offline.rows import RowSettings, Weights

RULE = "trajectory"


class ServedRows:
    """See `equipoise_trainer.offline.rows.RowHolder`. A context manager: it disconnects at the end.

    The policy's version is the number of moves, since every move is one step and nobody else makes any: what the server
    says is what counts, whoever of the two was killed in between. While the server is lost, moves wait for it.

    Args:
        address: `host:port` of the server.
        policy: name of the policy, created unless it exists.
        settings: what it is.
        reference_nats: ln|V|.
    """

    def __init__(self, address: str, *, policy: str, settings: RowSettings, reference_nats: float) -> None:
        self._settings = settings
        self._client = PolicyClient(
            address,
            policy=policy,
            num_examples=settings.num_examples,
            rule=RULE,
            settings={
                "rows": settings.rows,
                "learning_rate": settings.learning_rate,
                "policy_epochs": settings.policy_epochs,
            },
            reference_nats=reference_nats,
            # One id for all processes of this search: a new one ends the stream of one that still lives.
            trainer_id=f"{policy}.trainer"[-128:],
            when_lost="wait",
            timeout=Timeout(call=60.0),
        )
        # Opens the stream, which creates the policy.
        self._client.read([0], step=0)
        self._identity = f"{policy}/{self._client.status().uid}"

    @property
    def settings(self) -> RowSettings:
        """What the policy is."""
        return self._settings

    @property
    def identity(self) -> str:
        """Name and uid of the policy."""
        return self._identity

    def moves(self) -> int:
        """How many moves have been applied, over all rows."""
        return self._client.status().version

    def fetch(self, first: int, count: int) -> Weights:
        """Rows `first` to `first + count`, float32 [count, N]."""
        return self._client.read_weights(rows=range(first, first + count))

    def move(self, row: int, contributions: NDArray[np.float32]) -> None:
        """Sends a move, and waits only where as many are under way as may be lost and sent again."""
        try:
            self._submit(row, contributions)
        except WindowFullError:
            self.flush()
            self._submit(row, contributions)

    def flush(self) -> None:
        """Waits until all moves are applied and in the server's store. Raises DeadlineError when they are not."""
        if not self._client.flush(durable=True):
            raise DeadlineError(f"{self._identity}: moves were not applied and stored in time")

    def delete(self) -> None:
        """Deletes the policy."""
        self._client.delete()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def _submit(self, row: int, contributions: NDArray[np.float32]) -> None:
        self._client.submit(contributions=contributions, all_examples=True, step=row, omit_weights=True)
