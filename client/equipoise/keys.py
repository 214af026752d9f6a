"""Ids for examples that have names: the place of a name among all names, and back."""

import csv
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import InvalidRequestError, require

Name: TypeAlias = str | int | np.integer[Any]
"""A name; a number is the string of its decimal digits."""

_COLUMNS = ["id", "key"]


class ExampleKeys:
    """The names of a policy's examples, each with an id in [0, num_examples): its place among all names, sorted.

    Ids do not depend on the order of the examples, and other than `hash_ids` they never collide; a name that comes
    twice is one example with one weight. They do depend on which names there are: keep the table with the policy, by
    `save`, and load it where the policy is used again. It takes about 150 bytes for a name.

    Example:
        >>> keys = ExampleKeys(dataset["name"])
        >>> client = PolicyClient("localhost:50051", policy="run-7", num_examples=len(keys))
        >>> client.submit(keys.ids(batch["name"]), contributions=contributions)
        >>> keys.save("keys.csv")  # for `equipoise policy weights run-7 --keys keys.csv`

    Args:
        names: the names, in any order.

    Raises:
        InvalidRequestError: a name is neither a string nor an integer, or there is none.
    """

    def __init__(self, names: Iterable[Name]) -> None:
        _check_collection(names)
        self._names = sorted({_text(index, name) for index, name in enumerate(names)})
        self._ids = {name: place for place, name in enumerate(self._names)}
        require(bool(self._names), field="names", value=[], rule="must be at least one")

    def __len__(self) -> int:
        """How many different names there are: `num_examples` of the policy."""
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        """The names in the order of their ids."""
        return iter(self._names)

    def __getitem__(self, example_id: int) -> str:
        """The name of an id."""
        return self._names[example_id]

    def ids(self, names: Iterable[Name]) -> NDArray[np.int64]:
        """The ids of names: int64, one for each.

        Raises:
            InvalidRequestError: a name is not in the table.
        """
        _check_collection(names)
        return np.array([self._id(index, name) for index, name in enumerate(names)], np.int64)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that are equal for equal names, and different for others."""
        digest = blake2b(digest_size=8)
        for name in self._names:
            data = name.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the table: CSV in UTF-8 with the columns `id` and `key`."""
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(_COLUMNS)
            table.writerows(enumerate(self._names))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            InvalidRequestError: it is no such table.
        """
        with Path(path).open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        names = [line[-1] for line in lines[1:] if line]
        whole = lines == [_COLUMNS, *([str(place), name] for place, name in enumerate(sorted(set(names))))]
        require(whole, field="path", value=str(path), rule="must be a table of names that ExampleKeys.save wrote")
        return cls(names)

    def _id(self, index: int, name: Name) -> int:
        text = _text(index, name)
        if text not in self._ids:
            rule = f"is none of the {len(self)} names of the table"
            raise InvalidRequestError(field="names", index=index, value=repr(name), rule=rule)
        return self._ids[text]


def _check_collection(names: Iterable[Name]) -> None:
    fits = not isinstance(names, str)
    require(fits, field="names", value=names, rule="must be a collection of names, not one name")


def _text(index: int, name: Name) -> str:
    if isinstance(name, str):
        return name
    if isinstance(name, int | np.integer) and not isinstance(name, bool):
        return str(int(name))
    raise InvalidRequestError(field="names", index=index, value=repr(name), rule="must be a string or an integer")
