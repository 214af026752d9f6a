"""Trainers whose training loss is weighted by a policy."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from equipoise.client import PolicyClient
from equipoise.errors import InvalidRequestError, PolicyNotFoundError, UnavailableError, require
from equipoise.keys import ExampleKeys
from equipoise.torch.batches import HostBatches
from equipoise.torch.direction import ExampleLoss
from equipoise.torch.mixture import Mixture
from equipoise.torch.processes import rank
from equipoise.torch.sampler import WeightedSampler
from equipoise.torch.step import WeightedStep
from equipoise.torch.steps import WeightedSteps
from equipoise.torch.training import TrainingOptions
from equipoise.transformers.data import GROUP, ID, IdCollator, TrainingData, own_batches, with_ids
from equipoise.transformers.losses import model_losses, output_losses
from equipoise.transformers.mixed import MixedTraining
from equipoise.transformers.trl.training import trl_training, without_lengths

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


@dataclass(frozen=True, slots=True)
class PolicyTraining:
    """What a trainer needs to train under a policy.

    Attributes:
        client: the client of the policy; in a job of several processes each has its own.
        target: dataset of target A, in the form of the training dataset, for TRL's trainers raw data too: what the
            model shall be good at. 64 sequences or more; they are never trained on here.
        guard: dataset of guard B, from the same source, on which only the loss is computed.
        losses: from (model, batch) to the loss of each example, [B]; default: what fits the model, see `model_losses`.
        id_column: column of the training dataset with the ids, integers, or with names, strings, which get ids by
            `ExampleKeys`; examples of one id, or name, share a weight. Without it an example's id is its place.
        group_column: column of the training dataset with the group of each example, such as its label or source:
            integers below the policy's setting `groups`, for rule `strata`. Not for TRL's trainers.
        keys: the names of the policy's examples, if names are not all in the column, or it cannot be read as a whole,
            as in a stream.
        options: how contributions are found and weights are used.
        mixture: draws the rows of `train_dataset`, which is its `dataset`: the policy's examples are its sources, and
            losses are not weighed. Checkpoints hold where it stands. Not for TRL's trainers.
    """

    client: PolicyClient
    target: Any
    guard: Any = field(default=None, kw_only=True)
    losses: ExampleLoss | None = field(default=None, kw_only=True)
    id_column: str = field(default="example_id", kw_only=True)
    group_column: str | None = field(default=None, kw_only=True)
    keys: ExampleKeys | None = field(default=None, kw_only=True)
    options: TrainingOptions = field(default_factory=TrainingOptions, kw_only=True)
    mixture: Mixture | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.mixture is not None and not self.options.sampled:
            object.__setattr__(self, "options", replace(self.options, sampled=True))


class PolicyMixin(_Base):
    """Makes a `Trainer`, or a trainer made of it, train under a policy: `class MyTrainer(PolicyMixin, SFTTrainer)`.

    The training loss is the mean over examples of weight times loss, where a sequence's loss is the mean over its
    tokens; evaluation is as ever. Statistics are sent after each step, and nothing waits for the network. The policy's
    metrics are logged as `policy/...` beside the trainer's. Checkpoints hold the run's part (`equipoise-<rank>.pt`),
    and `train(resume_from_checkpoint=...)` goes on from it.

    A trainer's own `compute_loss` is used, with all that it notes, and its loss is weighed where it comes from: in
    `Trainer.compute_loss`, or a `compute_loss_func`. One that computes its loss otherwise is refused, unless
    `PolicyTraining.losses` is given, which then is what is trained on, or unless it ends in `self.weigh`:

        >>> class MyTrainer(PolicyMixin, Trainer):
        ...     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ...         outputs = model(**inputs)
        ...         loss = self.weigh(my_losses(outputs, inputs))  # [B]; in evaluation their mean
        ...         return (loss, outputs) if return_outputs else loss

    TRL's `SFTTrainer`, `DPOTrainer` and `RewardTrainer` train as TRL trains them where weights are 1, bit for bit:
    the loss is `Σ weight·share·loss`, in which an example of SFT counts by its tokens and a pair as any other. An id is
    the place in the dataset as it was given, and survives packing: in a packed row each example has its own weight. See
    `equipoise.transformers.trl.training`.

    Works with gradient accumulation, mixed precision, gradient checkpointing, DistributedDataParallel, and with FSDP 2
    by `options=TrainingOptions(method="finite_difference")`.

    Args:
        policy: the policy and the data it aims at.

    Attributes:
        policy_client: the client that is in use: after resuming an older checkpoint that of a fork.
        example_keys: the names of the examples, if they have names; they are in `equipoise-keys.csv` of the output
            folder, too, for `equipoise policy weights NAME --keys FILE`.
    """

    data_collator: Any
    train_dataset: Any

    def __init__(self, *args: Any, policy: PolicyTraining, **kwargs: Any) -> None:
        self._policy = policy  # TRL's trainers prepare their datasets before they are trainers
        self._trl = trl_training(self, column=policy.id_column, custom=policy.losses is not None)
        self._mixed: MixedTraining | None = None
        if policy.mixture is not None and self._trl is not None:
            rule = "is not for TRL's trainers, whose rows hold several examples or pairs"
            raise InvalidRequestError(field="mixture", rule=rule)
        super().__init__(*args, **kwargs)
        self.policy_client = policy.client
        self._steps: WeightedSteps | None = None
        self._step: WeightedStep | None = None
        self._resume_from: str | None = None
        self._weighted_sampler: WeightedSampler | Mixture | None = None
        self._check_loss()
        if policy.mixture is not None:
            self._mixed = MixedTraining(policy.mixture, self.train_dataset, id_column=policy.id_column)
            self.add_callback(self._mixed)
        data = (
            self._numbered(self.train_dataset)
            if self._trl is None
            else self._trl.begin(getattr(super(), "_prepare_dataset", None), super().compute_loss)
        )
        self.train_dataset, self.example_keys = data.dataset, data.keys
        if policy.options.sampled and policy.mixture is None and data.dataset is not None and not data.by_place:
            rule = (
                "draws places of a dataset with a length, and an example's id must be its place: no "
                f"{policy.id_column}, and no rows of TRL that are packed, shuffled, or were dropped"
            )
            raise InvalidRequestError(field="sampled", value="True", rule=rule)
        if self._trl is None:
            super()._set_signature_columns_if_needed()
            kept = policy.group_column in (self._signature_columns or ())
            self.data_collator = IdCollator(
                self.data_collator, policy.id_column, group=policy.group_column, keep_group=kept
            )
        elif policy.group_column is not None:
            rule = "is not for TRL's trainers, whose rows hold several examples or pairs; let the policy have one group"
            raise InvalidRequestError(field="group_column", value=repr(policy.group_column), rule=rule)
        self._target, self._guard = self._wanted("target", policy.target), self._wanted("guard", policy.guard)
        self.add_callback(_Checkpoints(self._save_run))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`."""
        self._steps = None
        if resume_from_checkpoint is True:
            self._resume_from = get_last_checkpoint(str(self.args.output_dir))  # type: ignore[no-untyped-call]
        else:
            self._resume_from = resume_from_checkpoint or None
        if self._mixed is not None:
            self._mixed.begin(None if self._resume_from is None else _saved(self._resume_from)["sampler"])
        try:
            with nullcontext() if self._trl is None else self._trl.observed():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            steps: WeightedSteps | None = self._steps  # made by the first step
            if steps is not None:
                steps.close()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As in `Trainer`."""
        if self._steps is None:
            self._steps = self._begin(model)
        with self._steps.capture(self._ids(inputs), groups=inputs.get(GROUP)) as step, self._weighing(step):
            # A mean over examples is divided by the number of accumulated batches, not by that of tokens.
            num_items = num_items_in_batch if self._weighs_trl else None
            batch = _without_ids(inputs, self._policy.id_column)
            loss: Tensor = super().training_step(
                model, batch if self._weighs_trl else without_lengths(batch), num_items
            )
            if not step.weighed:
                raise self._unweighed()
        if self._mixed is not None:
            self._mixed.note_batch(self.args.train_batch_size)
        if self.accelerator.sync_gradients:
            self._steps.submit(step=self.state.global_step + 1)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`: the weighted loss in training, the plain one else."""
        if self._step is not None and self._trl is not None and self._weighs_trl:
            return self._trl.loss(self._step, inputs, kwargs.get("num_items_in_batch"))
        if self._step is None or self._weighs_within:
            return super().compute_loss(model, without_lengths(inputs), *args, **kwargs)
        return self._scaled(self._step.loss(inputs))

    def weigh(self, losses: Tensor) -> Tensor:
        """The loss of a batch: in training the weighted mean of the losses of its examples, else their mean.

        Args:
            losses: the loss of each example, [B], for a `compute_loss` of your own.
        """
        return losses.mean() if self._step is None else self._scaled(self._step.weigh(losses))

    def example_losses(self, model: nn.Module, outputs: Any, labels: Any) -> Tensor:
        """The loss of each example from a forward pass, [B]: what is weighed in place of the model's own loss.

        Args:
            model: the model.
            outputs: what it gave.
            labels: the labels of the batch.
        """
        return output_losses(model, outputs, labels)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`."""
        inputs = without_lengths(_without_ids(inputs, self._policy.id_column))
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`: a training's numbers with those of the policy."""
        training = self._steps is not None and "loss" in logs
        mixed = {} if self._mixed is None else self._mixed.mixture.metrics()
        super().log(logs | self._steps.metrics() | mixed if training and self._steps else logs, *args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *given: Any) -> Any:
        """TRL's trainers prepare their datasets by this, that of the training first; the last argument is its name."""
        prepare = super()._prepare_dataset  # type: ignore[misc]
        if self._trl is None or given[-1] != "train" or self._trl.prepared:
            return prepare(dataset, *given)
        return self._trl.prepare(prepare, self._numbered(dataset), given)

    def _numbered(self, dataset: Any) -> TrainingData:
        policy = self._policy
        if self._mixed is not None:
            return self._mixed.data
        if self._trl is not None and getattr(dataset, "_indices", None) is not None:
            dataset = dataset.flatten_indices()  # so that TRL gets a dataset of `datasets`, with a column of ids
        return with_ids(dataset, policy.id_column, num_examples=_num_examples(policy.client), keys=policy.keys)

    def _wanted(self, field: str, dataset: Any) -> Any:
        return dataset if self._trl is None or dataset is None else self._trl.wanted(field, dataset)

    @property
    def _weighs_trl(self) -> bool:
        """Whether the loss of one of TRL's trainers is weighed, rather than one of a class made of it."""
        own = type(self).compute_loss is PolicyMixin.compute_loss
        return own and self._trl is not None and self._trl.weighs

    @property
    def _weighs_within(self) -> bool:
        """Whether the trainer's own forward pass is weighed, rather than one of the policy's."""
        return self._policy.losses is None and self._steps is not None and self._steps.contributions.watches

    @contextmanager
    def _weighing(self, step: WeightedStep) -> Iterator[None]:
        """A training step, whose loss `Trainer` takes as it is: scaled for accumulation already."""
        if self._weighs_trl:
            self._step = step
            try:
                yield
            finally:
                self._step = None
            return
        before = self.compute_loss_func, getattr(self, "loss_is_scaled_for_ga", None)
        self.compute_loss_func, self.loss_is_scaled_for_ga = self._weigh_outputs, True
        self._step = step
        try:
            yield
        finally:
            self._step = None
            self.compute_loss_func, self.loss_is_scaled_for_ga = before

    def _weigh_outputs(self, outputs: Any, labels: Any, **_: Any) -> Tensor:
        """What `Trainer` calls with the outputs of its forward pass."""
        if labels is None:
            raise InvalidRequestError(field="labels", rule="must be in the batches, or give PolicyTraining.losses")
        model: Any = self.model
        return self.weigh(self.example_losses(model, outputs, labels))

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss / self.current_gradient_accumulation_steps

    def _unweighed(self) -> InvalidRequestError:
        owner = next(kind for kind in type(self).__mro__ if kind is not PolicyMixin and "compute_loss" in vars(kind))
        return InvalidRequestError(
            field=f"{owner.__name__}.compute_loss",
            rule="computes a loss of its own, which cannot be weighed: give PolicyTraining.losses, the loss of each "
            "example from (model, batch), to train on, or let it end in `self.weigh(losses)`",
        )

    def _begin(self, model: nn.Module) -> WeightedSteps:
        policy, options = self._policy, self._policy.options
        losses = model_losses if self._trl is None else self._trl.losses
        if self._resume_from is not None:
            self.policy_client = policy.client
        steps = options.steps(
            self.policy_client,
            model,
            policy.losses or losses,
            self._batches("target", self._target),
            guard=None if self._guard is None else self._batches("guard", self._guard),
            optimizer=self.optimizer,
            accumulate=self.args.gradient_accumulation_steps,
            by_trainer=True,
        )
        own = super().compute_loss.__func__ is not Trainer.compute_loss  # type: ignore[attr-defined]
        if own and policy.losses is None and not self._weighs_trl and not steps.contributions.watches:
            raise self._unweighed()
        if self._resume_from is not None:
            state = _saved(self._resume_from)
            names, rule = self._names(), "the names are not those of the checkpoint, where ids stood for other examples"
            require(state.get("names") == names, field=policy.id_column, value=names, rule=rule)
            self.policy_client = steps.resume(state)
        if self.example_keys is not None and rank() == 0:
            os.makedirs(str(self.args.output_dir), exist_ok=True)
            self.example_keys.save(Path(str(self.args.output_dir)) / "equipoise-keys.csv")
        if self._weighted_sampler is not None:
            self._weighted_sampler.client = self.policy_client
        return steps

    def _batches(self, name: str, dataset: Any) -> HostBatches:
        collate = self._get_collator_with_removed_columns(self.data_collator, description=name)
        size, move = self.args.train_batch_size, self._prepare_inputs
        return own_batches(name, dataset, batch_size=size, collate=collate, move=move)

    def _ids(self, inputs: Mapping[str, Any]) -> Any:
        column = self._policy.id_column
        if column not in inputs:
            rule = "the ids were lost: was train_dataset exchanged, or does a collator make other rows of the examples?"
            raise InvalidRequestError(field=column, rule=rule)
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
        wanted = (self._policy.id_column, self._policy.group_column, ID)
        columns += [column for column in wanted if column is not None and column not in columns]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if not self._policy.options.sampled:
            return super()._get_train_sampler(*args, **kwargs)
        if self._policy.mixture is not None:
            self._weighted_sampler = self._policy.mixture
        else:
            self._weighted_sampler = WeightedSampler(self.policy_client, len(self.train_dataset), seed=self.args.seed)
        return self._weighted_sampler

    def _names(self) -> str | None:
        return None if self.example_keys is None else self.example_keys.fingerprint

    def _save_run(self, folder: Path) -> None:
        if self._steps is not None:
            mixed = {} if self._mixed is None else self._mixed.fields()
            state = self._steps.state(keep=self._policy.options.keep, **mixed)
            torch.save(state | {"names": self._names()}, folder / _file(rank()))


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


def _saved(folder: str) -> Mapping[str, Any]:
    """What a checkpoint holds of the run; of a process that has none of its own, that of the first."""
    path = Path(folder) / _file(rank())
    path = path if path.exists() else Path(folder) / _file(0)
    state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _num_examples(client: PolicyClient) -> int | None:
    """N of a client's policy; None: nobody can say yet."""
    try:
        return client.num_examples or client.status().spec.num_examples
    except (UnavailableError, PolicyNotFoundError):
        return None


def _without_ids(inputs: Mapping[str, Any], column: str) -> Any:
    return {name: value for name, value in inputs.items() if name not in (column, GROUP)}
