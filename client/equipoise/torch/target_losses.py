"""Losses of single target examples, beside those of the training."""

from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from equipoise.torch.capture import Capture, Contributions, LossCapture
from equipoise.torch.direction import TargetDirection
from equipoise.torch.errors import DirectionError
from equipoise.torch.processes import unwrapped
from equipoise.torch.quiet import untouched
from equipoise.wire import StepFields


class TargetLosses:
    """Losses of target examples under the model in training, of every k-th batch: forward passes without gradients.

    They are compared with the losses of that batch. So the modules are in the modes that they had in the forward pass
    before, with dropout where that had dropout; before the first there is nothing to go by, and nothing is measured.
    The model and the random generators stay as they are. Each process measures batches of its own, and waits for none.

    Args:
        direction: has the model, its losses, target A in turn, and guard B.
        every: batches between two looks.
        guard: whether every `look_every`-th look measures guard B too.
    """

    def __init__(self, direction: TargetDirection, *, every: int, guard: bool = True) -> None:
        self._direction = direction
        self._every = every
        self._guard = guard
        self._modes: list[tuple[nn.Module, bool]] = []
        """Of the modules, at the forward pass before the one that is looked at."""
        self._fields = StepFields()
        self.restart()

    def restart(self) -> None:
        """A checkpoint is made: from here on the job goes on as one does that resumes from it."""
        self._modes = []
        self._age, self._looks = self._every, 0

    def advance(self) -> None:
        """A batch begins: measures, if it is time to."""
        self._fields, self._age = StepFields(), self._age + 1
        if self._modes and self._age > self._every:
            self._measure()
            self._age, self._modes = 1, []

    def take(self) -> StepFields:
        """What goes with the losses of the batch that has had its forward pass; with most it is nothing.

        `target_losses`, their mean `target_loss`, and of every `look_every`-th look `guard_loss`, nats. Losses that
        are not finite are left out and counted.
        """
        if self._age >= self._every:  # the next batch is looked at
            self._modes = [(module, module.training) for module in unwrapped(self._direction.model).modules()]
        fields, self._fields = self._fields, StepFields()
        return fields

    def _measure(self) -> None:
        direction, model = self._direction, unwrapped(self._direction.model)
        with untouched(model):
            losses = [self._losses(model, batch) for batch in direction.next_batches()]
        if not sum(map(len, losses)):
            raise DirectionError("target_batches: must hold at least one example")
        values = torch.cat(losses).to("cpu", torch.float32).numpy()
        values = values[[direction.is_usable("target_loss", float(value)) for value in values]]
        if len(values):
            self._fields["target_losses"] = values
            self._fields["target_loss"] = float(values.astype(np.float64).mean())
        looks_closely = self._guard and self._looks % direction.look_every == 0
        guard = direction.measure_guard(alone=True) if looks_closely else None
        if guard is not None and direction.is_usable("guard_loss", guard):
            self._fields["guard_loss"] = guard
        self._looks += 1

    def _losses(self, model: nn.Module, batch: object) -> Tensor:
        """The losses of a batch as training would see them: [A]."""
        for module, training in self._modes:
            module.training = training
        compute = partial(self._direction.quiet_losses, batch)
        try:
            return self._direction.without_graph(compute).detach()
        except ValueError:  # as of batch normalisation, which does not train on a single example
            if not model.training:
                raise
        model.eval()
        return self._direction.without_graph(compute).detach()


class LossesAlone(Contributions[Capture]):
    """No contributions: what is known of a batch are its losses. Any model will do, and it costs nothing."""

    tolerance = None
    sees_noise = False

    def capture(self, ids: ArrayLike | None) -> LossCapture:
        """A capture of losses; the direction is never computed."""
        return self.capture_losses(ids)

    def _capture(self, ids: ArrayLike | None) -> LossCapture:
        return self.capture_losses(ids)
