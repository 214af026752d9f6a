"""The average of the training gradients, and what a target direction is without it."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from equipoise.torch.processes import is_sharded, whole
from equipoise.torch.rows import precise
from equipoise.torch.vectors import load_vectors, named_vectors

Vectors: TypeAlias = dict[nn.Parameter, Tensor]

KEPT = 0.9
"""Share of the average before that a step keeps: it goes over the newest ten steps or so."""


class GradientAverage:
    """ḡ, the average of the gradients that a model's optimizers stepped with; costs no pass of its own.

    `.grad` is read when a step of a torch optimizer is over: then it is that of the weighted loss, complete under
    gradient accumulation, reduced over processes, and so alike on all of them, unscaled where a GradScaler scales, and
    clipped as the step was. Steps that a GradScaler leaves out are left out. A parameter is read once at most between
    two captures, so that optimizers within optimizers do not count twice, and steps of a model that is not captured not
    at all. Takes the memory of the trainable parameters once more, in float32 or better.

    Args:
        model: the model in training.

    Attributes:
        vectors: ḡ by parameter; empty before the first step.
        changed: whether it has changed since `without` was asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.vectors: Vectors = {}
        self.changed = False
        self._model = model
        self._unread: set[nn.Parameter] = set()
        step = weakref.WeakMethod(self._stepped)

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

    @torch.no_grad()
    def note(self, parameters: Iterable[nn.Parameter]) -> None:
        """Reads `.grad` of the parameters that were not read since the last capture."""
        for parameter in parameters:
            if parameter.grad is None or parameter not in self._unread:
                continue
            self._unread.remove(parameter)
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            gradient = gradient.detach().to(precise(gradient.dtype))
            if parameter in self.vectors:
                self.vectors[parameter].lerp_(gradient, 1 - KEPT)
            else:
                self.vectors[parameter] = gradient.clone()
            self.changed = True

    @torch.no_grad()
    def without(
        self, vectors: Mapping[nn.Parameter, Tensor], *, scaled: Callable[[Vectors], Vectors] | None
    ) -> Vectors:
        """A direction V without its component along ḡ: V − (V·ḡ / ḡ·ḡ)·ḡ, orthogonal to ḡ.

        Where a step is P·gradient, its length is |P·ḡ|, and what V gains at equal length is along
        V − (V·ḡ / |P·ḡ|²)·P²·ḡ, which is orthogonal to ḡ too.

        Args:
            vectors: V by parameter.
            scaled: multiplies by P, which is symmetric; None: a step is as the gradient.
        """
        self.changed = False
        average = {parameter: vector for parameter, vector in self.vectors.items() if parameter.requires_grad}
        along = average if scaled is None else scaled(scaled(average))
        size = _inner(along, average)
        share = torch.where(size > 0, _inner(vectors, average) / size, 0.0)
        found = dict(vectors)
        for parameter, vector in along.items():
            part = vector * (float(share) if is_sharded(vector) else share.to(vector))
            found[parameter] = found[parameter] - part if parameter in found else -part
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: ḡ by the names of the parameters."""
        return {name: vector.clone() for name, vector in named_vectors(self._model, self.vectors).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on with the average that gave `state`.

        Raises:
            DirectionError: the vectors are not those of this model.
        """
        self.vectors = {p: vector.clone() for p, vector in load_vectors(self._model, state).items()}
        self.changed = True

    def _stepped(self, optimizer: Optimizer) -> None:
        # A fused optimizer is given the scale of a GradScaler, leaves `.grad` unscaled, and does nothing where it finds
        # infinities.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not float(found_inf):
            self.note(parameter for group in optimizer.param_groups for parameter in group["params"])


def _inner(a: Mapping[nn.Parameter, Tensor], b: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """⟨a, b⟩ over the parameters of both, its real part; of sharded ones over all processes: float64."""
    products = [whole((a[p].conj() * b[p]).real.sum(dtype=torch.float64)) for p in a if p in b]
    if not products:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([product.to(products[0].device) for product in products]).sum()
