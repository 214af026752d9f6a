"""The loss of each example, as TRL's trainers compute it: SFT by its tokens, DPO and reward models pair by pair."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import InvalidRequestError
from equipoise.torch.rows import precise
from equipoise.transformers.trl.head import fused_call
from equipoise.transformers.trl.packing import LENGTHS, owners_of

_SHARE = "equipoise_share"  # of a pair's tokens, where 1 is the mean
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-2}


class Objective(ABC):
    """What one of TRL's trainers minimises, example by example.

    Args:
        trainer: the trainer.
        compute_loss: its own `compute_loss`.
    """

    def __init__(self, trainer: Any, compute_loss: Callable[..., Any]) -> None:
        self._trainer = trainer
        self._compute_loss = compute_loss
        self._last: tuple[dict[str, Any], Any] | None = None
        self._keeping = self._checked = False

    @abstractmethod
    def check(self) -> None:
        """Refuses settings under which no loss is an example's own.

        Raises:
            InvalidRequestError: names the setting, and another one.
        """

    def losses(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The loss of each example of a batch, nats: float [B]."""
        batch = self._completed(batch)
        call = _Call(model, packed=LENGTHS in batch)
        with self._quiet():
            self._plain(call, batch)
            if self._keeping and torch.is_grad_enabled():
                self._last = batch, call.outputs
            return self._each(call.outputs, batch)

    @abstractmethod
    def shares(self, batch: Mapping[str, Any], num_items: Any) -> Tensor:
        """What each loss counts for in the trainer's own: float [B].

        Args:
            batch: the batch.
            num_items: predicted tokens of all batches of an optimizer's step; None: they do not matter.
        """

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Losses that are computed with gradients while it lasts are those that `note` is about."""
        self._keeping = True
        try:
            yield
        finally:
            self._keeping = False

    def note(self, num_items: Any, unweighted: Tensor) -> None:
        """Has the trainer take its own metrics from the forward pass that was kept.

        Args:
            num_items: as above.
            unweighted: Σ shares·losses.

        Raises:
            InvalidRequestError: the trainer's own loss is something else.
        """
        assert self._last is not None
        (batch, outputs), self._last = self._last, None
        with torch.no_grad():
            plain = self._plain(_Replay(outputs), batch, num_items)
        if not self._checked:
            self._checked = True
            gap, size = float((plain.double() - unweighted.double()).abs()), float(plain.double().abs())
            if gap > _TOLERANCE.get(self._trainer.model.dtype, 1e-3) * max(size, 1e-3):
                raise InvalidRequestError(
                    field="losses",
                    value=f"{type(self._trainer).__name__} whose examples' losses make {float(unweighted):.6g}, where "
                    f"its own is {float(plain):.6g}",
                    rule="must be given where a trainer's loss is not made of its examples': "
                    "PolicyTraining(losses=...)",
                )

    @abstractmethod
    def _each(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        """The losses from the outputs of the model."""

    def _completed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with what need be computed once only."""
        return dict(batch)

    def _plain(self, model: Any, batch: Mapping[str, Any], num_items: Any = None) -> Tensor:
        """The trainer's own loss of a batch."""
        own = {name: value for name, value in batch.items() if name != LENGTHS}
        loss: Tensor = self._compute_loss(model, own, num_items_in_batch=num_items)
        return loss

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Computing a loss leaves no metrics, and waits for no other process."""
        trainer = self._trainer
        before = trainer._metrics, trainer._total_train_tokens, trainer.accelerator
        trainer._metrics = {mode: defaultdict(list) for mode in trainer._metrics}
        trainer.accelerator = _Alone(trainer.accelerator)
        try:
            yield
        finally:
            trainer._metrics, trainer._total_train_tokens, trainer.accelerator = before


class SupervisedObjective(Objective):
    """`SFTTrainer`: an example's loss is the mean over its predicted tokens, of any of its loss types.

    The trainer's own loss is the mean over all tokens of a batch, so that an example counts there by its tokens.
    """

    def check(self) -> None:
        """As in `Objective`."""
        _check_balance(self._trainer)

    def shares(self, batch: Mapping[str, Any], num_items: Any) -> Tensor:
        """As in `Objective`."""
        trainer, tokens = self._trainer, self._tokens(batch).double()
        if num_items is None:
            return tokens / tokens.sum().clamp(min=1)
        processes = trainer.accelerator.num_processes // trainer.get_tp_size()
        scale = processes if trainer.args.average_tokens_across_devices else 1
        return tokens / torch.as_tensor(num_items, device=tokens.device).clamp(min=1) * scale

    def _each(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        losses = -outputs.log_probs
        if self._trainer.args.loss_type == "dft":
            losses = losses * outputs.log_probs.exp().detach()
        # In float64 a token's gradient is what the trainer's own loss gives it, bit for bit.
        dtype = losses.dtype if losses.device.type == "mps" else torch.float64
        return self._summed(losses, batch).to(dtype) / self._tokens(batch).clamp(min=1)

    def _tokens(self, batch: Mapping[str, Any]) -> Tensor:
        return self._summed(batch["labels"][:, 1:] != -100, batch)

    def _summed(self, values: Tensor, batch: Mapping[str, Any]) -> Tensor:
        owners = owners_of(batch)
        if owners is None:
            return values.sum(1)
        values = values if values.is_floating_point() else values.long()
        return values.new_zeros(len(batch[LENGTHS])).index_add(0, owners[0, 1:], values[0])


class PairObjective(Objective):
    """Trainers on pairs: a pair's loss is what the trainer says of a batch of this pair alone."""

    def shares(self, batch: Mapping[str, Any], num_items: Any) -> Tensor:
        """As in `Objective`: the mean over pairs."""
        tokens = batch["input_ids"]
        count = len(tokens) // 2
        return torch.full((count,), 1 / count, device=tokens.device)

    def _each(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        count = len(batch["input_ids"]) // 2
        of_outputs, of_batch = _pairs(outputs, count), _pairs(batch, count)
        losses = [self._plain(_Replay(output), own) for output, own in zip(of_outputs, of_batch, strict=True)]
        return torch.stack([loss.to(precise(loss.dtype)) for loss in losses])


class RewardObjective(PairObjective):
    """`RewardTrainer`."""

    def check(self) -> None:
        """As in `Objective`."""


class PreferenceObjective(PairObjective):
    """`DPOTrainer`, with all of its loss types that look at one pair.

    Its `sft` is a mean over the tokens of all chosen answers of a batch, in which a pair counts by its tokens; there
    training is TRL's up to rounding.
    """

    def check(self) -> None:
        """As in `Objective`."""
        _check_balance(self._trainer)
        if sorting := [kind for kind in self._trainer.loss_types if kind.startswith("aot")]:
            raise InvalidRequestError(
                field="loss_type",
                value=sorting[0],
                rule="sorts the pairs of a batch, so that no loss is one pair's own: use another, such as "
                "loss_type='apo_zero'",
            )

    def _completed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        trainer = self._trainer
        if "ref_chosen_logps" in batch:
            return dict(batch)
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, dict(batch))
        return {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _plain(self, model: Any, batch: Mapping[str, Any], num_items: Any = None) -> Tensor:
        trainer = self._trainer
        before = trainer.precompute_ref_logps, trainer.loss_weights
        trainer.precompute_ref_logps = True
        if _SHARE in batch:
            by_type = zip(trainer.loss_types, trainer.loss_weights, strict=True)
            trainer.loss_weights = [weight * batch[_SHARE][0] if kind == "sft" else weight for kind, weight in by_type]
            batch = {name: value for name, value in batch.items() if name != _SHARE}
        try:
            return super()._plain(model, batch, num_items)
        finally:
            trainer.precompute_ref_logps, trainer.loss_weights = before

    def _each(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        if "sft" in self._trainer.loss_types:
            tokens = batch["completion_mask"][: len(batch["completion_mask"]) // 2, 1:].sum(1).double()
            batch = {**batch, _SHARE: tokens * len(tokens) / tokens.sum().clamp(min=1)}
        return super()._each(outputs, batch)


OBJECTIVES: dict[str, type[Objective]] = {
    "SFTTrainer": SupervisedObjective,
    "DPOTrainer": PreferenceObjective,
    "RewardTrainer": RewardObjective,
}
"""By the names of TRL's trainers."""


class _Call:
    """The model, whose output for the losses is kept."""

    def __init__(self, model: Any, *, packed: bool) -> None:
        self.outputs: Any = None
        self._model = model
        self._packed = packed

    def __call__(self, **kwargs: Any) -> Any:
        fused = kwargs.get("fused_lm_head", False)
        self.outputs = fused_call(self._model, kwargs, packed=self._packed) if fused else self._model(**kwargs)
        return self.outputs


class _Replay:
    """Stands for the model where its output is known."""

    def __init__(self, outputs: Any) -> None:
        self._outputs = outputs

    def __call__(self, **kwargs: Any) -> Any:
        return self._outputs


class _Alone:
    """An accelerator that is asked by one process alone."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, values: Any) -> Any:
        """The values of this process."""
        return values

    gather_for_metrics = gather


def _pairs(values: Any, count: int) -> list[Any]:
    """Outputs or inputs for two rows to a pair, chosen ones first, or one, taken apart by pairs."""
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in values.items():
        taken = [value] * count
        if isinstance(value, Tensor) and value.ndim and len(value) == 2 * count:
            taken = list(value.view(2, count, *value.shape[1:]).unbind(1))
        elif isinstance(value, Tensor) and value.ndim and len(value) == count:
            taken = list(value.unsqueeze(1).unbind())
        for part, own in zip(parts, taken, strict=True):
            part[name] = own
    return [type(values)(**part) for part in parts]


def _check_balance(trainer: Any) -> None:
    if trainer.aux_loss_enabled:
        raise InvalidRequestError(
            field="router_aux_loss_coef",
            value=str(trainer.router_aux_loss_coef),
            rule="must be 0.0 under a policy: the balance of experts is a loss of whole batches, of no example",
        )
