"""Drawing examples by weight, where others weigh their losses."""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler, Sampler

from equipoise.errors import InvalidRequestError
from equipoise.torch.draws import Draws, Sampling
from equipoise.torch.processes import is_initialized, num_processes
from equipoise.torch.processes import rank as rank_here
from equipoise.torch.sharing import is_idle, sharer_of, skips_batches

READ_AHEAD = 1 << 16
"""Most ids that a DataLoader may have taken ahead of the training step, for `state_dict(trained=...)`."""


class WeightedSampler(Sampler[int]):
    """Draws ids with probability proportional to their served weights, with replacement.

    An example of weight 2 comes twice as often as one of weight 1: in the mean over many steps the gradient is that of
    the weighted loss. So **do not weigh the losses again**: average them as they are, and send statistics as ever.
    Sampling spends no time on examples of small weight, and makes gradients noisier than weighing does.

    Ids are drawn in requests of `draw`, one request ahead, so that the training loop does not wait for the network and
    no id is older than two requests. When the server is lost, or there is no policy yet, draws are uniform until it
    answers again.

    It gives a whole epoch, as PyTorch's `RandomSampler` does. That is right for one process, and where something else
    shares the epoch out: `accelerator.prepare`, with `split_batches` and `dispatch_batches`, too, and the `Trainer` of
    transformers. Where nothing does, in a plain loop with DistributedDataParallel and under Lightning,
    `DistributedWeightedSampler` gives each process its share. The wrong one of the two is refused as an epoch begins.

    Example:
        >>> sampler = WeightedSampler(client, len(dataset))
        >>> for ids, batch in DataLoader(dataset, batch_size=64, sampler=sampler):
        ...     with contributions.capture(ids) as capture:
        ...         capture.losses(batch).mean().backward()
        ...     client.submit(ids, **capture.fields())

    Args:
        client: a `PolicyClient`.
        num_examples: N: the ids are in [0, N), and the places of the examples in the dataset.
        num_samples: ids in an epoch, over all processes; default: N.
        draw: ids in a request, for each process that trains.
        seed: equal seeds draw equal ids from equal weights.
        timeout: longest wait for a request, seconds; then its ids are uniform.

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
    ) -> None:
        num_samples = num_examples if num_samples is None else num_samples
        for field, value in (("num_examples", num_examples), ("num_samples", num_samples), ("draw", draw)):
            _check(field, value, value >= 1, "must be at least 1")
        _check("seed", seed, seed >= 0, "must not be negative")
        _check("timeout", timeout, timeout > 0, "must be positive")
        self.epoch = 0
        self._num_samples = num_samples
        self._draw = draw
        self._draws = Draws(client, num_examples, seed=seed, timeout=timeout)
        self._draws.check()
        self._number = 0
        self._drawn: deque[int] = deque()
        self._given: deque[int] = deque(maxlen=READ_AHEAD)
        self._position = 0
        self._resumed = False

    def __len__(self) -> int:
        """Ids in an epoch."""
        return self._num_samples

    def __iter__(self) -> Iterator[int]:
        """An epoch; after `load_state_dict` the rest of one.

        Raises:
            InvalidRequestError: each process would get the whole epoch, or a share of its share; or what a resumed
                sampler has given before its checkpoint is skipped once more.
        """
        sharer = sharer_of(self)
        self._check_sharer(sharer)
        if is_idle(sharer):  # what is given here is thrown away
            return repeat(0, len(self))
        rule = "a resumed sampler goes on where it was: give the loader as it is"
        _check("skip_first_batches", "", not (self._resumed and skips_batches()), rule)
        return self._epoch()

    def _epoch(self) -> Iterator[int]:
        if not self._resumed:
            self._position = 0
            self._given.clear()
            self.epoch += 1
        self._resumed = False
        length = len(self)
        self._begin_draws()
        while self._position < length:
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
            trained: ids of this epoch that have been trained on: by all processes together, or of a
                `DistributedWeightedSampler` by this one. Needed where a DataLoader with workers, or Accelerate, takes
                ids ahead of the step: what it took is given again. Default: all ids that were given.

        Raises:
            InvalidRequestError: `trained` is more than was given, or more than `READ_AHEAD` less.
        """
        # Where another process reads for all, nothing was given here.
        ahead = 0 if trained is None or not self._given else self._position - trained
        rule = f"must be from {self._position - len(self._given)} to {self._position}, the ids given in this epoch"
        _check("trained", trained, 0 <= ahead <= len(self._given), rule)
        coming = self._draws.coming
        again = list(self._given)[len(self._given) - ahead :]
        return {
            "epoch": self.epoch,
            "position": self._position - ahead,
            "length": len(self),
            "draws": self._number,
            "drawn": torch.tensor([*again, *self._drawn], dtype=torch.int64),
            "coming": None if coming is None else torch.from_numpy(coming.astype(np.int64)),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, own: bool = True) -> None:
        """Goes on where the sampler stood that gave `state`: within its epoch, or with the next where that was over.

        Of an epoch that was shared out among another number of processes the same share is left.

        Args:
            state: what `state_dict` gave.
            own: whether to this process: the ids that another one had drawn are not used again.
        """
        self.epoch, self._number = state["epoch"], state["draws"]
        self._position = state["position"] * len(self) // state.get("length", len(self))
        coming = state["coming"] if own else None
        self._drawn = deque(state["drawn"].tolist() if own else ())
        self._draws.coming = None if coming is None else coming.numpy().astype(np.uint64)
        self._given.clear()
        self._resumed = 0 < self._position < len(self)

    def _begin_draws(self) -> None:
        # Of what is drawn here the other processes' part is not used: a draw lasts for as many steps as one of a share.
        self._draws.begin(rank=rank_here(), size=self._draw * num_processes())

    def _check_sharer(self, sharer: Any) -> None:
        instead = "use DistributedWeightedSampler"
        alone = f"each of {num_processes()} processes would draw all of an epoch: {instead}, or accelerator.prepare"
        _check("sampler", "WeightedSampler", sharer is not None or num_processes() == 1, alone)
        early = f"{type(sharer).__name__} would draw a whole epoch under the weights of its beginning: {instead}"
        _check("sampler", "WeightedSampler", not isinstance(sharer, DistributedSampler), early)


