"""Ids for examples that have none: the same in every process, on every machine, in every version."""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import InvalidRequestError, is_integer, require

Key: TypeAlias = str | bytes | int | np.integer[Any]
"""What names an example: its text, its bytes, or a number."""


def hash_ids(keys: Iterable[Key], num_examples: int) -> NDArray[np.uint64]:
    """Returns an id in [0, num_examples) for each key, for examples that have no ids of their own.

    The id is the 8-byte BLAKE2b hash of the key, read as a little-endian integer, modulo `num_examples`. A string is
    hashed as UTF-8, an integer as the string of its decimal digits. Keys may collide, and then share a weight: among K
    keys, about K²/(2N) pairs do. Where all keys are known beforehand, `ExampleKeys` gives each an id of its own.

    Args:
        keys: strings, bytes or integers.
        num_examples: N, in [1, 2^63].

    Returns:
        uint64, one id per key.

    Raises:
        InvalidRequestError: `num_examples` is out of range, or a key is of another type.
    """
    fits = is_integer(num_examples, 1, (1 << 63) + 1)
    require(fits, field="num_examples", value=num_examples, rule="must be an integer in [1, 2^63]")
    if isinstance(keys, str | bytes):
        raise InvalidRequestError(field="keys", value=repr(keys), rule="must be a collection of keys, not one key")
    hashes = [int.from_bytes(blake2b(_bytes(i, key), digest_size=8).digest(), "little") for i, key in enumerate(keys)]
    return np.array(hashes, np.uint64) % np.uint64(num_examples)


def _bytes(index: int, key: Key) -> bytes:
    if isinstance(key, bytes):
        return key
    if isinstance(key, str):
        return key.encode()
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return str(int(key)).encode()
    raise InvalidRequestError(field="keys", index=index, value=repr(key), rule="must be a string, bytes or an integer")
