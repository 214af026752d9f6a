"""The trainer's own copy of the rows that a policy epoch started from.

While an epoch's moves arrive, the holder's rows change under it. A trainer that is killed then needs the rows that the
epoch started from to run the same steps again, so it keeps them, if need be in a file that outlives it.
"""

import json
import os
from pathlib import Path

import numpy as np

from equipoise_trainer.offline.rows import RowHolder, Weights

RANGE_BYTES = 8 << 20
"""Rows that are fetched together."""


class RowsLostError(RuntimeError):
    """An epoch cannot go on where it stopped: the rows that it started from are not known any more."""


class RowCopy:
    """See the module.

    Args:
        directory: where the copy outlives the process; None: nowhere.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._label: dict[str, str | int] = {}
        self._rows: Weights | None = None

    def take(self, holder: RowHolder) -> tuple[Weights, int]:
        """The rows that the current epoch started from, [T, N], and how many of its moves have been applied.

        Raises:
            RowsLostError: some were applied, and the rows before them are not here.
        """
        epoch, done = divmod(holder.moves(), holder.settings.rows)
        label: dict[str, str | int] = {"policy": holder.identity, "epoch": epoch}
        if self._stored_label() != label:
            if done:
                raise RowsLostError(
                    f"rows: policy epoch {epoch} of {holder.identity} has had {done} of {holder.settings.rows} moves, "
                    f"and the rows that it started from are not in {self._directory or 'memory'}; start a new policy"
                )
            self._fetch(holder, label)
        if self._rows is None:
            assert self._directory is not None, "a label in memory comes with rows"
            self._rows = np.load(self._directory / "rows.npy", mmap_mode="r")
        return self._rows, done

    def _stored_label(self) -> dict[str, str | int]:
        if self._directory is not None and not self._label and (self._directory / "rows.json").exists():
            self._label = json.loads((self._directory / "rows.json").read_text(encoding="utf-8"))
        return self._label

    def _fetch(self, holder: RowHolder, label: dict[str, str | int]) -> None:
        settings = holder.settings
        shape = (settings.rows, settings.num_examples)
        self._label, self._rows = {}, None
        if self._directory is None:
            rows: Weights = np.empty(shape, dtype=np.float32)
        else:
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / "rows.json").unlink(missing_ok=True)
            rows = np.lib.format.open_memmap(self._directory / "rows.npy", mode="w+", dtype=np.float32, shape=shape)
        count = max(1, RANGE_BYTES // (4 * settings.num_examples))
        for first in range(0, settings.rows, count):
            rows[first : first + count] = holder.fetch(first, min(count, settings.rows - first))
        if self._directory is not None:
            # The label goes last: rows that are labelled are complete.
            rows.flush()  # type: ignore[attr-defined]  # a memmap
            scratch = self._directory / "rows.json.new"
            scratch.write_text(json.dumps(label), encoding="utf-8")
            os.replace(scratch, self._directory / "rows.json")
        self._label, self._rows = label, rows
