"""A mixture's part in a training of `Trainer`, which takes batches ahead of the step and skips them when it resumes."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from equipoise.errors import require
from equipoise.torch.mixture import Mixture
from equipoise.torch.processes import num_processes
from equipoise.transformers.data import Column, Numbered, TrainingData


class MixedTraining(TrainerCallback):
    """Where one training stands in a mixture.

    Args:
        mixture: the mixture.
        dataset: what is to be trained on.
        id_column: where its rows have the ids of their sources.

    Raises:
        InvalidRequestError: these do not belong together.
    """

    def __init__(self, mixture: Mixture, dataset: Any, *, id_column: str) -> None:
        rule = "must be `mixture.dataset` of PolicyTraining.mixture"
        require(dataset is mixture.dataset, field="train_dataset", value=dataset, rule=rule)
        rule = f"must be that of the mixture, {mixture.dataset.id_column!r}"
        require(id_column == mixture.dataset.id_column, field="id_column", value=id_column, rule=rule)
        self.mixture = mixture
        self.data = TrainingData(dataset=Numbered(dataset, Column(id_column, None)))
        self._trained = 0
        self._resumed = False

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """A training begins; or goes on from what `fields` made of a checkpoint."""
        self._trained, self._resumed = 0, False
        if state is not None:
            self.mixture.load_state_dict(state)
            self._trained, self._resumed = state["position"], state["position"] < state["total"]

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch begins, or the rest of one."""
        self._trained = self._trained if self._resumed else 0
        self._resumed = False

    def note_batch(self, size: int) -> None:
        """A batch of this size was trained on in each process."""
        self._trained += size * num_processes()

    def fields(self) -> dict[str, Any]:
        """For `WeightedSteps.state`: what is to be kept, and how much of it was trained on."""
        return {"sampler": self.mixture, "trained": min(self._trained, self.mixture.given)}
