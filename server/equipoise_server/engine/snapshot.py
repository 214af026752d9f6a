"""A policy at one version, read page by page while steps go on: for forks, exports, samples and republications."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.engine import tables
from equipoise_server.engine.device import DeviceQueue
from equipoise_server.engine.header import Header
from equipoise_server.errors import unloaded
from equipoise_server.rules import PAGE_EXAMPLES, Rule, Slices, TableState
from equipoise_server.store import Page

READ_BYTES = 2 << 20
"""Bytes of pages that are read in one call on the device."""


class Snapshot:
    """A policy as it was at one version. A page that a step is about to change is copied first, and no other.

    Made by `Policy.snapshot`, read on the device's thread, and closed by `Policy.close_snapshot`: until then it may
    come to hold a copy of every page that has not been released.

    Attributes:
        header: what belongs to no page.
        num_pages: P.
        page_bytes: of a page, about.
    """

    def __init__(self, name: str, rule: Rule, state: TableState, header: Header) -> None:
        self.header = header
        self._name = name
        self._dropped = False
        self.num_pages = state.num_pages
        self.page_bytes = max(1, state.nbytes // max(state.num_pages, 1))
        self._rule = rule
        self._state = replace(state)  # the sums of now; the tables are the ones in use
        self._copies: dict[int, Mapping[str, torch.Tensor]] = {}
        self._settled = np.zeros(state.num_pages, dtype=np.bool_)  # copied, or not needed any more
        self._means: NDArray[np.float32] | None = None

    def lacks(self, pages: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        """Which of these pages, [any number], it would have to copy before they change; sorted, distinct."""
        touched = np.zeros(self.num_pages, dtype=np.bool_)
        if self.num_pages:  # else the rule keeps nothing
            touched[pages] = True
        return np.flatnonzero(touched & ~self._settled)

    def keep(self, index: int, columns: Mapping[str, torch.Tensor]) -> None:
        """Takes a copy of a page that it lacks."""
        self._copies[index] = columns
        self._settled[index] = True

    def release(self, index: int) -> None:
        """Lets go of a page: it will not be read again."""
        self._copies.pop(index, None)
        self._settled[index] = True

    def columns(self, index: int) -> Mapping[str, torch.Tensor]:
        """A page's tables: the copy, or those in use, which nobody changes before the call on the device ends.

        Raises ServiceError (UNLOADED) when the policy has left memory.
        """
        if self._dropped:
            raise unloaded(self._name)
        return self._copies.get(index) or tables.page_columns(self._state, index)

    def drop(self) -> None:
        """The policy leaves memory, and this with it."""
        self._copies.clear()
        self._dropped = True

    def page(self, index: int, *, version: int) -> Page:
        """A page as the store takes it, said to be of a version."""
        return Page(version=version, columns={n: tables.to_bytes(c) for n, c in self.columns(index).items()})

    def prepare_weights(self) -> Slices[None]:
        """What must be done once before `weights`: the mean over the rows of a trajectory."""
        if not self._rule.trajectory_rows:
            return
        total = np.zeros(self._state.num_examples)
        for index in range(self.num_pages):
            view = replace(self._state, columns=dict(self.columns(index)))
            total += self._rule.weights(view, None).astype(np.float64) * view.num_rows
            yield
        self._means = (total / self._state.num_rows).astype(np.float32)

    def weights(self, start: int) -> NDArray[np.float32]:
        """Served weights of the examples from `start` on, a multiple of PAGE_EXAMPLES: float32, at most so many."""
        stop = min(start + PAGE_EXAMPLES, self._state.num_examples)
        if self._means is not None:
            return self._means[start:stop]
        if not self.num_pages:  # a rule that keeps nothing serves 1 to all
            return np.ones(stop - start, np.float32)
        view = replace(self._state, columns=dict(self.columns(start // PAGE_EXAMPLES)))
        return self._rule.weights(view, np.arange(stop - start))


async def read_pages(
    snapshot: Snapshot, device: DeviceQueue, *, version: int
) -> AsyncGenerator[tuple[int, Page], None]:
    """All pages, each once and for good, said to be of a version."""
    step = max(1, READ_BYTES // snapshot.page_bytes)

    def take(indices: range) -> list[Page]:
        pages = [snapshot.page(index, version=version) for index in indices]
        for index in indices:
            snapshot.release(index)
        return pages

    for start in range(0, snapshot.num_pages, step):
        indices = range(start, min(start + step, snapshot.num_pages))
        for index, page in zip(indices, await device.run(partial(take, indices)), strict=True):
            yield index, page
