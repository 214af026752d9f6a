"""Ids on their way from a dataset to the training step, past collators that know nothing of them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from equipoise.errors import InvalidRequestError
from equipoise.torch.processes import num_processes, rank


class Numbered:
    """A dataset whose examples carry their place in it as their id."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset = dataset
        self._column = column

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._dataset[index], self._column: int(index)}


class IdCollator:
    """Takes the ids out of the examples, has the rest collated, and puts the ids back: integers [B]."""

    def __init__(self, collator: Callable[[list[Any]], Any], column: str) -> None:
        self._collator = collator
        self._column = column

    def __call__(self, features: list[Any]) -> Any:
        """The batch."""
        if not all(isinstance(feature, Mapping) and self._column in feature for feature in features):
            return self._collator(features)
        ids = [int(feature[self._column]) for feature in features]
        batch = self._collator([_without(feature, self._column) for feature in features])
        batch[self._column] = torch.tensor(ids, dtype=torch.int64)
        return batch


def with_ids(dataset: Any, column: str) -> Any:
    """A dataset that has the column: itself, or numbered; one without length must have it."""
    if not hasattr(dataset, "__len__") or not len(dataset):
        return dataset
    columns = getattr(dataset, "column_names", None)
    return dataset if column in (dataset[0] if columns is None else columns) else Numbered(dataset, column)


def own_batches(field: str, dataset: Any, *, batch_size: int, collate: Callable[[list[Any]], Any]) -> Iterator[Any]:
    """This process's part of a dataset in batches; equally many in every process, as sharded models need.

    Raises:
        InvalidRequestError: the dataset has fewer examples than there are processes, or no length.
    """
    processes = num_processes()
    if not hasattr(dataset, "__len__") or len(dataset) < processes:
        value = f"{len(dataset)} examples" if hasattr(dataset, "__len__") else type(dataset).__name__
        rule = f"must be a dataset with a length, of at least one example for each of {processes} process(es)"
        raise InvalidRequestError(field=field, value=value, rule=rule)
    num_batches = -(-len(dataset) // (processes * batch_size))
    own = np.arange(rank(), len(dataset), processes)
    for part in np.array_split(own, min(num_batches, len(dataset) // processes)):
        yield collate([dataset[int(index)] for index in part])


def _without(feature: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {name: value for name, value in feature.items() if name != column}
