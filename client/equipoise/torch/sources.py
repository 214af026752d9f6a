"""Sources of a mixture, read by place: what the workers of a DataLoader have of it."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from torch.utils.data._utils import worker

from equipoise.errors import InvalidRequestError, require


class MixedDataset(Dataset[Any]):
    """All sources of a mixture as one dataset, whose places a `Mixture` draws; it knows nothing of the policy.

    A row has the id of its source: a mapping in a column more, anything else as a pair (id, row).

    Args:
        sources: the data of each source by name, in order of their ids; None: there are none yet.
        id_column: the column.
    """

    def __init__(self, sources: Mapping[str, Any], *, id_column: str) -> None:
        self.length = 0
        """Draws in an epoch."""
        self._names = list(sources)
        self.id_column = id_column
        """Where rows that are mappings have the id of their source."""
        self._sources: list[Any] = [None] * len(sources)
        for name, source in sources.items():
            if source is not None:
                self.fill(name, source)

    def fill(self, name: str, source: Any) -> None:
        """Gives the data of a source that has none.

        Raises:
            InvalidRequestError: they are none, or can be read once only.
        """
        field = f"sources[{name!r}]"
        given = type(source).__name__
        once = "can be read once only: give what can be iterated again, as a torch IterableDataset around it"
        require(not isinstance(source, Iterator), field=field, value=given, rule=once)
        require(not isinstance(source, Mapping), field=field, value=given, rule="must be one dataset, and no mapping")
        if has_places(source):
            require(len(source) > 0, field=field, value="0 examples", rule="a source must not be empty")
            self._sources[self._names.index(name)] = source
        else:
            rule = "must have places (`__getitem__` and `__len__`) or be iterable"
            require(isinstance(source, Iterable), field=field, value=given, rule=rule)
            self._sources[self._names.index(name)] = Reader(name, source)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> Any:
        """The row that stands for a draw: `place_of(source, place in it)`."""
        index, number = divmod(int(place), len(self._sources))
        source = self._sources[number]
        if source is None:
            rule = "was added after these workers began, which persistent_workers=True lets live on: leave that out"
            raise InvalidRequestError(field=f"sources[{self._names[number]!r}]", rule=rule)
        row = source[index]
        if not isinstance(row, Mapping):
            return number, row
        if self.id_column in row:
            rule = "is where the id of a row's source goes, and its rows have it: give another id_column"
            raise InvalidRequestError(field=f"sources[{self._names[number]!r}]", value=self.id_column, rule=rule)
        return {**row, self.id_column: number}

    def place_of(self, number: int, index: Any) -> Any:
        """The place here of what stands at `index`, an integer or an array of them, of source `number`."""
        return index * len(self._sources) + number

    def has(self, number: int) -> bool:
        """Whether a source has its data."""
        return self._sources[number] is not None

    def is_stream(self, number: int) -> bool:
        """Whether a source has an order, and no places."""
        return isinstance(self._sources[number], Reader)

    def know_length(self, number: int, length: int) -> None:
        """A stream was found to have so many rows by a job before."""
        source = self._sources[number]
        if isinstance(source, Reader):
            source.length = length

    def length_of(self, number: int, *, within: int = 0) -> int | None:
        """How many rows a source has.

        Args:
            number: the source.
            within: a stream is read so far to find out, if that is not known.

        Returns:
            None: not known, and `within` or more.
        """
        source = self._sources[number]
        if source is None:
            return None
        return source.length_within(within) if isinstance(source, Reader) else len(source)


class Reader:
    """A stream read by place, over and over: place n is the row that comes after n others.

    Each process reads the stream itself, from its beginning, and takes from it what it is asked for. To the stream that
    looks as if nobody else read it: it must not share itself out among workers, as torch streams and those of
    `datasets` do in a worker.

    Args:
        name: the name of the source.
        stream: gives the same rows, in the same order, whenever it is iterated.

    Attributes:
        length: how many rows there are; None: not known yet.
    """

    def __init__(self, name: str, stream: Iterable[Any]) -> None:
        self._name = name
        self._stream = stream
        self.length: int | None = len(stream) if isinstance(stream, Sized) else None
        self._begin()
        self._check()

    def __getitem__(self, place: int) -> Any:
        if self._process != os.getpid():
            self._begin()  # forked processes share files, and the place in them
        while True:
            if self.length is not None:
                place %= self.length
            if place == self._next - 1:
                return self._row
            if place < self._next:
                self._begin()
            while self._next <= place and self._advance():
                pass

    def length_within(self, places: int) -> int | None:
        """How many rows there are; None: not known, and so many or more."""
        while self.length is None and self._next < places:
            self._advance()
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name, "_stream": self._stream, "length": self.length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._rows: Iterator[Any] | None = None
        self._next = 0
        self._row: Any = None

    def _advance(self) -> bool:
        """Reads a row; False: the stream is over, and its length known."""
        with _alone():
            if self._rows is None:
                self._rows = iter(self._stream)
            try:
                self._row = next(self._rows)
            except StopIteration:
                self.length = self._next
                self._check()
                return False
        self._next += 1
        return True

    def _check(self) -> None:
        if self.length == 0:
            rule = "a source must not be empty"
            raise InvalidRequestError(field=f"sources[{self._name!r}]", value="0 examples", rule=rule)


def has_places(source: Any) -> bool:
    """Whether the rows of a source have places: some streams have a length, too."""
    return hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, IterableDataset)


@contextmanager
def _alone() -> Iterator[None]:
    """Streams ask torch in which worker they are."""
    kept = worker._worker_info
    worker._worker_info = None
    try:
        yield
    finally:
        worker._worker_info = kept
