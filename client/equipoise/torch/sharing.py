"""Who takes the ids of a sampler: whatever shares an epoch out among processes is among the calls that ask for them.

Accelerate, Lightning and others wrap a loader in ways that its sampler never hears of. Only the calls under way tell.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DistributedSampler

from equipoise.torch.processes import known


def sharer_of(sampler: Any) -> Any:
    """What shares out the ids that `sampler` is being asked for: the object; None: nothing does.

    That is a `DistributedSampler` around it, or what `accelerator.prepare` made of its loader.
    """
    sharers = (DistributedSampler, *_of_accelerate("BatchSamplerShard", "DataLoaderDispatcher"))
    return next((asker for asker in _askers() if issubclass(type(asker), sharers) and asker is not sampler), None)


def is_idle(sharer: Any) -> bool:
    """Whether the first process reads for all, and this is another one."""
    return issubclass(type(sharer), _of_accelerate("DataLoaderDispatcher")) and sharer.state.process_index > 0


def is_dispatched(sharer: Any) -> bool:
    """Whether the first process reads for all."""
    return issubclass(type(sharer), _of_accelerate("DataLoaderDispatcher"))


def skips_batches() -> bool:
    """Whether the batches that a sampler is being asked for are skipped, as by `accelerator.skip_first_batches`."""
    skippers = _of_accelerate("SkipBatchSampler")
    return any(issubclass(type(asker), skippers) and asker.skip_batches > 0 for asker in _askers())


def _of_accelerate(*names: str) -> tuple[Any, ...]:
    return tuple(known("accelerate.data_loader", name) for name in names)


def _askers() -> Iterator[Any]:
    """The objects whose methods are under way, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "self" in frame.f_locals:
            yield frame.f_locals["self"]
        frame = frame.f_back
