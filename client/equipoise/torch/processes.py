"""Models that several processes train together: replicated by DistributedDataParallel, or sharded by `fully_shard`."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equipoise.torch.errors import DirectionError, UnsupportedModuleError

Group: TypeAlias = Any
"""A `torch.distributed.ProcessGroup`: processes that work on one thing; None: this one alone."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, whose forward pass would await a backward pass of all processes."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def unreduced(model: nn.Module) -> AbstractContextManager[Any]:
    """Passes in which the processes do not wait for each other's gradients."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def replicated_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of what DistributedDataParallel wraps."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, DistributedDataParallel)]


def sharded_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of all modules whose parameters are spread over processes.

    Raises:
        UnsupportedModuleError: they are spread by the first generation of FSDP, which hides its shards.
    """
    hidden = known("torch.distributed.fsdp", "FullyShardedDataParallel")
    first = [(path, module) for path, module in model.named_modules() if isinstance(module, hidden)]
    if first:
        raise UnsupportedModuleError(first, why="FullyShardedDataParallel hides its shards", instead="use fully_shard")
    shards = known("torch.distributed.fsdp", "FSDPModule")
    return [(path, module) for path, module in model.named_modules() if isinstance(module, shards)]


def reshard(model: nn.Module) -> None:
    """Lets go of gathered parameters: the next forward pass gathers the shards as they are then."""
    for module in _shards(model):
        module.reshard()


def is_accumulating(model: nn.Module) -> bool:
    """Whether sharded modules hold gradients not reduced yet, with which another backward pass would mix."""
    parameters = (p for module in _shards(model) for group in _groups(module) for p in group.fsdp_params)
    return any(
        p.unsharded_accumulated_grad is not None
        or getattr(getattr(p, "_unsharded_param", None), "grad", None) is not None
        for p in parameters
    )


@contextmanager
def scratch_gradients(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Room for backward passes of sharded modules, which reduce into `.grad` alone: what it holds is put back."""
    kept = [parameter.grad for parameter in parameters]
    deferred = [module for module in _shards(model) if not all(group.reduce_grads for group in _groups(module))]
    for parameter in parameters:
        parameter.grad = None
    for module in deferred:
        module.set_requires_gradient_sync(True, recurse=False)
    try:
        yield
    finally:
        for module in deferred:
            module.set_requires_gradient_sync(False, recurse=False)
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def num_averaged(tensors: Iterable[Tensor]) -> int:
    """Over how many processes the gradients of sharded parameters are averaged.

    Raises:
        DirectionError: not over all that train together, each of which has other examples: what they sum would not
            belong together.
    """
    spread = [tensor for tensor in tensors if isinstance(tensor, known("torch.distributed.tensor", "DTensor"))]
    for tensor in spread:
        size, dimensions = tensor.device_mesh.size(), sum(p.is_shard() for p in tensor.placements)
        if size != num_processes() or dimensions > 1:
            raise DirectionError(
                f"model: a parameter is sharded over {size} of {num_processes()} processes, along {dimensions} "
                "dimension(s) of their mesh: must be over all of them, along one (fully_shard); tensor and pipeline "
                "parallelism are not supported"
            )
    return max((tensor.device_mesh.size() for tensor in spread), default=1)


def total(value: Tensor, group: Group) -> Tensor:
    """The sum over the processes of a group; without one the value itself."""
    if group is not None:
        value = value.clone()
        dist.all_reduce(value, group=group)
    return value


def whole(value: Tensor) -> Tensor:
    """A number that may be summed over processes yet."""
    full: Tensor = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    return full


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(value, known("torch.distributed.tensor", "DTensor"))


def _shards(model: nn.Module) -> list[Any]:
    return [module for _, module in sharded_modules(model)]


def _groups(module: Any) -> list[Any]:
    # torch says nowhere else what it has not reduced yet; older versions keep one group for each module.
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def known(package: str, name: str) -> Any:
    """A type of a package that is slow to import, if anybody has imported it: else nothing can be of that type."""
    return getattr(sys.modules.get(package), name, ())


def is_initialized() -> bool:
    """Whether processes know of each other."""
    return dist.is_available() and dist.is_initialized()


def num_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_initialized() else 1


def num_replicas(model: nn.Module, group: Group) -> int:
    """Over how many processes the gradients of a model are averaged: all it is replicated to, or those of a group."""
    if replicated_modules(model):
        return num_processes()
    return 1 if group is None else dist.get_world_size(group)


def world() -> Group:
    """All processes that train together; None when this one trains alone."""
    return dist.group.WORLD if num_processes() > 1 else None


def rank() -> int:
    """The place of this process among them, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def barrier() -> None:
    """Waits until every process is here."""
    if num_processes() > 1:
        dist.barrier()


def from_all(value: Any) -> list[Any]:
    """What each process says, in all of them, by rank: for small picklable values."""
    if num_processes() == 1:
        return [value]
    values = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def same_everywhere(value: Any) -> Any:
    """What the first process says, in all of them: for small picklable values."""
    if num_processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
