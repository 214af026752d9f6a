"""Sources, and a server's answers, for tests of mixtures; everything here can be pickled."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from equipoise.results import Outcome, Source, StepResult

NAMES = ["books", "code", "web"]


class Places:
    """A map-style dataset of pairs (name, place)."""

    def __init__(self, name: str, length: int) -> None:
        self.name = name
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return f"{self.name} {index}"


class Stream:
    """An iterable that does not know its length."""

    def __init__(self, name: str, length: int) -> None:
        self.name = name
        self.length = length

    def __iter__(self) -> Iterator[str]:
        return (f"{self.name} {index}" for index in range(self.length))


class SharedStream(Stream, IterableDataset[str]):
    """A stream that shares itself out among workers, as those of torch should."""

    def __iter__(self) -> Iterator[str]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (f"{self.name} {index}" for index in range(first, self.length, step))


class Policy:
    """Tells weights that change with every answer, as a server does; or does not answer."""

    def __init__(self, *weights: float, moves: bool = False) -> None:
        self.weights = np.array(weights, dtype=np.float32)
        self.moves = moves
        self.version = 0
        self.lost = False
        self.reads = 0

    @property
    def num_examples(self) -> int:
        return len(self.weights)

    def read(self, ids: Any = None) -> StepResult:
        self.reads += 1
        if not self.lost:
            self.version += 1
        if self.moves:
            self.weights = np.random.default_rng(self.version).uniform(0.1, 3, len(self.weights)).astype(np.float32)
        return StepResult(
            weights=np.ones(len(self.weights), np.float32) if self.lost else self.weights[np.asarray(ids)],
            source=Source.STALE if self.lost else Source.SERVED,
            outcome=Outcome.DROPPED if self.lost else Outcome.READ,
            version=self.version,
            epoch=1,
            durable_sequence=0,
            staleness=0,
        )


def places(*lengths: int) -> dict[str, Any]:
    """Sources with places."""
    return {name: Places(name, length) for name, length in zip(NAMES, lengths, strict=False)}
