import importlib.util
from pathlib import Path

import pytest

from equipoise_trainer.lm.corpus import paragraphs


def test_the_default_is_pythons_documentation_each_paragraph_once() -> None:
    found = paragraphs()
    assert len(found) > 1000
    assert len(set(found)) == len(found)
    assert any('"lambda"' in paragraph for paragraph in found)


def test_paragraphs_of_a_file_are_parted_by_blank_lines_and_their_white_space_collapsed(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("one\n  two\n \n\nthree\n\none two\n\n\n", encoding="utf-8")
    assert paragraphs(file) == ["one two", "three"]


def test_what_is_no_corpus_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text(" \n\n")
    for path, message in (
        (tmp_path / "none", "none, must be a text file or a directory"),
        (empty, "empty holds no text"),
        (tmp_path, "is no data set on disk"),
    ):
        with pytest.raises(ValueError, match=message):
            paragraphs(path)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed here")
def test_a_data_set_on_disk_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="pip install datasets"):
        paragraphs(tmp_path)


def test_a_data_set_on_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package is optional")
    rows = {"text": ["first\n\nsecond", "third"]}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(str(tmp_path / "both"))
    assert paragraphs(tmp_path / "both") == ["first", "second", "third"]
    datasets.Dataset.from_dict({"other": ["x"]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="must have 'text'"):
        paragraphs(tmp_path / "other")
