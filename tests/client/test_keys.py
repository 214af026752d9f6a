"""Names of examples have ids that depend on the names alone, and can be found again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import ExampleKeys
from equipoise.errors import InvalidRequestError

texts = st.text(st.characters(codec="utf-8"), max_size=8)


@settings(deadline=None)
@given(st.lists(texts, min_size=1), st.randoms())
def test_ids_are_places_among_the_sorted_names(names: list[str], random: Any) -> None:
    keys = ExampleKeys(names)
    expected = sorted(set(names))
    assert (len(keys), list(keys)) == (len(expected), expected)
    assert keys.ids(names).tolist() == [expected.index(name) for name in names]
    assert [keys[i] for i in keys.ids(names)] == names
    random.shuffle(names)
    assert ExampleKeys(names).fingerprint == keys.fingerprint


@settings(deadline=None)
@given(st.sets(texts, min_size=1), st.sets(texts, min_size=1))
def test_fingerprints_tell_names_apart(one: set[str], other: set[str]) -> None:
    assert (ExampleKeys(one).fingerprint == ExampleKeys(other).fingerprint) == (one == other)


def test_a_table_is_written_and_read(tmp_path: Path) -> None:
    keys = ExampleKeys(['a "quoted", name', "two\nlines", "two\r\nlines", "größe", "", " ", "7"])
    keys.save(tmp_path / "keys.csv")
    loaded = ExampleKeys.load(tmp_path / "keys.csv")
    assert (list(loaded), loaded.fingerprint) == (list(keys), keys.fingerprint)


@pytest.mark.parametrize(
    "text", ["", "id,key\n", "id,name\n0,a\n", "id,key\n1,a\n0,b\n", "id,key\n0,b\n1,a\n", "id,key\n\n", "x"]
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.csv").write_text(text)
    with pytest.raises(InvalidRequestError):
        ExampleKeys.load(tmp_path / "keys.csv")


def test_numbers_are_names_too() -> None:
    keys = ExampleKeys([10**30, np.int64(7), "7"])
    assert list(keys) == ["1" + 30 * "0", "7"]
    assert keys.ids([7, np.uint8(7), "7"]).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("names", "message"), [
    (["a", None], r"names\[1\] = None: must be a string or an integer"),
    ([True], r"names\[0\] = True: must be a string or an integer"),
    ([1.0], r"names\[0\] = 1.0: must be a string or an integer"),
    ([b"a"], r"names\[0\] = b'a': must be a string or an integer"),
    ([], r"names = \[\]: must be at least one"),
    ("abc", "names = 'abc': must be a collection of names, not one"),
])  # fmt: skip
def test_what_is_no_name_is_refused(names: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ExampleKeys(names)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"names\[1\] = 'c': is none of the 2 names of the table"):
        ExampleKeys(["a", "b", "b"]).ids(["a", "c"])
    with pytest.raises(InvalidRequestError, match="must be a collection of names"):
        ExampleKeys(["a", "b"]).ids("ab")
