"""Trainers whose training loss is weighted by a policy."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from equipoise.client import PolicyClient
from equipoise.errors import InvalidRequestError
from equipoise.torch.direction import ExampleLoss, TargetDirection
from equipoise.torch.processes import num_processes, rank
from equipoise.torch.resume import resume_run, run_state
from equipoise.torch.sampler import WeightedSampler
from equipoise.torch.steps import WeightedStep, WeightedSteps
from equipoise.torch.training import TrainingOptions
from equipoise.transformers.data import IdCollator, own_batches, with_ids
from equipoise.transformers.losses import model_losses

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


@dataclass(frozen=True, slots=True)
class PolicyTraining:
    """What a trainer needs to train under a policy.

    Attributes:
        client: the client of the policy; in a job of several processes each has its own.
        target: dataset of target A, in the form of the training dataset: what the model shall be good at. 64 sequences
            or more; they are never trained on here.
        guard: dataset of guard B, from the same source, on which only the loss is computed.
        losses: from (model, batch) to the loss of each example, [B]; default: what fits the model, see `model_losses`.
        id_column: column of the training dataset with the ids, integers; without it an example's id is its place.
        options: how contributions are found and weights are used.
    """

    client: PolicyClient
    target: Any
    guard: Any = field(default=None, kw_only=True)
    losses: ExampleLoss | None = field(default=None, kw_only=True)
    id_column: str = field(default="example_id", kw_only=True)
    options: TrainingOptions = field(default_factory=TrainingOptions, kw_only=True)


class PolicyMixin(_Base):
    """Makes a `Trainer`, or a trainer made of it, train under a policy: `class MyTrainer(PolicyMixin, SFTTrainer)`.

    The training loss is the mean over examples of weight times loss, where a sequence's loss is the mean over its
    tokens; evaluation is as ever. Statistics are sent after each step, and nothing waits for the network. Checkpoints
    hold the run's part (`equipoise-<rank>.pt`), and `train(resume_from_checkpoint=...)` goes on from it.

    Works with gradient accumulation, mixed precision, gradient checkpointing, DistributedDataParallel, and with FSDP 2
    by `options=TrainingOptions(method="finite_difference")`.

    Args:
        policy: the policy and the data it aims at.

    Attributes:
        policy_client: the client that is in use: after resuming an older checkpoint that of a fork.
    """

    data_collator: Any
    train_dataset: Any

    def __init__(self, *args: Any, policy: PolicyTraining, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy_client = policy.client
        self._policy = policy
        self._steps: WeightedSteps | None = None
        self._step: WeightedStep | None = None
        self._resume_from: str | None = None
        self._weighted_sampler: WeightedSampler | None = None
        self._check_loss()
        self.train_dataset = with_ids(self.train_dataset, policy.id_column)
        self.data_collator = IdCollator(self.data_collator, policy.id_column)
        self.add_callback(_Checkpoints(self._save_run))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`."""
        self._steps = None
        if resume_from_checkpoint is True:
            self._resume_from = get_last_checkpoint(str(self.args.output_dir))  # type: ignore[no-untyped-call]
        else:
            self._resume_from = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As in `Trainer`."""
        if self._steps is None:
            self._steps = self._begin(model)
        with self._steps.capture(self._ids(inputs)) as step:
            self._step = step
            try:
                # A mean over examples is divided by the number of accumulated batches, not by that of tokens.
                loss: Tensor = super().training_step(model, inputs, None)
            finally:
                self._step = None
        if self.accelerator.sync_gradients:
            self._steps.submit(step=self.state.global_step + 1)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`: the weighted loss in training, the plain one else."""
        if self._step is None:
            return super().compute_loss(model, _without_ids(inputs, self._policy.id_column), *args, **kwargs)
        return self._step.loss(_without_ids(inputs, self._policy.id_column))

    def _begin(self, model: nn.Module) -> WeightedSteps:
        policy, options = self._policy, self._policy.options
        direction = options.direction(
            model,
            policy.losses or model_losses,
            self._batches("target", policy.target),
            guard=None if policy.guard is None else self._batches("guard", policy.guard),
            optimizer=self.optimizer,
            accumulate=self.args.gradient_accumulation_steps,
        )
        if self._resume_from is not None:
            self._resume(self._resume_from, direction)
        if self._weighted_sampler is not None:
            self._weighted_sampler.client = self.policy_client
        return options.steps(self.policy_client, model, direction)

    def _batches(self, name: str, dataset: Any) -> list[Any]:
        collate = self._get_collator_with_removed_columns(self.data_collator, description=name)
        batches = own_batches(name, dataset, batch_size=self.args.train_batch_size, collate=collate)
        return [_without_ids(self._prepare_inputs(batch), self._policy.id_column) for batch in batches]

    def _ids(self, inputs: Mapping[str, Any]) -> Any:
        column = self._policy.id_column
        if column not in inputs:
            raise InvalidRequestError(
                field=column,
                rule="must be a column of a training dataset without a length, or that is collated into other rows",
            )
        return inputs[column]

    def _check_loss(self) -> None:
        if self._policy.losses is not None:
            return
        for name, given in (
            ("label_smoothing_factor", self.label_smoother is not None),
            ("compute_loss_func", self.compute_loss_func is not None),
        ):
            if given:
                raise InvalidRequestError(field=name, rule="needs PolicyTraining.losses: the loss of each example")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if self._policy.id_column not in columns:
            columns.append(self._policy.id_column)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if not self._policy.options.sampled:
            return super()._get_train_sampler(*args, **kwargs)
        # Accelerate gives each process every so-manieth batch of its own sampler: each must be as long as all together.
        total = len(self.train_dataset) * num_processes()
        self._weighted_sampler = WeightedSampler(
            self.policy_client,
            len(self.train_dataset),
            num_samples=total,
            seed=self.args.seed,
        )
        return self._weighted_sampler

    def _save_run(self, folder: Path) -> None:
        if self._steps is not None:
            direction = self._steps.contributions.direction
            state = run_state(self.policy_client, direction=direction, keep=self._policy.options.keep)
            torch.save(state, folder / _file(rank()))

    def _resume(self, folder: str, direction: TargetDirection) -> None:
        path = Path(folder) / _file(rank())
        state = torch.load(path if path.exists() else Path(folder) / _file(0), map_location="cpu", weights_only=True)
        self.policy_client = resume_run(self._policy.client, state, direction=direction)


class PolicyTrainer(PolicyMixin, Trainer):
    """`Trainer` under a policy; see `PolicyMixin`.

    Example:
        >>> trainer = PolicyTrainer(model, arguments, train_dataset=train, policy=PolicyTraining(client, target=target))
        >>> trainer.train()
    """


class _Checkpoints(TrainerCallback):
    """Saves the run's part beside each checkpoint."""

    def __init__(self, save: Callable[[Path], None]) -> None:
        self._save = save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        os.makedirs(folder, exist_ok=True)
        self._save(folder)


def _file(process: int) -> str:
    return f"equipoise-{process}.pt"


def _without_ids(inputs: Mapping[str, Any], column: str) -> Any:
    return {name: value for name, value in inputs.items() if name != column}
