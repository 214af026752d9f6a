"""Ids by hash are the same everywhere, for ever."""

import numpy as np
import pytest

from equipoise import hash_ids
from equipoise.errors import InvalidRequestError


def test_ids_never_change() -> None:
    # BLAKE2b-64 of each key, little-endian, computed with coreutils: printf 'doc-1' | b2sum -l 64
    assert hash_ids(["doc-1", "größe", ""], 2**63).tolist() == [
        int.from_bytes(bytes.fromhex(digest), "little") % 2**63
        for digest in ("56f47a285f34f541", "f4f8e155c9329ae9", "e4a6a0577479b2b4")
    ]


def test_strings_bytes_and_integers_of_one_text_agree() -> None:
    ids = hash_ids(["17", b"17", 17, np.int64(17)], 1000)
    assert len(set(ids.tolist())) == 1
    assert ids.dtype == np.uint64


def test_ids_are_spread_evenly() -> None:
    counts = np.bincount(hash_ids(range(100_000), 10).astype(np.int64), minlength=10)
    assert np.abs(counts - 10_000).max() < 500  # 5 standard deviations


@pytest.mark.parametrize(("keys", "index"), [([1, 2.5], 1), ([None], 0), ([True], 0)])
def test_other_keys_are_refused(keys: list[object], index: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        hash_ids(keys, 10)  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.index) == ("keys", index)


def test_one_string_is_not_a_collection_of_keys() -> None:
    with pytest.raises(InvalidRequestError, match="not one key"):
        hash_ids("doc-1", 10)
