"""Ids on their way from a dataset to the training step, past collators that know nothing of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import IterableDataset

from equipoise.errors import InvalidRequestError, is_integer, require
from equipoise.keys import ExampleKeys
from equipoise.torch.batches import HostBatches
from equipoise.torch.processes import known, num_processes, rank

ID = "equipoise_id"
"""Column with the ids, integers, that rows of the training dataset have in addition."""

GROUP = "equipoise_group"
"""Where a training batch has the groups of its rows, integers."""

Ids: TypeAlias = Sequence[int]
"""The id of each example, by place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """A training dataset whose examples have ids.

    Attributes:
        dataset: the dataset; its rows have the column `ID`.
        keys: the names of its examples, if it names them.
        by_place: whether an id is the place of its example in the dataset.
    """

    dataset: Any
    keys: ExampleKeys | None = None
    by_place: bool = False


@dataclass(frozen=True, slots=True)
class NumberedRow:
    """An example that has no columns, such as a tuple, with its id."""

    example: Any
    number: int


class Numbered:
    """A dataset with ids beside its examples.

    Args:
        dataset: the dataset, with length.
        number: from the place of an example, and the example, to its id.
    """

    def __init__(self, dataset: Any, number: Callable[[int, Any], int]) -> None:
        self._dataset = dataset
        self._number = number

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int) -> Any:
        return _numbered(self._dataset[place], self._number, place)

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        """Several at once, which some datasets read much faster."""
        read = getattr(self._dataset, "__getitems__", None)
        rows = [self._dataset[place] for place in places] if read is None else read(places)
        return [_numbered(row, self._number, place) for row, place in zip(rows, places, strict=True)]


class NumberedStream(IterableDataset[Any]):
    """A stream with ids beside its examples, taken from a column of theirs."""

    def __init__(self, stream: Any, number: Callable[[int, Any], int]) -> None:
        self._stream = stream
        self._number = number

    def __iter__(self) -> Iterator[Any]:
        for place, row in enumerate(self._stream):
            yield _numbered(row, self._number, place)

    def __getattr__(self, name: str) -> Any:  # its length and `set_epoch`, if it has them
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._stream, name)


class SizedNumberedStream(NumberedStream):
    """One that says how long it is."""

    def __len__(self) -> int:
        return len(self._stream)


class Column:
    """Numbers an example by a column of its own.

    Args:
        name: the column.
        keys: the ids of names; None: the column holds ids.
    """

    def __init__(self, name: str, keys: ExampleKeys | None) -> None:
        self._name = name
        self._keys = keys

    def __call__(self, place: int, row: Any) -> int:
        """The id of an example."""
        if not isinstance(row, Mapping) or self._name not in row:
            rule = "must be a column of a training dataset without a length: nothing else tells its examples apart"
            raise InvalidRequestError(field=self._name, rule=rule)
        return int(_ids(self._name, [row[self._name]], self._keys, first=place)[0])


class Table:
    """Numbers an example by its place in a list of ids."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids

    def __call__(self, place: int, row: Any) -> int:
        """The id of an example."""
        return int(self._ids[place])


class IdCollator:
    """Takes the ids out of the examples, has the rest collated, and puts the ids back: integers [B]; groups too.

    Args:
        collator: what collates the examples, without their ids.
        column: where the batch has its ids; a column of that name is taken out of all examples.
        group: the column with groups, which the batch has as `GROUP`; None: there are none.
        keep_group: whether the collator is given that column, because the model takes it.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        column: str,
        *,
        group: str | None = None,
        keep_group: bool = False,
    ) -> None:
        self._collator = collator
        self._column = column
        self._group = group
        self._taken_out = {ID, column} | ({group} if group is not None and not keep_group else set())

    def __call__(self, features: list[Any]) -> Any:
        """The batch; without ids if the examples have none, as in evaluation."""
        ids = [_number_of(feature) for feature in features]
        batch = self._collator([self._plain(feature) for feature in features])
        if None in ids:
            return batch
        if not isinstance(batch, Mapping):
            rule = "must give a mapping, with room for the ids of its rows"
            raise InvalidRequestError(field="data_collator", value=type(batch).__name__, rule=rule)
        batch[self._column] = torch.tensor(ids, dtype=torch.int64)  # type: ignore[index]  # collators give dicts
        if self._group is not None:
            groups = [_group_of(feature, self._group) for feature in features]
            batch[GROUP] = torch.tensor(groups, dtype=torch.int64)  # type: ignore[index]
        return batch

    def _plain(self, feature: Any) -> Any:
        if isinstance(feature, NumberedRow):
            return feature.example
        if isinstance(feature, Mapping):
            return {name: value for name, value in feature.items() if name not in self._taken_out}
        return feature


