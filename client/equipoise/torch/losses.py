"""Losses of examples: from tokens, and into one."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from numpy.typing import ArrayLike
from torch import Tensor

from equipoise.torch.errors import CaptureError, DirectionError
from equipoise.torch.processes import Group, total


def causal_lm_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Loss of each sequence under a causal language model, averaged over its predicted tokens, nats: float [B].

    A sequence counts the same however long it is, which is what one weight per example means. A sequence that
    predicts nothing has loss 0.

    Args:
        logits: float [B, T, V]: at t for token t + 1, as `transformers` models give them.
        labels: integers [B, T]: the tokens themselves, `ignore_index` where they are padding or not to be predicted.
        ignore_index: label of tokens that do not count.
    """
    # Labels are shifted rather than logits, of which a copy would be the largest tensor of the model.
    return token_losses(logits, F.pad(labels[:, 1:], (0, 1), value=ignore_index), ignore_index=ignore_index)


def token_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Loss of each sequence of classified tokens, averaged over them, nats: float [B].

    Args:
        logits: float [B, T, V].
        labels: integers [B, T]: the class of each token, `ignore_index` where it does not count.
        ignore_index: label of tokens that do not count.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=ignore_index)
    return losses.view_as(labels).sum(1) / (labels != ignore_index).sum(1).clamp(min=1)


def weighted_mean(losses: Tensor, weights: ArrayLike | Tensor) -> Tensor:
    """`mean(weights·losses)`, what a trainer minimises: without dimensions.

    Args:
        losses: loss of each example, [B].
        weights: [B], such as `client.weights(ids)`: mean 1 over the policy, so that nothing else need be rescaled.
    """
    return (as_weights(weights, losses) * losses).mean()


def as_weights(weights: ArrayLike | Tensor, losses: Tensor) -> Tensor:
    """Weights as a tensor like the losses, one for each.

    Raises:
        CaptureError: there are more or fewer.
    """
    factors = weights.detach() if isinstance(weights, Tensor) else torch.tensor(np.asarray(weights))
    if factors.shape != losses.shape:
        raise CaptureError(f"weights of shape {tuple(factors.shape)}: must be one for each of {len(losses)} losses")
    return factors.to(losses)


class LossMean:
    """The mean of losses that come in batches, in several processes."""

    def __init__(self) -> None:
        self._sum = torch.zeros(())
        self._count = 0

    def add(self, losses: Tensor) -> None:
        """Takes the losses of a batch, [B]."""
        self._sum = self._sum.to(losses.device) + losses.detach().sum()
        self._count += len(losses)

    def over(self, group: Group, *, field: str) -> tuple[Tensor, int]:
        """The mean over the processes of a group, and how many losses there were.

        Raises:
            DirectionError: there were none.
        """
        if group is not None:  # what is alone need not wait for its device
            both = total(torch.stack([self._sum.double(), self._sum.new_tensor(self._count).double()]), group)
            self._sum, self._count = both[0].to(self._sum.dtype), int(both[1])
        if not self._count:
            raise DirectionError(f"{field}: must hold at least one example")
        return self._sum / self._count, self._count
