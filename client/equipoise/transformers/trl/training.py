"""TRL's trainers under a policy: what they need beside `PolicyMixin`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from equipoise.errors import InvalidRequestError
from equipoise.torch.step import WeightedStep
from equipoise.transformers.data import ID, TrainingData
from equipoise.transformers.trl.head import check_kernel, observed_head
from equipoise.transformers.trl.objectives import OBJECTIVES, Objective
from equipoise.transformers.trl.packing import LENGTHS, SegmentCollator, packed

OLDEST = 1, 16
"""Of TRL's versions."""


class TrlTraining:
    """One of TRL's trainers: ids and target data through its preparation of datasets, its loss example by example.

    With all weights 1 the model is trained as TRL trains it, bit for bit: the batch's loss is
    `Σ weight·share·loss`, where an example's share is what it counts for in TRL's own loss. For SFT that is its number
    of predicted tokens over that of all (TRL's mean is over tokens), for pairs one over their number. Statistics are
    of the example's own loss, which is no matter of its batch: SFT's the mean over its tokens, a pair's what TRL says
    of a batch of this pair alone. An example cut into several segments by packing has a row for each.

    Args:
        trainer: the trainer, before its own constructor.
        names: the classes of TRL that it is made of, the nearest first.
        column: column of the ids.
        custom: whether the loss of each example is given by the user.
    """

    def __init__(self, trainer: Any, names: list[str], *, column: str, custom: bool) -> None:
        self._trainer = trainer
        self._name = names[0]
        self._supervised = "SFTTrainer" in names
        self._column = column
        self._custom = custom
        self._data: TrainingData | None = None
        self._objective: Objective | None = None
        self._prepare: Callable[..., Any] | None = None

    def prepare(self, prepare: Callable[..., Any], data: TrainingData, given: tuple[Any, ...]) -> Any:
        """The training dataset as TRL prepares it, with ids.

        Args:
            prepare: TRL's own method.
            data: the dataset as it was given, with ids.
            given: the method's other arguments.
        """
        self._data, dataset = data, data.dataset
        if self._supervised and given[1].packing and given[1].max_length is not None:
            return packed(prepare, dataset, given)
        return prepare(dataset, *given)

    def begin(self, prepare: Callable[..., Any] | None, compute_loss: Callable[..., Any]) -> TrainingData:
        """After the trainer's own constructor; returns its dataset, with ids.

        Args:
            prepare: TRL's own `_prepare_dataset`, if it has one.
            compute_loss: TRL's own `compute_loss`.

        Raises:
            InvalidRequestError: under the trainer's settings no loss is an example's own.
        """
        self._prepare = prepare
        trainer = self._trainer
        if (trainer.args.gradient_checkpointing_kwargs or {}).get("selective"):
            raise InvalidRequestError(
                field="gradient_checkpointing_kwargs",
                value="selective",
                rule="allows one backward pass a step, where the first under a policy is looked at by several: leave "
                "it out, for gradient_checkpointing=True alone",
            )
        if not self._custom:
            _check_version()
            check_kernel()
            if self._name not in OBJECTIVES:
                raise InvalidRequestError(
                    field="losses",
                    rule=f"must be given for {self._name}, from (model, batch) to the loss of each example; known are "
                    f"those of {', '.join(OBJECTIVES)}",
                )
            self._objective = OBJECTIVES[self._name](trainer, compute_loss)
            self._objective.check()
        flat = self.weighs and bool(getattr(trainer, "padding_free", False))
        trainer.data_collator = SegmentCollator(trainer.data_collator, self._column, flat=flat)
        return self._prepared()

    def _prepared(self) -> TrainingData:
        """The trainer's dataset, with ids."""
        trainer, given = self._trainer, self._data
        if given is None:  # it was not prepared
            return trainer._numbered(trainer.train_dataset)  # type: ignore[no-any-return]
        dataset = trainer.train_dataset
        by_place = given.by_place and list(dataset[ID]) == list(range(len(dataset)))
        return TrainingData(dataset=dataset, keys=given.keys, by_place=by_place)

    def wanted(self, field: str, dataset: Any) -> Any:
        """A target or guard dataset, in the form of the training dataset, as the trainer takes it; not packed.

        Args:
            field: its name.
            dataset: the dataset; a list of examples, too.
        """
        from datasets import Dataset

        trainer = self._trainer
        if isinstance(dataset, list | tuple) and dataset:
            dataset = Dataset.from_list(list(dataset))
        if not isinstance(dataset, Dataset) or not len(dataset):
            return dataset  # refused where its batches are made
        ready = {"input_ids", "prompt_ids", "chosen_ids"} & set(dataset.column_names)
        if self._prepare is not None and not ready and not getattr(trainer, "_skip_prepare_dataset", False):
            middle = (False, trainer._formatting_func) if self._supervised else ()
            dataset = self._prepare(dataset, trainer.processing_class, trainer.args, *middle, field)
        if getattr(trainer, "precompute_ref_logps", False) and "ref_chosen_logps" not in dataset.column_names:
            size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_train_batch_size
            dataset = trainer._precompute_ref_logps(dataset, field, size)
        return dataset

    @property
    def prepared(self) -> bool:
        """Whether the training dataset was prepared."""
        return self._data is not None

    @property
    def weighs(self) -> bool:
        """Whether TRL's own loss is weighed."""
        return self._objective is not None

    def losses(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """The loss of each example, nats: float [B]."""
        assert self._objective is not None
        return self._objective.losses(model, batch)

    def loss(self, step: WeightedStep, batch: Mapping[str, Any], num_items: Any) -> Tensor:
        """The weighted loss of a batch; TRL takes its own metrics from the same forward pass.

        Args:
            step: the step.
            batch: the batch, without ids.
            num_items: predicted tokens of all batches of an optimizer's step.
        """
        assert self._objective is not None
        shares = self._objective.shares(batch, num_items)
        with self._objective.keeping():
            losses = step.capture.losses(batch)
        self._objective.note(num_items, (shares * losses.detach()).sum())
        return step.combine(losses, shares).float()

    @contextmanager
    def observed(self) -> Iterator[None]:
        """While it lasts, TRL's fused head is seen by hooks."""
        with observed_head(self._trainer.model) if self.weighs else nullcontext():
            yield


def trl_training(trainer: Any, *, column: str, custom: bool) -> TrlTraining | None:
    """What a trainer needs that is one of TRL's, or made of one; None: it is not."""
    kinds = [kind for kind in type(trainer).__mro__ if kind.__module__.startswith("trl.")]
    names = [kind.__name__ for kind in kinds if not kind.__name__.startswith("_")]
    if not names:
        return None
    return TrlTraining(trainer, names, column=column, custom=custom)


def _check_version() -> None:
    import trl

    version: str = trl.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        rule = "must be 1.16 or newer, which gives the log-probability of each token; or give PolicyTraining.losses"
        raise InvalidRequestError(field="trl", value=version, rule=rule)


def without_lengths(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as TRL's collator gave it."""
    return {name: value for name, value in batch.items() if name != LENGTHS}