def with_ids(
    dataset: Any, column: str, *, num_examples: int | None = None, keys: ExampleKeys | None = None
) -> TrainingData:
    """The dataset with ids: those of its column, the places of the names in it, or the places of the examples.

    Args:
        dataset: the training dataset.
        column: the column with ids, or with names; one without length must have it.
        num_examples: N of the policy; None: not known.
        keys: the names of the policy's examples; default: those in the column, where it can be read as a whole.

    Raises:
        InvalidRequestError: ids are none, do not fit into the policy, or there are none for a part of it.
    """
    if dataset is None:
        return TrainingData(dataset=None)
    if keys is not None:
        _check_size(num_examples, len(keys), "the number of names in `keys`")
    number = Column(column, keys)
    if not _is_indexed(dataset):
        if isinstance(dataset, known("datasets", "IterableDataset")):
            return TrainingData(dataset=dataset.map(_Adding(number), with_indices=True), keys=keys)
        kind = SizedNumberedStream if hasattr(dataset, "__len__") else NumberedStream
        return TrainingData(dataset=kind(dataset, number), keys=keys)
    if not len(dataset):
        return TrainingData(dataset=dataset)
    if not _has(dataset, column):
        _check_size(num_examples, len(dataset), f"the length of the dataset, which has no column {column!r} with ids")
        return TrainingData(dataset=_beside(dataset, range(len(dataset))), by_place=True)
    values = _values(dataset, column)
    if values is None:  # it is read, or made, one example at a time: each id is looked at when it comes
        return TrainingData(dataset=Numbered(dataset, number), keys=keys)
    if keys is None and isinstance(values[0], str):
        keys = ExampleKeys(values)
        _check_size(num_examples, len(keys), f"the number of different names in column {column!r}")
    ids = _ids(column, values, keys)
    if num_examples is not None:
        place = int(np.argmax(ids))
        largest, rule = int(ids[place]), f"ids must be below num_examples = {num_examples}"
        require(largest < num_examples, field=f"{column}[{place}]", value=largest, rule=rule)
    by_place = np.array_equal(ids, np.arange(len(ids)))
    return TrainingData(dataset=_beside(dataset, ids), keys=keys, by_place=by_place)


def own_batches(
    field: str,
    dataset: Any,
    *,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
    move: Callable[[Any], Any],
) -> HostBatches:
    """This process's part of a dataset in batches; equally many in every process, as sharded models need.

    Raises:
        InvalidRequestError: the dataset has fewer examples than there are processes, or no length.
    """
    processes = num_processes()
    indexed = _is_indexed(dataset) and not isinstance(dataset, Mapping)
    if not indexed or len(dataset) < processes:
        value = f"{len(dataset)} examples" if indexed else type(dataset).__name__
        rule = f"must be a dataset with a length, of at least one example for each of {processes} process(es)"
        raise InvalidRequestError(field=field, value=value, rule=rule)
    num_batches = -(-len(dataset) // (processes * batch_size))
    own = np.arange(rank(), len(dataset), processes)
    parts = np.array_split(own, min(num_batches, len(dataset) // processes))
    try:
        return HostBatches([collate([dataset[int(index)] for index in part]) for part in parts], move)
    except Exception as error:
        error.add_note(f"{field}: is collated as train_dataset is, and must hold examples of the same form")
        raise


class _Adding:
    """What `datasets` calls with each row of a stream: it adds the id."""

    def __init__(self, number: Column) -> None:
        self._number = number

    def __call__(self, row: Mapping[str, Any], place: int) -> dict[str, int]:
        return {ID: self._number(place, row)}


def _numbered(row: Any, number: Callable[[int, Any], int], place: int) -> Any:
    found = number(int(place), row)
    return {**row, ID: found} if isinstance(row, Mapping) else NumberedRow(row, found)


def _number_of(feature: Any) -> int | None:
    if isinstance(feature, NumberedRow):
        return feature.number
    return int(feature[ID]) if isinstance(feature, Mapping) and ID in feature else None


def _group_of(feature: Any, column: str) -> int:
    if not isinstance(feature, Mapping) or column not in feature:
        raise InvalidRequestError(field=column, rule="must be a column of train_dataset: PolicyTraining.group_column")
    group = feature[column]
    fits = is_integer(group, 0, 1 << 32) and getattr(group, "dtype", None) is not torch.bool
    require(fits, field=column, value=group, rule="must hold integers in [0, 2^32): PolicyTraining.group_column")
    return int(group)


def _is_indexed(dataset: Any) -> bool:
    """Whether examples have places: some streams have a length, too."""
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return indexed and not isinstance(dataset, IterableDataset)


def _has(dataset: Any, column: str) -> bool:
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        first = dataset[0]
        columns = first if isinstance(first, Mapping) else ()
    return column in columns


def _values(dataset: Any, column: str) -> Sequence[Any] | None:
    """All values of a column; None: only one example at a time can be had."""
    if isinstance(dataset, known("datasets", "Dataset")):
        values: list[Any] = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        return values
    if isinstance(dataset, list | tuple):
        return [row.get(column) if isinstance(row, Mapping) else None for row in dataset]
    return None


def _beside(dataset: Any, ids: Ids) -> Any:
    """The dataset with ids: in a column of its own where that neither copies everything nor is lost in a transform."""
    if isinstance(dataset, known("datasets", "Dataset")) and getattr(dataset, "_indices", None) is None:
        added = dataset.add_column(ID, np.asarray(ids, np.int64))
        if ID in added[0]:
            return added
    return Numbered(dataset, Table(ids))


def _ids(column: str, values: Sequence[Any], keys: ExampleKeys | None, *, first: int = 0) -> Any:
    """Ids from what a column holds: int64, one for each value, of which the first has the place `first`."""
    if keys is not None:
        try:
            return keys.ids(values)
        except InvalidRequestError as error:
            place = first + (error.index or 0)
            raise InvalidRequestError(field=column, index=place, value=error.value, rule=error.rule) from error
    for place, value in enumerate(values, first):
        rule = "must be an integer in [0, 2^63)"
        if isinstance(value, str):
            rule += ", or PolicyTraining.keys must hold the ids of names: `equipoise.ExampleKeys`"
        fits = is_integer(value, 0, 1 << 63) and getattr(value, "dtype", None) is not torch.bool
        require(fits, field=f"{column}[{place}]", value=value, rule=rule)
    return np.array([int(value) for value in values], np.int64)


def _check_size(num_examples: int | None, size: int, what: str) -> None:
    fits = num_examples in (None, size)
    require(fits, field="num_examples", value=num_examples, rule=f"must be {size}, {what}")
