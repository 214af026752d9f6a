"""A callback that weighs the training loss by a policy."""

from collections.abc import Iterable
from typing import Any, Self

from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import ArrayLike
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler

from equipoise.client import PolicyClient
from equipoise.errors import require
from equipoise.torch.batches import HostBatches
from equipoise.torch.direction import ExampleLoss
from equipoise.torch.errors import CaptureError
from equipoise.torch.mixture import Mixture
from equipoise.torch.processes import num_processes, rank
from equipoise.torch.resume import resume_run
from equipoise.torch.sampler import DistributedWeightedSampler, WeightedSampler
from equipoise.torch.step import WeightedStep
from equipoise.torch.steps import WeightedSteps
from equipoise.torch.training import TrainingOptions


class PolicyCallback(Callback):
    """Trains a module under a policy, with automatic optimization.

    In `training_step`, `loss` makes the forward pass and gives the weighted mean, or `weigh` takes the losses of a
    forward pass of yours. The rest happens around it: the target direction is refreshed, contributions are taken on the
    backward pass, statistics are sent with each optimizer step, and nothing waits for the network. A `training_step`
    that returns None skips its batch. The policy's metrics are logged as `policy/...` beside yours. Lightning's
    checkpoints hold the run's part, and `fit(ckpt_path=...)` goes on from it.

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
        sampler: the sampler of the training loader, to be kept in checkpoints: the ids that workers took ahead of the
            step are given again. Of several processes a `DistributedWeightedSampler`, or a `Mixture`; in a
            `batch_sampler=` it needs `Trainer(use_distributed_sampler=False)`.

    Lightning itself begins a loader anew when it resumes in mid-epoch, unless the loader has a state, as torchdata's
    `StatefulDataLoader` has: what is trained on then is left to it, and each row has the weight of its id.

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
        sampler: WeightedSampler | Mixture | None = None,
    ) -> None:
        self.client = client
        self._losses = losses
        self._target = target
        self._guard = guard
        self._options = options or TrainingOptions()
        rule = "needs PolicyCallback.sampler, the one that draws: it must be the `sampler=` of the training loader"
        require(sampler is not None or not self._options.sampled, field="sampled", value=True, rule=rule)
        self._sampler = sampler
        self._trained: int | None = None
        self._steps: WeightedSteps | None = None
        self._step: WeightedStep | None = None
        self._fitting = False
        self._resumed: dict[str, Any] | None = None

    def loss(self, ids: ArrayLike, batch: Any, *, groups: ArrayLike | None = None) -> Tensor:
        """The weighted mean loss of a batch, from its forward pass: what `training_step` returns.

        Args:
            ids: the example of each row: integers [B].
            batch: the batch.
            groups: the group of each row's example, such as its label or source: integers [B], for rule `strata`.

        Raises:
            CaptureError: outside of `fit`, or twice in one training step.
        """
        return self._weighing("loss").loss(batch, ids=ids, groups=groups)

    def weigh(self, ids: ArrayLike, losses: Tensor, *, groups: ArrayLike | None = None) -> Tensor:
        """The weighted mean of losses from a forward pass that `training_step` has made: what it returns.

        Args:
            ids: the example of each row: integers [B].
            losses: the loss of each example, [B].
            groups: as in `loss`.

        Raises:
            CaptureError: outside of `fit`, twice in one training step, or by a method that makes a forward pass of its
                own: `jvp` and `finite_difference` need `loss`.
        """
        return self._weighing("weigh").weigh(losses, ids=ids, groups=groups)

    def discard(self) -> None:
        """Nothing more of this batch is sent; `training_step` may return a loss that is none of the policy's."""
        self._begun("discard").discard()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Whether there will be training; else the run is left alone by the checkpoint."""
        self._fitting = stage == "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the target direction, and goes on from a checkpoint."""
        if not pl_module.automatic_optimization:
            raise CaptureError("PolicyCallback: needs automatic optimization; use WeightedSteps in a loop of your own")
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise CaptureError(
                f"{type(pl_module).__name__}: is compiled with its training_step, where the policy is; compile the "
                'networks in it (`self.net = torch.compile(self.net)`), and give TrainingOptions(method="jvp")'
            )
        self._check_sampler(trainer)
        self._steps = self._options.steps(
            self.client,
            pl_module,
            self._losses,
            _share(self._target, trainer, pl_module),
            guard=None if self._guard is None else _share(self._guard, trainer, pl_module),
            optimizer=trainer.optimizers[0] if trainer.optimizers else None,
            accumulate=trainer.accumulate_grad_batches,
            by_trainer=True,
        )
        if self._resumed is not None:
            self._steps.contributions.direction.load_state_dict(self._resumed["direction"])
            self._steps.batches = self._resumed.get("batches", 0)
            self._resumed = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch begins."""
        if self._sampler is not None and not self._sampler.epoch:
            raise CaptureError(
                "PolicyCallback.sampler: nothing was drawn from it: it must be the `sampler=` of the training loader"
            )
        size = getattr(trainer.train_dataloader, "batch_size", None)
        self._trained = None if size is None or trainer.is_last_batch else (batch_idx + 1) * size
        if self._steps is not None:
            with trainer.precision_plugin.train_step_context():  # a refresh may be due
                self._step = self._steps.begin()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The statistics of a batch are known."""
        step = self._step
        if step is None:
            return
        if not (step.weighed or step.over):
            raise CaptureError(
                f"{type(pl_module).__name__}.training_step: must return policy.loss(ids, batch) or "
                "policy.weigh(ids, losses), or call policy.discard() where a batch is none of the policy's"
            )
        step.end()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The statistics of all accumulated batches are known: they are sent."""
        if self._steps is not None and self._step is not None:
            self._steps.submit(step=trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch is over, and the policy's metrics are logged; without a backward pass it was skipped."""
        step, self._step = self._step, None
        if step is not None and self._steps is not None:
            step.end()
            if _logs_now(trainer):
                mixed = self._sampler.metrics() if isinstance(self._sampler, Mixture) else {}
                pl_module.log_dict(self._steps.metrics() | mixed, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing more is weighted."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """No hook stays on the module."""
        if self._step is not None:
            self._step.discard()
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The run's part of a checkpoint."""
        if self._steps is None:
            return {}
        return self._steps.state(sampler=self._sampler, trained=self._trained, keep=self._options.keep)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from it; what needs the module waits for the start of the training.

        The sampler does not: workers of the loader take ids from it before.
        """
        if state_dict and self._fitting:
            self._resumed = state_dict
            self.client = resume_run(self.client, state_dict, sampler=self._sampler)

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: copies of a module, for averages of weights, have the policy of the module."""
        return self

    def _check_sampler(self, trainer: Trainer) -> None:
        """Of a loader with a `batch_sampler=` Lightning exchanges the sampler within it, and says nothing."""
        found: Any = getattr(trainer.train_dataloader, "sampler", None)
        ours = isinstance(self._sampler, DistributedWeightedSampler | Mixture)
        if ours and isinstance(found, DistributedSampler) and found is not self._sampler:
            raise CaptureError(
                f"PolicyCallback.sampler: {type(found).__name__} was put in its place by Lightning, as of a "
                "`batch_sampler=`: give lightning.Trainer(use_distributed_sampler=False)"
            )

    def _begun(self, what: str) -> WeightedStep:
        if self._step is None:
            raise CaptureError(
                f"PolicyCallback.{what}: must be called in training_step, by a trainer that has it among its callbacks"
            )
        return self._step

    def _weighing(self, what: str) -> WeightedStep:
        step = self._begun(what)
        if step.weighed:
            raise CaptureError(f"PolicyCallback.{what}: must be called once in a training step, and its loss returned")
        return step

    def _close(self) -> None:
        self._step = None
        if self._steps is not None:
            self._steps.close()


def _logs_now(trainer: Trainer) -> bool:
    """Whether what is logged on this step is written: to log a dozen numbers costs a millisecond."""
    connector = getattr(trainer, "_logger_connector", None)  # Lightning says it nowhere else
    return bool(getattr(connector, "should_update_logs", True)) or bool(getattr(trainer, "fast_dev_run", False))


def _share(batches: Iterable[Any], trainer: Trainer, module: LightningModule) -> HostBatches:
    """This process's batches, on its device when they are used."""
    own = list(batches)[rank() :: num_processes()]
    return HostBatches(own, lambda batch: trainer.strategy.batch_to_device(batch, module.device))
