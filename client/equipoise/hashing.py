"""Ids for examples that have none: the same in every process, on every machine, in every version."""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import InvalidRequestError

Key: TypeAlias = str | bytes | int | np.integer[Any]
"""What names an example: its text, its bytes, or a number."""


def hash_ids(keys: Iterable[Key], num_examples: int) -> NDArray[np.uint64]:
    """Ids in [0, num_examples) for keys: uint64, one per key.

    The id is the BLAKE2b hash of 8 bytes of the key, read little-endian, modulo `num_examples`. A string is hashed as
    UTF-8 and equals its bytes; an integer is hashed as its decimal digits and equals that string. Keys that collide
    share a weight: expected are about K²/(2N) collisions among K keys.

    Raises:
        InvalidRequestError: `num_examples` is below 1, or a key is none.
    """
    if num_examples < 1:
        raise InvalidRequestError(field="num_examples", value=num_examples, rule="must be at least 1")
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
