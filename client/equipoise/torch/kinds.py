"""Which layer stands for a module: the modules that `ghost` and `one_pass` see through."""

from collections.abc import Iterable
from typing import TypeAlias

from torch import nn

from equipoise.torch.errors import UnsupportedModuleError
from equipoise.torch.layers import (
    ConvolutionLayer,
    DenseLayer,
    EmbeddingLayer,
    ForwardModeLayer,
    GroupNormLayer,
    Layer,
    LayerNormLayer,
    RMSNormLayer,
    ScaleLayer,
    TransposedDenseLayer,
)
from equipoise.torch.processes import sharded_modules

Kinds: TypeAlias = tuple[type[nn.Module], ...]

INSTEAD = "FiniteDifferenceContributions handles any module"

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


def layers_of(model: nn.Module, *, also: Kinds = (), prefix: str = "") -> dict[nn.Module, Layer]:
    """The layers of all modules that have trainable parameters of their own.

    Args:
        model: the model.
        also: types of modules of the user's that treat each example alone.
        prefix: path of the model itself, where it is a part.

    Raises:
        UnsupportedModuleError: some modules cannot be seen through; names them all.
    """
    layers: dict[nn.Module, Layer] = {}
    unsupported = []
    for path, module in model.named_modules(prefix=prefix):
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        kind = _kind(module, also)
        if kind is None:
            unsupported.append((path, module))
        else:
            layers[module] = kind(path, module)
    if unsupported:
        raise UnsupportedModuleError(unsupported, why=_why(module for _, module in unsupported), instead=INSTEAD)
    return layers


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
        raise UnsupportedModuleError(sharded, why="this process has a part of its parameters only", instead=INSTEAD)


def compiled_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of all modules that `torch.compile` has compiled."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    ]


def _kind(module: nn.Module, also: Kinds) -> type[Layer] | None:
    if isinstance(module, also):
        return ForwardModeLayer
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


def _why(modules: Iterable[nn.Module]) -> str:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        return "batch normalisation mixes examples, so that hooks cannot tell them apart"
    return (
        "hooks see through Linear, Embedding, LayerNorm, RMSNorm, GroupNorm, convolutions and transformers' Conv1D, "
        "and through your own modules that treat each example alone when their types are given as `also`"
    )
