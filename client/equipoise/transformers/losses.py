"""The loss of each example of a batch, by the kind of model."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from equipoise.errors import InvalidRequestError
from equipoise.torch.losses import causal_lm_losses, token_losses
from equipoise.torch.processes import unwrapped

_TOKENS = ("ForMaskedLM", "ForTokenClassification")
_WHOLE = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification")
KINDS = ("ForCausalLM", *_TOKENS, *_WHOLE)
"""Values of a model's `loss_type` whose example losses are known here."""


def model_losses(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a model of `transformers` would average, for each example, nats: float [B].

    A sequence's loss is the mean over its predicted tokens, so that it counts the same however long it is. What models
    add to it, such as the balance of experts, is left out.

    Args:
        model: a model for causal or masked language modelling, or classification of tokens or of whole inputs.
        batch: its inputs, `labels` among them.

    Raises:
        InvalidRequestError: the model is of another kind: give a function of your own.
    """
    _checked_kind(model)
    if "labels" not in batch:
        raise InvalidRequestError(field="batch", value=f"keys {sorted(batch)}", rule="must have labels")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return output_losses(model, model(**inputs), batch["labels"])


def output_losses(model: Any, outputs: Any, labels: Tensor) -> Tensor:
    """The same from a forward pass that was made: float [B].

    Args:
        model: as in `model_losses`.
        outputs: what it gave.
        labels: as the model takes them.

    Raises:
        InvalidRequestError: the model is of another kind.
    """
    kind = _checked_kind(model)
    logits = (outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]).float()
    if kind == "ForCausalLM":
        return causal_lm_losses(logits, labels)
    return token_losses(logits, labels) if kind in _TOKENS else _class_losses(logits, labels)


def _checked_kind(model: Any) -> str:
    inner: Any = unwrapped(model)
    inner = getattr(inner, "_orig_mod", inner)  # what torch.compile wraps
    kind = _kind(inner)
    if kind is None or kind not in KINDS or inner.config.is_encoder_decoder:
        raise InvalidRequestError(
            field="losses",
            value=f"model_losses for {type(inner).__name__}",
            rule=f"must be a function from (model, batch) to the loss of each example; known are {', '.join(KINDS)}",
        )
    return kind


def _kind(model: Any) -> str | None:
    kind: str | None = getattr(model, "loss_type", None)  # found from the name of the class, but for older names
    return "ForCausalLM" if kind is None and type(model).__name__.endswith(("LMHeadModel", "ForCausalLM")) else kind


def _class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that fits the labels: integers are classes, vectors of floats several classes at once."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(-1), reduction="none")
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)
    return F.cross_entropy(logits, labels.view(-1), reduction="none")
