"""A callback that weighs the training loss by a policy."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import ArrayLike
from torch import Tensor
from torch.optim import Optimizer

from equipoise.client import PolicyClient
from equipoise.torch.direction import ExampleLoss
from equipoise.torch.errors import CaptureError
from equipoise.torch.processes import num_processes, rank
from equipoise.torch.resume import resume_run, run_state
from equipoise.torch.sampler import WeightedSampler
from equipoise.torch.steps import WeightedStep, WeightedSteps
from equipoise.torch.training import TrainingOptions


class PolicyCallback(Callback):
    """Trains a module under a policy, with automatic optimization.

    `loss` makes the forward pass and gives the weighted mean; the rest happens around it: the target direction is
    refreshed, contributions are taken on the backward pass, statistics are sent with each optimizer step, and nothing
    waits for the network. Lightning's checkpoints hold the run's part, and `fit(ckpt_path=...)` goes on from it.

    Works with accumulated gradients, mixed precision and DistributedDataParallel. Sharded models need
    `TrainingOptions(method="finite_difference")` and as many target batches as there are processes, or a multiple.

    Example:
        >>> policy = PolicyCallback(client, example_losses, target_batches, guard=guard_batches)
        >>> lightning.Trainer(callbacks=[policy]).fit(model, loader)

    Args:
        client: the client of the policy; in a job of several processes each has its own.
        losses: from (module, batch) to the loss of each example, [B].
        target: batches of target A, in the form of the training batches: a list or a loader. Of several processes each
            takes its share.
        guard: batches of guard B, on which only the loss is computed.
        options: how contributions are found and weights are used. With `sampled=True` give `sampler`.
        sampler: the sampler of the training loader, to be kept in checkpoints.

    Attributes:
        client: the client that is in use: after resuming an older checkpoint that of a fork.
    """

    def __init__(
        self,
        client: PolicyClient,
        losses: ExampleLoss,
        target: Iterable[Any],
        *,
        guard: Iterable[Any] | None = None,
        options: TrainingOptions | None = None,
        sampler: WeightedSampler | None = None,
    ) -> None:
        self.client = client
        self._losses = losses
        self._target = target
        self._guard = guard
        self._options = options or TrainingOptions()
        self._sampler = sampler
        self._steps: WeightedSteps | None = None
        self._step: WeightedStep | None = None
        self._resumed: dict[str, Any] | None = None
        self._training = False

    def loss(self, ids: ArrayLike, batch: Any) -> Tensor:
        """The weighted mean loss of a batch: what `training_step` returns.

        Args:
            ids: the example of each row: integers [B].
            batch: the batch.

        Raises:
            CaptureError: outside of `fit`, or twice in one training step.
        """
        if self._steps is None or not self._training:
            raise CaptureError("PolicyCallback: must be among the callbacks of the trainer, and in use within fit")
        if self._step is not None:
            raise CaptureError("PolicyCallback.loss: must be called once in a training step, and its loss returned")
        self._step = self._steps.capture(ids)
        self._step.__enter__()
        return self._step.loss(batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the target direction, and goes on from a checkpoint."""
        if not pl_module.automatic_optimization:
            raise CaptureError("PolicyCallback: needs automatic optimization; use WeightedSteps in a loop of your own")
        direction = self._options.direction(
            pl_module,
            self._losses,
            _share(self._target, trainer, pl_module),
            guard=None if self._guard is None else _share(self._guard, trainer, pl_module),
            optimizer=trainer.optimizers[0] if trainer.optimizers else None,
            accumulate=trainer.accumulate_grad_batches,
        )
        if self._resumed is not None:
            self.client = resume_run(self.client, self._resumed, direction=direction, sampler=self._sampler)
            self._resumed = None
        self._steps = self._options.steps(self.client, pl_module, direction)
        self._training = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The statistics of a batch are known."""
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(None, None, None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The statistics of all accumulated batches are known: they are sent."""
        if self._steps is not None and self._training:
            self._steps.submit(step=trainer.global_step + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing more is weighted."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """No hook stays on the module."""
        self._close(exception)

    def state_dict(self) -> dict[str, Any]:
        """The run's part of a checkpoint."""
        if self._steps is None:
            return {}
        direction = self._steps.contributions.direction
        return run_state(self.client, direction=direction, sampler=self._sampler, keep=self._options.keep)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it for the start of the training."""
        self._resumed = state_dict or None

    def _close(self, error: BaseException | None = None) -> None:
        self._training = False
        step, self._step = self._step, None
        if step is not None:
            step.capture.__exit__(None if error is None else type(error), error, None)


def _share(batches: Iterable[Any], trainer: Trainer, module: LightningModule) -> list[Any]:
    """This process's batches, on its device."""
    own = list(batches)[rank() :: num_processes()]
    return [trainer.strategy.batch_to_device(batch, module.device) for batch in own]
