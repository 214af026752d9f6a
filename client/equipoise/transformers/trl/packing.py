"""Ids that survive TRL's preparation of datasets: tokenising, dropping, packing."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import InvalidRequestError
from equipoise.transformers.data import ID

LENGTHS = "equipoise_lengths"
"""Key of a batch: how many tokens each example has in a row of several: integers [B]."""


def packed(prepare: Callable[..., Any], dataset: Any, given: tuple[Any, ...]) -> Any:
    """A packed dataset with the ids of the examples in each row, in order, as a list in the column `ID`.

    Args:
        prepare: the `_prepare_dataset` of TRL's `SFTTrainer`.
        dataset: the dataset, with ids.
        given: the other arguments of that method: tokenizer, arguments, whether to pack, formatting, name.

    Raises:
        InvalidRequestError: the strategy makes rows in which examples see each other.
    """
    from trl import pack_dataset

    tokenizer, args, _, formatting, name = given
    if args.packing_strategy == "wrapped":
        raise InvalidRequestError(
            field="packing_strategy",
            value="wrapped",
            rule="lets examples of a row see each other, so that no loss is one example's own: use "
            "packing_strategy='bfd_split', which keeps all tokens, too",
        )
    whole = copy.copy(args)  # packing cuts what is too long, as its strategy says
    whole.max_length, whole.shuffle_dataset = None, False
    options = {} if not hasattr(dataset, "__len__") else {"num_proc": args.dataset_num_proc}
    dataset = prepare(dataset, tokenizer, whole, False, formatting, name)
    dataset = dataset.map(_for_each_token, **options)
    dataset = dataset.select_columns(["input_ids", "labels", ID])
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, options)
    dataset = dataset.map(_for_each_segment, **options)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


class SegmentCollator:
    """Takes the ids out of the examples, has the rest collated, and puts the ids back: integers [B].

    Batches in one row also get the lengths of their examples, under `LENGTHS`.

    Args:
        collator: TRL's own.
        column: where the batch has its ids: one for each example, of a packed row too.
        flat: whether the collator makes one row of all examples.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], column: str, *, flat: bool) -> None:
        self._collator = collator
        self._column = column
        self._flat = flat

    def __call__(self, features: list[Any]) -> Any:
        """The batch."""
        own = (ID, self._column)
        without = [{name: value for name, value in feature.items() if name not in own} for feature in features]
        batch = self._collator(without)
        lengths = [feature.get("seq_lengths", [len(feature["input_ids"])]) for feature in without] if self._flat else []
        if self._flat:
            batch[LENGTHS] = torch.tensor([length for row in lengths for length in row])
        if all(ID in feature for feature in features):
            ids = [_listed(feature[ID]) for feature in features]
            if self._flat and [len(row) for row in ids] != [len(row) for row in lengths]:
                rule = "packed already, its rows have one id for several examples: give it unpacked, with packing=True"
                raise InvalidRequestError(field="train_dataset", rule=rule)
            batch[self._column] = torch.tensor([number for row in ids for number in row], dtype=torch.int64)
        return batch


def owners_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The example of each token of a batch in one row, integers [1, T]; None: a row is an example or a part of one."""
    if LENGTHS not in batch:
        return None
    lengths, width = batch[LENGTHS], batch["input_ids"].shape[1]
    owners = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return torch.nn.functional.pad(owners, (0, width - len(owners)), value=len(lengths) - 1)[None]


def _for_each_token(example: dict[str, Any]) -> dict[str, Any]:
    return {ID: [int(example[ID])] * len(example["input_ids"])}


def _for_each_segment(example: dict[str, Any]) -> dict[str, Any]:
    starts = [0]
    for length in example["seq_lengths"][:-1]:
        starts.append(starts[-1] + length)
    return {ID: [example[ID][start] for start in starts]}


def _listed(ids: Any) -> list[int]:
    return [int(number) for number in ids] if isinstance(ids, list | tuple | Tensor) else [int(ids)]
