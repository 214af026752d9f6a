"""Which formula stands for a module, and which modules run no hooks."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn

from equipoise.torch.errors import UnsupportedModuleError
from equipoise.torch.layers import (
    ConvolutionLayer,
    DenseLayer,
    EmbeddingLayer,
    GroupNormLayer,
    Layer,
    LayerNormLayer,
    RMSNormLayer,
    ScaleLayer,
    TransposedDenseLayer,
)
from equipoise.torch.processes import sharded_modules

Kinds: TypeAlias = tuple[type[nn.Module], ...]

INSTEAD = 'use JvpContributions(model, direction), in a trainer TrainingOptions(method="jvp")'
"""What to paste where a method does not fit: exact, about a step more."""

BY_DIFFERENCES = (
    'use FiniteDifferenceContributions(model, direction), in a trainer TrainingOptions(method="finite_difference")'
)
"""The same where there is no forward mode: right to about 0.5 %."""

_KINDS: tuple[tuple[type[nn.Module], type[Layer]], ...] = (
    (nn.Linear, DenseLayer),
    (nn.Embedding, EmbeddingLayer),
    (nn.LayerNorm, LayerNormLayer),
    (nn.RMSNorm, RMSNormLayer),
    (nn.GroupNorm, GroupNormLayer),
    (nn.Conv1d, ConvolutionLayer),
    (nn.Conv2d, ConvolutionLayer),
    (nn.Conv3d, ConvolutionLayer),
)


def closed_layers(model: nn.Module, *, prefix: str = "", but: Kinds = ()) -> dict[nn.Module, Layer]:
    """The modules with trainable parameters whose formula is known.

    Args:
        model: the model.
        prefix: path of the model itself, where it is a part.
        but: types of modules that are left out.
    """
    layers: dict[nn.Module, Layer] = {}
    for path, module in model.named_modules(prefix=prefix):
        own = dict(module.named_parameters(recurse=False))
        if any(p.is_complex() for p in own.values()):
            continue
        if not any(p.requires_grad for p in own.values()) or isinstance(module, but) or not takes_hooks(module):
            continue
        kind = _kind(module)
        if kind is not None and own.keys() <= {"weight", "bias"}:
            layers[module] = kind(path, module)
    return layers


def takes_hooks(module: nn.Module) -> bool:
    """Whether hooks can be registered: not on what `torch.jit` has compiled."""
    return not isinstance(module, torch.jit.ScriptModule)


def check_eager(model: nn.Module) -> None:
    """Refuses modules that do not run the hooks: those whose graphs are compiled, and copies for several devices.

    Raises:
        UnsupportedModuleError: there is such a module.
    """
    if copied := [(path, module) for path, module in model.named_modules() if isinstance(module, nn.DataParallel)]:
        raise UnsupportedModuleError(
            copied, why="its copies run no hooks", instead="use one process for each device (torchrun)"
        )
    compiled = compiled_modules(model)
    if compiled:
        raise UnsupportedModuleError(compiled, why="compiled modules run no hooks", instead=INSTEAD)


def check_whole(model: nn.Module) -> None:
    """Refuses sharded modules: their parameters are elsewhere when they are needed.

    Raises:
        UnsupportedModuleError: a module is sharded.
    """
    if sharded := sharded_modules(model):
        raise UnsupportedModuleError(
            sharded, why="this process has a part of its parameters only", instead=BY_DIFFERENCES
        )


def check_alone(called: Sequence[tuple[str, nn.Module]], *, count: int) -> None:
    """Refuses modules that make an example's loss, or what is taken for its gradient, depend on the other examples.

    Args:
        called: (path, module) of the modules in a forward pass.
        count: number of examples.

    Raises:
        UnsupportedModuleError: a module does.
    """
    counted = {
        path: module
        for path, module in called
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and (module.scale_grad_by_freq or module.max_norm is not None)
        and module.weight.requires_grad
    }
    if counted:
        why = "scale_grad_by_freq and max_norm make an example's gradient depend on the other examples"
        raise UnsupportedModuleError(list(counted.items()), why=why, instead=BY_DIFFERENCES)
    mixing = {
        path: module
        for path, module in called
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    }
    if mixing and count > 1:
        why = "batch normalisation in training mode mixes examples, so that hooks cannot tell them apart"
        raise UnsupportedModuleError(list(mixing.items()), why=why, instead=INSTEAD)


def compiled_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of all modules that `torch.compile` has compiled."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    ]


def _kind(module: nn.Module) -> type[Layer] | None:
    if "forward" in vars(module):
        return None  # somebody has replaced what it computes
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None):
        return None  # what one example's gradient is depends on the others; or the weights change in the forward pass
    for base, kind in _KINDS:
        # A subclass that computes something else is another module.
        if isinstance(module, base) and type(module).forward is base.forward:
            return kind
    if _named(module, "transformers.pytorch_utils", "Conv1D"):
        return TransposedDenseLayer
    return ScaleLayer if _is_rms_norm(module) else None


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether this is one of the many classes that scale a normalised input: LlamaRMSNorm, T5LayerNorm and so on."""
    parameters = dict(module.named_parameters())
    named = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    return named and parameters.keys() == {"weight"} and parameters["weight"].ndim == 1


def _named(module: nn.Module, package: str, name: str) -> bool:
    """Whether this is a class of a package that may not be installed."""
    return any(kind.__module__ == package and kind.__name__ == name for kind in type(module).__mro__)
