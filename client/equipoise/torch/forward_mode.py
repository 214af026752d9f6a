"""Forward-mode differentiation of any module: what a move of its parameters does to what it gives."""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class _Composite(TorchFunctionMode):
    """Replaces the functions that have no forward mode by others that give the same."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._weight_norm:
            v, g, dim = (*args, 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        if func is F.embedding_bag and kwargs.get("mode", "mean") != "max":
            return _multilinear(func, args, kwargs, places=(1,))
        if kwargs.get("out") is not None:  # has no gradient, as in the power iteration of a spectral norm
            args = tuple(
                _unpacked(arg)[0] if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args
            )
        if func in _GROUPED:
            return _multilinear(func, args, kwargs, places=(0, 1))
        output = func(*args, **kwargs)
        if func in _NORMS:  # of mixed precision they give a derivative in another one than their output
            value, tangent = _unpacked(output)
            if tangent is not None and tangent.dtype != value.dtype:
                return _dual(value, tangent.to(value.dtype))
        return output


_NORMS = (F.layer_norm, F.group_norm, F.batch_norm)
_GROUPED = tuple(
    getattr(package, name) for package, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(package, name)
)


def _multilinear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, places: tuple[int, ...]) -> Any:
    """The dual output of a function that is linear in each of some arguments, by the product rule."""
    pairs = {place: _unpacked(args[place]) for place in places}
    values = [pairs[place][0] if place in pairs else arg for place, arg in enumerate(args)]
    output, tangent = func(*values, **kwargs), None
    for place, (_, moved) in pairs.items():
        if moved is not None:
            part = func(*values[:place], moved, *values[place + 1 :], **kwargs)
            tangent = part if tangent is None else tangent + part
    return output if tangent is None else _dual(output, tangent)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Runs a model on kernels that have a forward mode: unfused attention, plain recurrent layers, nothing compiled."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(_without_mkldnn())
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_Composite())
        yield


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def tangents_of(
    module: nn.Module, moves: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The tensors that a module gives, and how they change with its parameters.

    Args:
        module: called as `module(*args, **kwargs)`.
        moves: by the names of parameters the direction in which each is moved.
        args: arguments by position.
        kwargs: arguments by name.

    Returns:
        The tensors of its output in order, and the derivative of each; None: it does not change.

    Raises:
        NotImplementedError: an operation has no forward mode.
    """
    _load_rules()
    parameters = dict(module.named_parameters())
    with differentiable(module), forward_ad.dual_level():
        # A direction is small, and would vanish in half precision.
        half = any(parameters[name].dtype.itemsize < 4 for name in moves)
        size = torch.stack([move.abs().max() for move in moves.values()]).max().clamp(min=1e-30) if half else 1.0
        duals = {
            name: _dual(parameters[name].detach(), (move / size if half else move).to(parameters[name].dtype))
            for name, move in moves.items()
        }
        output = torch.func.functional_call(module, duals, args, dict(kwargs))
        found = [_unpacked(tensor) for tensor in tensors_of(output)]
        values, tangents = [value.detach() for value, _ in found], [t if t is None else t.detach() for _, t in found]
        return values, [t * size if half and t is not None else t for t in tangents]


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def _unpacked(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    value, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return value, tangent


@cache
def _load_rules() -> None:
    """Has torch load the rules of its forward mode, which it compiles by a function that it calls deprecated itself."""
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401


def tensors_of(value: Any) -> list[Tensor]:
    """All floating tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in tensors_of(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def detached(value: Any) -> Any:
    """The same nested arguments with tensors cut from their graphs; other objects as they are."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) is dict:
        return {name: detached(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(detached(part) for part in value)
    return value
