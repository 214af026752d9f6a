"""Drawing examples by weight, where others weigh their losses."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from equipoise.errors import InvalidRequestError
from equipoise.torch.draws import Draws, Sampling
from equipoise.torch.processes import num_processes
from equipoise.torch.processes import rank as rank_here

READ_AHEAD = 1 << 16
"""Most ids that a DataLoader may have taken ahead of the training step, for `state_dict(trained=...)`."""


class WeightedSampler(Sampler[int]):
    """Draws ids with probability proportional to their served weights, with replacement.

    An example of weight 2 comes twice as often as one of weight 1: in the mean over many steps the gradient is that of
    the weighted loss. So **do not weigh the losses again**: average them as they are, and send statistics as ever.
    Sampling spends no time on examples of small weight, and makes gradients noisier than weighing does.

    Ids are drawn in requests of `draw`, one request ahead, so that the training loop does not wait for the network and
    no id is older than two requests. When the server is lost, or there is no policy yet, draws are uniform until it
    answers again. In a job of several processes each makes independent draws of its own, and an epoch is shared out
    among them: no `DistributedSampler` around it.

    Example:
        >>> sampler = WeightedSampler(client, len(dataset))
        >>> for ids, batch in DataLoader(dataset, batch_size=64, sampler=sampler):
        ...     with contributions.capture(ids) as capture:
        ...         capture.losses(batch).mean().backward()
        ...     client.submit(ids, **capture.fields())

    Args:
        client: a `PolicyClient`.
        num_examples: N: the ids are in [0, N).
        num_samples: ids in an epoch, over all processes; default: N.
        draw: ids in a request.
        seed: equal seeds draw equal ids from equal weights.
        timeout: longest wait for a request, seconds; then its ids are uniform.
        rank: place of this process, from 0; default: that in `torch.distributed`.
        world_size: how many processes there are; default: those in `torch.distributed`.

    Attributes:
        epoch: epochs begun.
    """

    def __init__(
        self,
        client: Sampling,
        num_examples: int,
        *,
        num_samples: int | None = None,
        draw: int = 1024,
        seed: int = 0,
        timeout: float = 1.0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        rank = rank_here() if rank is None else rank
        world_size = num_processes() if world_size is None else world_size
        num_samples = num_examples if num_samples is None else num_samples
        for field, value in (("num_examples", num_examples), ("num_samples", num_samples), ("draw", draw)):
            _check(field, value, value >= 1, "must be at least 1")
        _check("seed", seed, seed >= 0, "must not be negative")
        _check("timeout", timeout, timeout > 0, "must be positive")
        _check("rank", rank, 0 <= rank < world_size, f"must be in [0, world_size = {world_size})")
        self.epoch = 0
        self._length = -(-num_samples // world_size)
        self._draws = Draws(client, num_examples, size=draw, seed=(seed, rank), timeout=timeout)
        self._number = 0
        self._drawn: deque[int] = deque()
        self._given: deque[int] = deque(maxlen=READ_AHEAD)
        self._position = 0
        self._resumed = False

    def __len__(self) -> int:
        """Ids that this process gets in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[int]:
        """An epoch; after `load_state_dict` the rest of one."""
        if not self._resumed:
            self._position = 0
            self._given.clear()
            self.epoch += 1
        self._resumed = False
        while self._position < self._length:
            if not self._drawn:
                self._drawn.extend(self._draws.take(self._number).tolist())
                self._number += 1
            self._given.append(self._drawn.popleft())
            self._position += 1
            yield self._given[-1]

    @property
    def client(self) -> Sampling:
        """What draws."""
        return self._draws.client

    @client.setter
    def client(self, client: Sampling) -> None:
        self._draws.client = client

    @property
    def lost(self) -> bool:
        """Whether the newest draw was uniform because the server did not answer."""
        return self._draws.lost

    @property
    def fallbacks(self) -> int:
        """How many draws were uniform for that reason."""
        return self._draws.fallbacks

    def state_dict(self, *, trained: int | None = None) -> dict[str, Any]:
        """For a checkpoint of this process: integers, and tensors of the ids that were drawn and not used.

        Args:
            trained: ids of this epoch that have been trained on. Needed where a DataLoader with workers, or Accelerate,
                takes ids ahead of the step: what it took is given again. Default: all ids that were given.

        Raises:
            InvalidRequestError: `trained` is more than was given, or more than `READ_AHEAD` less.
        """
        ahead = 0 if trained is None else self._position - trained
        rule = f"must be from {self._position - len(self._given)} to {self._position}, the ids given in this epoch"
        _check("trained", trained, 0 <= ahead <= len(self._given), rule)
        coming = self._draws.coming
        again = list(self._given)[len(self._given) - ahead :]
        return {
            "epoch": self.epoch,
            "position": self._position - ahead,
            "draws": self._number,
            "drawn": torch.tensor([*again, *self._drawn], dtype=torch.int64),
            "coming": None if coming is None else torch.from_numpy(coming.astype(np.int64)),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, own: bool = True) -> None:
        """Goes on where the sampler stood that gave `state`: within its epoch, or with the next where that was over.

        Args:
            state: what `state_dict` gave.
            own: whether to this process: the ids that another one had drawn are not used again.
        """
        self.epoch, self._position, self._number = state["epoch"], state["position"], state["draws"]
        coming = state["coming"] if own else None
        self._drawn = deque(state["drawn"].tolist() if own else ())
        self._draws.coming = None if coming is None else coming.numpy().astype(np.uint64)
        self._given.clear()
        self._resumed = 0 < self._position < self._length


def _check(field: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise InvalidRequestError(field=field, value=value, rule=rule)
