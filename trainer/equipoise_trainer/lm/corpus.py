"""Paragraphs to learn from: Python's own documentation topics, a text file, or a Hugging Face data set on disk."""

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")
"""One of them lies in every directory that `datasets` wrote with `save_to_disk`."""
TEXT_COLUMN = "text"


def paragraphs(path: Path | None = None) -> list[str]:
    """The distinct paragraphs of a corpus, in order, white space collapsed.

    Repeated ones are kept once: a paragraph must not be both trained on and tested with.

    Args:
        path: a text file whose paragraphs are separated by blank lines; or a directory that `datasets` wrote with
            `save_to_disk`, with a column `text`. None: the text of `pydoc_data.topics`, present on every machine.

    Raises:
        ValueError: there is no such corpus, or nothing in it.
    """
    collapsed = (" ".join(piece.split()) for text in _texts(path) for piece in re.split(r"\n\s*\n", text))
    found = list(dict.fromkeys(piece for piece in collapsed if piece))
    if not found:
        raise ValueError(f"corpus: {path} holds no text")
    return found


def _texts(path: Path | None) -> Iterator[str]:
    if path is None:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    elif path.is_dir():
        yield from _rows(path)
    elif path.is_file():
        yield path.read_text(encoding="utf-8", errors="replace")
    else:
        raise ValueError(f"corpus: {path}, must be a text file or a directory")


def _rows(path: Path) -> Iterator[str]:
    if not any((path / name).is_file() for name in DATASET_FILES):
        raise ValueError(f"corpus: {path} is no data set on disk: it has none of {', '.join(DATASET_FILES)}")
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError(f"corpus: {path} is a Hugging Face data set, which needs: pip install datasets") from error
    loaded: Any = datasets.load_from_disk(str(path))
    parts: Iterable[Any] = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
    for part in parts:
        if TEXT_COLUMN not in part.column_names:
            raise ValueError(f"corpus: {path} has columns {part.column_names}, must have {TEXT_COLUMN!r}")
        yield from (str(text) for text in part[TEXT_COLUMN])
