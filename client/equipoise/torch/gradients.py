"""The average of the training gradients, and what a target direction is without it."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from equipoise.torch.processes import Group, is_sharded, total, whole
from equipoise.torch.rows import precise
from equipoise.torch.vectors import load_vectors, named_vectors

Vectors: TypeAlias = dict[nn.Parameter, Tensor]

SIGNS_SEED = 20_240_217

KEPT = 0.9
"""Share of the average before that a step keeps: it goes over the newest ten steps or so."""


class GradientAverage:
    """ḡ, the average of the gradients that a model's optimizers stepped with; costs no pass of its own.

    `.grad` is read when a step of a torch optimizer is over: then it is that of the weighted loss, complete under
    gradient accumulation, reduced over processes, and so alike on all of them, unscaled where a GradScaler scales, and
    clipped as the step was. Steps that a GradScaler leaves out are left out. A parameter is read once at most between
    two captures, so that optimizers within optimizers do not count twice, and steps of a model that is not captured not
    at all. Takes the memory of the trainable parameters once more, in float32 or better.

    With `noisy` it keeps two numbers beside it: how long the gradients are, |P·g|², and what one example's loss is
    multiplied by in them. The latter is what it was multiplied by in the backward pass, times what the norm of the
    gradients that the step was made of was multiplied by since the end of the capture, as by clipping or a GradScaler.
    Where the step is made before the capture ends that is not known, and it stays as it was.

    Args:
        model: the model in training.
        scaled: multiplies a gradient by P, which is symmetric, where a step is P·gradient; None: it is the gradient.
        noisy: whether the noise of a step counts in its length.

    Attributes:
        noisy: as given; may be taken back.
        vectors: ḡ by parameter; empty before the first step.
        changed: whether it has changed since `without` was asked.
        mean_square: average of |P·g|² over the steps: float64, without dimensions; None before the first.
        multiplier: average of what one example's loss was multiplied by: float64, without dimensions; None where no
            capture told.
        share: V·ḡ over the squared length of a step, as of the last `without`.
    """

    def __init__(
        self, model: nn.Module, *, scaled: Callable[[Vectors], Vectors] | None = None, noisy: bool = False
    ) -> None:
        self.vectors: Vectors = {}
        self.changed = False
        self.mean_square: Tensor | None = None
        self.multiplier: Tensor | None = None
        self.share = torch.zeros((), dtype=torch.float64)
        self._model = model
        self._scaled = scaled
        self.noisy = noisy
        self._backward: tuple[Vectors, Tensor] | None = None
        """Of the newest backward pass the squared norms of `.grad` after it, and what a loss was multiplied by."""
        self._stepped: list[tuple[Tensor, Tensor, Tensor]] = []
        """Squared norms of gradients after the backward pass, at the step, and of the step, by optimizer."""
        self._unread: set[nn.Parameter] = set()
        step = weakref.WeakMethod(self._note_step)

        def stepped(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            if (note := step()) is not None:
                note(optimizer)

        weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    @property
    def known(self) -> bool:
        """Whether there was a step."""
        return bool(self.vectors)

    def expect(self) -> None:
        """A capture begins: the next step's gradients are to be read."""
        self._unread = {parameter for parameter in self._model.parameters() if parameter.requires_grad}
        self._take_in()

    def agree(self, group: Group) -> None:
        """Each process of a group saw its own losses: from now on `multiplier` is the mean of theirs, of those that
        know one. All must call it."""
        if group is None or not self.noisy:
            return
        known = torch.zeros(2, dtype=torch.float64, device=self._device)
        if self.multiplier is not None:
            known = torch.stack([self.multiplier, torch.ones_like(self.multiplier)]).to(self._device)
        both = total(known, group)
        self.multiplier = both[0] / both[1] if both[1] > 0 else None

    @torch.no_grad()
    def note_backward(self, multiplier: Tensor) -> None:
        """A backward pass is over, in which the mean of what losses were multiplied by is `multiplier`."""
        if self.noisy:
            gradients = {p: p.grad for p in self._unread if p.grad is not None}
            squares = {parameter: _square(gradient) for parameter, gradient in gradients.items()}
            self._backward = None if self._stepped else (squares, multiplier.double())

    @torch.no_grad()
    def note(self, parameters: Iterable[nn.Parameter]) -> None:
        """Reads `.grad` of the parameters that were not read since the last capture."""
        read: Vectors = {}
        for parameter in parameters:
            if parameter.grad is None or parameter not in self._unread:
                continue
            self._unread.remove(parameter)
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            read[parameter] = gradient = gradient.detach().to(precise(gradient.dtype))
            if parameter in self.vectors:
                self.vectors[parameter].lerp_(gradient, 1 - KEPT)
            else:
                self.vectors[parameter] = gradient.clone()
            self.changed = True
        if read and self.noisy:
            squares = {} if self._backward is None else self._backward[0]
            before = self._total([squares[parameter] for parameter in read if parameter in squares])
            plain = length = self._total([_square(gradient) for gradient in read.values()])
            if self._scaled is not None:
                length = self._total([_square(step) for step in self._scaled(read).values()])
            self._stepped.append((before, plain, length))

    @torch.no_grad()
    def without(self, vectors: Mapping[nn.Parameter, Tensor]) -> Vectors:
        """A direction V without its component along ḡ: V − (V·ḡ / ḡ·ḡ)·ḡ, orthogonal to ḡ.

        Where a step is P·gradient, its length is |P·ḡ|, and what V gains at equal length is along
        V − (V·ḡ / |P·ḡ|²)·P²·ḡ, which is orthogonal to ḡ too. With `noisy` the length is that of the steps, of which ḡ
        is the mean: V − (V·ḡ / mean |P·g|²)·P²·ḡ.

        Args:
            vectors: V by parameter.
        """
        self.changed = False
        average = {parameter: vector for parameter, vector in self.vectors.items() if parameter.requires_grad}
        along = average if self._scaled is None else self._scaled(self._scaled(average))
        size = self.mean_square if self.noisy and self.mean_square is not None else _inner(along, average)
        self.share = share = torch.where(size > 0, _inner(vectors, average).to(size.device) / size, 0.0)
        found = dict(vectors)
        for parameter, vector in along.items():
            part = vector * (float(share) if is_sharded(vector) else share.to(vector))
            found[parameter] = found[parameter] - part if parameter in found else -part
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: ḡ by the names of the parameters."""
        return {name: vector.clone() for name, vector in named_vectors(self._model, self.vectors).items()}

    def lengths(self) -> dict[str, Tensor | None]:
        """For a checkpoint: the numbers beside ḡ."""
        self._take_in()
        return {"mean_square": self.mean_square, "multiplier": self.multiplier}

    def load_state_dict(self, state: Mapping[str, Tensor], lengths: Mapping[str, Tensor | None] | None = None) -> None:
        """Goes on with the average that gave `state` and `lengths`.

        Raises:
            DirectionError: the vectors are not those of this model.
        """
        self.vectors = {p: vector.clone() for p, vector in load_vectors(self._model, state).items()}
        if lengths is not None:
            here = {name: None if value is None else value.to(self._device) for name, value in lengths.items()}
            self.mean_square, self.multiplier = here["mean_square"], here["multiplier"]
        self.changed = True

    def _take_in(self) -> None:
        """What was noted of a step joins the averages."""
        if not self._stepped:
            return
        before, plain, length = (self._total(list(squares)) for squares in zip(*self._stepped, strict=True))
        self._stepped.clear()
        self.mean_square = _moved(self.mean_square, length)
        if self._backward is not None:
            multiplier = self._backward[1].to(self._device)
            passed = torch.where(before > 0, plain / before, 1.0).sqrt()
            self.multiplier = _moved(self.multiplier, multiplier * passed)
            self._backward = None

    @property
    def _device(self) -> torch.device:
        """Where numbers are kept, of a model on several devices too."""
        return next(self._model.parameters()).device

    def _total(self, parts: list[Tensor]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack([zero, *(part.to(self._device) for part in parts)]).sum()

    def _note_step(self, optimizer: Optimizer) -> None:
        # A fused optimizer is given the scale of a GradScaler, leaves `.grad` unscaled, and does nothing where it finds
        # infinities.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not float(found_inf):
            self.note(parameter for group in optimizer.param_groups for parameter in group["params"])


def _square(vector: Tensor) -> Tensor:
    """|v|², in float64: half precision would overflow."""
    return vector.detach().to(precise(vector.dtype)).abs().square().sum(dtype=torch.float64)


def _moved(average: Tensor | None, new: Tensor) -> Tensor:
    return new if average is None else torch.lerp(new, average.to(new), KEPT)


def _inner(a: Mapping[nn.Parameter, Tensor], b: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """⟨a, b⟩ over the parameters of both, its real part; of sharded ones over all processes: float64."""
    products = [whole((a[p].conj() * b[p]).real.sum(dtype=torch.float64)) for p in a if p in b]
    if not products:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([product.to(products[0].device) for product in products]).sum()


@dataclass(frozen=True, slots=True)
class Noise:
    """How an example's own gradient lengthens the step that it is in.

    Attributes:
        signs: a random vector r by parameter, scaled as steps are: the mean of (∇l·r)² is |∇l|².
        factor: what |∇l|² takes away from a contribution: float64, without dimensions.
    """

    signs: dict[nn.Parameter, Tensor]
    factor: Tensor


class Signs:
    """Random signs by parameter, of generators of their own: alike wherever as many were drawn before.

    Attributes:
        drawn: how often; to be kept in checkpoints.
    """

    def __init__(self) -> None:
        self.drawn = 0

    def draw(self, parameters: Iterable[nn.Parameter]) -> Vectors:
        """+1 or -1 for each number of each parameter."""
        generators: dict[torch.device, torch.Generator] = {}
        signs = {}
        for parameter in parameters:
            device = parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(SIGNS_SEED + self.drawn)
            real = torch.view_as_real(parameter.detach()) if parameter.is_complex() else parameter.detach()
            ones = torch.empty_like(real, dtype=precise(real.dtype))
            ones.bernoulli_(0.5, generator=generators[device]).mul_(2).sub_(1)
            signs[parameter] = torch.view_as_complex(ones) if parameter.is_complex() else ones
        self.drawn += 1
        return signs
