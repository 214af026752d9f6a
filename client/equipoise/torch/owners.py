"""Whose row is whose, asked of the losses themselves: the gradient of a row is that of the loss it belongs to."""

import math

import torch
from torch import Tensor

from equipoise.torch.rows import Rows

_LEVELS = {torch.bfloat16: 8, torch.float16: 8}
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-2}  # else 1e-3: losses are often computed in float32


class CoupledError(Exception):
    """A row belongs to several examples: a loss depends on other examples."""


def owners_of(losses: Tensor, output: Tensor, *, each: bool = False) -> Tensor | None:
    """The example of each row of an output of packed or paired examples.

    Losses are multiplied by known numbers, and a row's gradient tells by which. Rows without a gradient, such as tokens
    that are not predicted, get the owner of the next row, as the tokens of a prompt belong to its answer.

    Args:
        losses: the loss of each example, with its graph: [B].
        output: what the losses are computed from; its last dimension, if it has two or more, holds no rows.
        each: whether it does, as in log-probabilities of tokens.

    Returns:
        Integers in the shape of the output's leading dimensions, as few as tell owners apart; None: no loss depends on
        the output.

    Raises:
        CoupledError: a row belongs to several examples.
    """
    count = len(losses)
    levels = _LEVELS.get(output.dtype, 64)
    digits = max(1, math.ceil(math.log(count) / math.log(levels)))
    base = 1 + torch.rand(count, generator=generator()).to(losses)
    example = torch.arange(count, device=losses.device)
    shape = output.shape if each or output.ndim < 2 else output.shape[:-1]
    first = _gradient(losses, output, base, shape)
    if first is None:
        return None
    place = first.abs().argmax(1, keepdim=True)
    largest = first.gather(1, place)
    known = largest[:, 0] != 0
    owners = torch.zeros(len(first), dtype=torch.long, device=first.device)
    alone = torch.ones((), dtype=torch.bool, device=first.device)
    for digit in range(digits):
        level = (example // levels**digit) % levels
        scaled = _gradient(losses, output, base * (1 + level / levels), shape)
        assert scaled is not None
        ratio = torch.where(known[:, None], scaled.gather(1, place) / torch.where(known[:, None], largest, 1), 1)
        found = ((ratio - 1) * levels).round()
        owners += found[:, 0].long() * levels**digit
        expected = first * (1 + found / levels)
        error, size = (scaled - expected).norm(dim=1), expected.norm(dim=1)
        alone &= (error <= _TOLERANCE.get(output.dtype, 1e-3) * size).all()
        alone &= ((found >= 0) & (found < levels)).all()
    if not bool(known.any()):
        return None
    if not bool(alone & (owners < count).all()):
        raise CoupledError
    return _shortest(_filled(owners, known).reshape(shape))


def others_touched(losses: Tensor, output: Tensor) -> bool:
    """Whether rows of an output, one or equally many for each example in order, enter the losses of other examples.

    Told from one half of the losses, drawn at random.
    """
    chosen = half_of(len(losses), losses)
    (g,) = torch.autograd.grad(losses, output, chosen.to(losses), retain_graph=True, allow_unused=True)
    return g is not None and bool(Rows(len(losses)).touched(g, ~chosen))


def in_order(losses: Tensor, output: Tensor) -> bool:
    """Whether each row of an output, one or equally many for each example in order, enters its own loss alone.

    Told for each row, where `others_touched` looks at two halves: losses are multiplied by random numbers, and so must
    be the gradients of their rows.
    """
    count = len(losses)
    base, factors = (1 + torch.rand(2, count, generator=generator())).to(losses)
    gradients = [_gradient(losses, output, weights, output.shape[:1]) for weights in (base, base * factors)]
    if gradients[0] is None or gradients[1] is None:
        return True
    expected = gradients[0] * Rows(count).spread(factors, len(gradients[0]))[:, None].to(gradients[0])
    error, size = (gradients[1] - expected).norm(dim=1), expected.norm(dim=1)
    return bool((error <= _TOLERANCE.get(output.dtype, 1e-3) * size).all())


def half_of(count: int, like: Tensor) -> Tensor:
    """About a random half of some examples, bool [count], on the device of a tensor.

    Their number is odd, so that no exchange of examples by pairs, as by `flip(0)`, leaves the half as it is.
    """
    size = (count + 1) // 2
    if size % 2 == 0:
        size += 1 if size + 1 < count else -1
    return (torch.randperm(count, generator=generator()) < size).to(like.device)


def generator() -> torch.Generator:
    """Random numbers of our own: those of the training stay as they are."""
    drawn = torch.Generator()
    drawn.seed()
    return drawn


def _gradient(losses: Tensor, output: Tensor, weights: Tensor, shape: torch.Size) -> Tensor | None:
    """The gradient of the weighted losses with respect to an output, a row for each place: [R, ...]."""
    (g,) = torch.autograd.grad(losses, output, weights.to(losses.dtype), retain_graph=True, allow_unused=True)
    if g is None:
        return None
    return g.detach().reshape(math.prod(shape), -1).to(torch.promote_types(g.dtype, torch.float32))


def _filled(owners: Tensor, known: Tensor) -> Tensor:
    """Rows that are not known get the owner of the next one that is, or of the last."""
    places = torch.arange(len(owners), device=owners.device)
    following = torch.where(known, places, len(owners)).flip(0).cummin(0).values.flip(0)
    last = torch.where(known, places, -1).max()
    return owners[torch.where(following < len(owners), following, last)]


def _shortest(owners: Tensor) -> Tensor:
    """Without the trailing dimensions along which nothing changes."""
    while owners.ndim > 1 and bool((owners == owners[..., :1]).all()):
        owners = owners[..., 0]
    return owners