class DistributedWeightedSampler(WeightedSampler, DistributedSampler[int]):
    """A `WeightedSampler` that gives each process its share of an epoch, by independent draws.

    It is for plain loops with DistributedDataParallel, and for Lightning, which takes it for the `DistributedSampler`
    that it is and adds none of its own. Processes get equally many ids. In a job of one process it gives a whole epoch.

    Example:
        >>> loader = DataLoader(dataset, batch_size=64, sampler=DistributedWeightedSampler(client, len(dataset)))
        >>> lightning.Trainer(devices=8, strategy="ddp", callbacks=[policy]).fit(model, loader)

    Args:
        client: a `PolicyClient`.
        num_examples: N: the ids are in [0, N), and the places of the examples in the dataset.
        num_replicas: how many processes share an epoch; default: those in `torch.distributed` when it begins.
        rank: place of this process among them, from 0; default: that in `torch.distributed`.
        num_samples: ids in an epoch, over all processes; default: N.
        draw: ids in a request.
        seed: equal seeds draw equal ids from equal weights, in each process its own.
        timeout: longest wait for a request, seconds; then its ids are uniform.
    """

    def __init__(
        self,
        client: Sampling,
        num_examples: int,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        num_samples: int | None = None,
        draw: int = 1024,
        seed: int = 0,
        timeout: float = 1.0,
    ) -> None:
        both = (num_replicas is None) == (rank is None)
        _check("rank", rank, both, f"must be given together with num_replicas = {num_replicas}, or neither of them")
        self._place = None
        if num_replicas is not None and rank is not None:
            _check("rank", rank, 0 <= rank < num_replicas, f"must be in [0, num_replicas = {num_replicas})")
            self._place = rank, num_replicas
        super().__init__(client, num_examples, num_samples=num_samples, draw=draw, seed=seed, timeout=timeout)

    @property
    def rank(self) -> int:  # type: ignore[override]  # not known yet where a launcher makes the processes later
        """Place of this process among those that share an epoch, from 0."""
        return self._here()[0]

    @property
    def num_replicas(self) -> int:  # type: ignore[override]  # as above
        """How many processes share an epoch."""
        return self._here()[1]

    def __len__(self) -> int:
        """Ids that this process gets in an epoch."""
        return -(-self._num_samples // self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: draws differ from epoch to epoch by themselves."""

    def _here(self) -> tuple[int, int]:
        if self._place is not None:
            return self._place
        launched = os.environ.get("WORLD_SIZE", "1")
        rule = "call init_process_group before the sampler is used, or give it num_replicas and rank"
        _check("WORLD_SIZE", launched, launched == "1" or is_initialized(), rule)
        return rank_here(), num_processes()

    def _begin_draws(self) -> None:
        self._draws.begin(rank=self.rank, size=self._draw)

    def _check_sharer(self, sharer: Any) -> None:
        again = f"{type(sharer).__name__} would share out again what is a share already: use WeightedSampler"
        _check("sampler", "DistributedWeightedSampler", sharer is None or self.num_replicas == 1, again)


def _check(field: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise InvalidRequestError(field=field, value=value, rule=rule)
