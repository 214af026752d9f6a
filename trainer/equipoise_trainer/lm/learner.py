"""A model in training: what moves its parameters, and how far a step went."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise_trainer.lm.model import new_model, sequence_losses
from equipoise_trainer.lm.presets import Preset

BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
WARM_UP_STEPS = 20
"""The learning rate rises linearly over the first so many steps, then stays."""
LARGEST_GRADIENT = 1.0
"""Gradients are scaled down to this norm, as usual for language models."""
MEASURED_AT_ONCE = 64
"""Sequences of a forward pass for measuring: small enough for the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """How a model learns.

    Attributes:
        preset: its shape.
        seed: of its first weights.
        learning_rate: of AdamW.
    """

    preset: Preset
    seed: int
    learning_rate: float


class Learner:
    """A GPT and its AdamW. Gradients are in `.grad` when `step` is called."""

    def __init__(self, config: LearnerConfig) -> None:
        self.model = new_model(config.preset, seed=config.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self._learning_rate = config.learning_rate

    def losses(self, rows: NDArray[np.int64]) -> Tensor:
        """Loss of each sequence, with its graph: [B]."""
        return sequence_losses(self.model, torch.from_numpy(rows))

    def each(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Loss of each sequence, nats: [n]; changes nothing."""
        with torch.no_grad():
            pieces = torch.split(torch.from_numpy(rows), MEASURED_AT_ONCE)
            return torch.cat([sequence_losses(self.model, piece) for piece in pieces]).double().numpy()

    def measure(self, rows: NDArray[np.int64]) -> float:
        """Mean loss of sequences, nats; changes nothing."""
        return float(self.each(rows).mean())

    def step(self, step: int, *, length: float | None = None) -> float:
        """Moves the parameters by their gradients and forgets these.

        Args:
            step: from 0.
            length: norm that the move is scaled to; None: as AdamW makes it.

        Returns:
            Norm of the move.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS)
        parameters = list(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        before = [parameter.detach().clone() for parameter in parameters]
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            moves = [parameter - old for parameter, old in zip(parameters, before, strict=True)]
            norm = float(torch.stack([move.square().sum() for move in moves]).sum().sqrt())
            if length is not None and norm > 0:
                for parameter, old, move in zip(parameters, before, moves, strict=True):
                    parameter.copy_(old + move * (length / norm))
                norm = length
        return norm

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
