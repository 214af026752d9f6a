"""Where learning should go: the gradient of the target loss."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from math import inf, isfinite
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.torch.errors import DirectionError
from equipoise.torch.gradients import GradientAverage, Noise, Signs
from equipoise.torch.losses import LossMean
from equipoise.torch.preconditioner import AdamPreconditioner
from equipoise.torch.processes import (
    Group,
    is_accumulating,
    num_averaged,
    num_replicas,
    scratch_gradients,
    sharded_modules,
    total,
    unwrapped,
    whole,
    world,
)
from equipoise.torch.quiet import ModelState, evaluating
from equipoise.torch.rows import precise
from equipoise.torch.vectors import load_vectors, named_vectors

_log = logging.getLogger(__name__)

T = TypeVar("T")

_SCALE = 1024.0
"""What a loss is multiplied by where gradients are float16, as a GradScaler does."""

ExampleLoss: TypeAlias = Callable[[Any, Any], Tensor]
"""From a model and a batch to the loss of each example, nats: [B]."""


class TargetDirection:
    """The gradient of the mean loss on target examples, refreshed as training goes on.

    It is computed with `torch.autograd.grad` in evaluation mode: `.grad`, the optimizer, the modes of modules and the
    random generators are left alone.

    Several processes: a model in DistributedDataParallel is looked at without its wrapper. With a `group` each process
    gives target and guard batches of its own, and all get the direction of all of them; every process must then make
    the same captures. The parts of a sharded model (`fully_shard`) always refresh together, with equally many batches,
    and not while gradients are accumulated unreduced: a refresh that is due then waits.

    Example:
        >>> def example_losses(model, batch):
        ...     return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        >>> direction = TargetDirection(model, example_losses, target_loader, guard_batches=guard_loader)

    Args:
        model: the model in training.
        losses: from (model, batch) to the loss of each example, [B].
        target_batches: batches of target A: a list or a loader, anything that can be iterated again and again. 64
            sequences or more: with fewer the direction is mostly noise, however fresh it is.
        refresh_every: captures between two refreshes. Early in a training, while everything moves, a fresher direction
            ranks examples better; beyond 10 steps age makes little difference, and a larger target set is the better
            use of the same time (measured: tests/benchmarks/RESULTS.md). With gradient accumulation each micro-batch
            is a capture.
        preconditioner: the Adam optimizer of the job: the direction is then where its step would lead.
        guard_batches: batches of guard B, on which nothing but `guard_loss` is computed: at each refresh, unless
            `WeightedSteps` measures it every so many batches.
        batches_per_refresh: how many target batches one refresh takes, in turn; default: all of them.
        momentum: share of the direction before that a refresh keeps, in [0, 1); of fewer target examples than others
            had a refresh keeps more, so that all count alike. Part of a fresh direction swings with
            the model from step to step and makes all examples seem harmful, then useful; the average keeps what lasts.
        group: the processes that share the work, such as `torch.distributed.group.WORLD`; default: each works alone.
        norm_matched: the direction is V − (V·ḡ / ḡ·ḡ)·ḡ, V the gradient of the target loss and ḡ the average of the
            training gradients: along it a contribution says what an example does for the target at equal step length,
            since longer steps along what all examples share are no merit of one. ḡ is read from `.grad` when a step of
            a torch optimizer is over, and the direction follows it from step to step: see `GradientAverage`. Before the
            first step nothing is scored. Takes the memory of the trainable parameters twice more.
        step_noise: κ of norm-matched contributions. A step is as long as its gradient g, not as ḡ, and an example's own
            gradient is a part of g: with q the average of |g|² and s what the loss of one example is multiplied by, a
            contribution is V·∇l − (V·ḡ/q)·(ḡ·∇l + κ·s·|∇l|²). Examples with long gradients that point nowhere make
            steps longer too. 0: they are V·∇l − (V·ḡ / ḡ·ḡ)·ḡ·∇l. |∇l|² is estimated by (∇l·r)², r random signs.
            Where this can be seen: by `GhostContributions`, `OnePassContributions` and `JvpContributions`; others
            leave it out. So do optimizers that step before the capture ends, since clipping and scaling are not told
            apart then; gradients that the loop reduces over processes itself must be reduced before it ends.
        look_every: refreshes between two with a close look: the loss on guard B is measured, plain contributions are
            found beside norm-matched ones, and contributions compared with the gradient.

    Attributes:
        example_losses, look_every: as given.
        vectors: the direction by parameter, in float32 or better; empty before the first refresh.
        plain: V by parameter: the same, unless it is norm-matched.
        target_loss: mean loss on target A at the last refresh, nats: a tensor without dimensions.
        guard_loss: mean loss on guard B at the last refresh, nats; None where it was not measured then.
        age: captures since the last refresh.
        unusable: target and guard losses that were left out because they were not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: ExampleLoss,
        target_batches: Iterable[Any],
        *,
        refresh_every: int = 10,
        preconditioner: Optimizer | None = None,
        guard_batches: Iterable[Any] | None = None,
        batches_per_refresh: int | None = None,
        momentum: float = 0.0,
        group: Group = None,
        norm_matched: bool = False,
        step_noise: float = 0.0,
        look_every: int = 1,
    ) -> None:
        _check_repeatable("target_batches", target_batches)
        _check_repeatable("guard_batches", guard_batches)
        _check_positive("refresh_every", refresh_every)
        _check_positive("look_every", look_every)
        if batches_per_refresh is not None:
            _check_positive("batches_per_refresh", batches_per_refresh)
        if not 0.0 <= momentum < 1.0:
            raise DirectionError(f"momentum = {momentum}: must be in [0, 1)")
        if not 0.0 <= step_noise < inf:
            raise DirectionError(f"step_noise = {step_noise}: must be finite and not negative")
        if step_noise and not norm_matched:
            raise DirectionError(
                f"step_noise = {step_noise}: is for norm-matched contributions: give norm_matched=True"
            )
        self.model = model
        self.example_losses = losses
        self.vectors: dict[nn.Parameter, Tensor] = {}
        self.plain: dict[nn.Parameter, Tensor] = {}
        self.target_loss: Tensor | None = None
        self.guard_loss: Tensor | None = None
        self.age = 0
        self.unusable = 0
        self._target = target_batches
        self._guard = guard_batches
        self._guards = True
        """Whether refreshes measure the loss on guard B."""
        self._refresh_every = refresh_every
        self._precondition = None if preconditioner is None else AdamPreconditioner(preconditioner)
        self._batches_per_refresh = batches_per_refresh
        self._momentum = momentum
        self._turn: Iterator[Any] = iter(())
        self._taken = 0
        self._due = False
        self._parameters: list[nn.Parameter] = []
        self._differentiates: bool | None = None
        self._group = group
        self._average: GradientAverage | None = None
        if norm_matched:
            self._average = GradientAverage(model, scaled=self._precondition, noisy=step_noise > 0)
        self._step_noise = step_noise
        self.look_every = look_every
        self._refreshes = 0
        self._signs = Signs()
        self._largest = 0
        """Target examples of the largest refresh."""

    @property
    def norm_matched(self) -> bool:
        """Whether contributions are norm-matched."""
        return self._average is not None

    @property
    def ready(self) -> bool:
        """Whether contributions along it can be used: norm-matched ones not before a step of the optimizer."""
        return self._average is None or self._average.known

    def note_gradients(self) -> None:
        """Reads the training gradients from `.grad`: to be called before they are cleared, once for each update of the
        parameters that no torch optimizer makes. Without `norm_matched` nothing is read."""
        if self._average is not None:
            self._average.note(self.model.parameters())

    @property
    def looks_closely(self) -> bool:
        """Whether the last refresh is one with a close look: see `look_every`."""
        return (self._refreshes - 1) % self.look_every == 0

    def note_backward(self, multiplier: Tensor) -> None:
        """A captured backward pass is over.

        Args:
            multiplier: the mean of what the losses of its examples were multiplied by in it, without dimensions.
        """
        if self._average is not None:
            self._average.note_backward(multiplier / num_replicas(self.model, self._group))

    def leave_out_noise(self) -> None:
        """The contributions are found by a way that does not see |∇l|²: `step_noise` is taken for 0."""
        self._step_noise = 0.0
        if self._average is not None:
            self._average.noisy = False

    def noise(self) -> Noise | None:
        """What |∇l|² counts in the contributions of a capture; None: nothing, or it is not known yet."""
        average = self._average
        if average is None or not self._step_noise or average.multiplier is None:
            return None
        signs = self._signs.draw(_trainable(self.model))
        if self._precondition is not None:
            signs = self._precondition(signs)
        return Noise(signs, self._step_noise * average.share * average.multiplier)

    def expect_gradients(self) -> None:
        """A batch begins: the gradients of the next optimizer step are to be read, where `norm_matched` needs them."""
        if self._average is not None:
            self._average.expect()

    def advance(self) -> bool:
        """Counts one capture and refreshes when it is due; returns whether it was."""
        self.expect_gradients()
        due = self._due or not self.vectors or self.age + 1 >= self._refresh_every
        due = due or not _same(self._parameters, _trainable(self.model))
        if due and not (self.vectors and is_accumulating(self.model)):
            self.refresh()
            return True
        if self._average is not None and self._average.changed:
            self._aim()
        self.age += 1
        return False

    def refresh(self) -> None:
        """Computes the direction and the losses at the parameters of now.

        Raises:
            DirectionError: there is nothing to differentiate, or the losses are not one per example.
        """
        parameters = _trainable(self.model)
        if not parameters:
            raise DirectionError("model: has no trainable parameter")
        with evaluating(self.model):
            gradients, self.target_loss, count = self._gradients(parameters)
            looks = self._guards and self._refreshes % self.look_every == 0
            guard = self._guard if looks else None
            self.guard_loss = None if guard is None else self._mean_loss(guard, self._everybody)
        self._refreshes += 1
        if self._average is not None:
            self._average.agree(self._group)
        self.plain = self._averaged(self._precondition(gradients) if self._precondition else gradients, count)
        self._aim()
        self.age, self._due, self._parameters = 0, False, parameters

    def leave_out_guard(self) -> None:
        """Refreshes measure no loss on guard B any more: only `measure_guard` does.

        Raises:
            DirectionError: there are no guard batches.
        """
        if self._guard is None:
            raise DirectionError("guard_batches = None: must be given, for a loss on guard B")
        self._guards = False

    def measure_guard(self, *, alone: bool = False) -> float | None:
        """The mean loss on guard B at the parameters of now, nats; None: there are no guard batches.

        Args:
            alone: of this process's batches, whatever others do; else all processes of a `group` measure theirs in the
                same call, and get the mean over all.
        """
        if self._guard is None:
            return None
        with evaluating(self.model):
            return float(self._mean_loss(self._guard, None if alone else self._everybody))

    def losses(self, batch: Any) -> Tensor:
        """The loss of each example of a batch, with its graph: [B]."""
        return checked_losses(self.example_losses(self.model, batch))

    def quiet_losses(self, batch: Any) -> Tensor:
        """The same past DistributedDataParallel: no process waits for another one's gradients."""
        return checked_losses(self.example_losses(unwrapped(self.model), batch))

    def next_batches(self) -> Iterator[Any]:
        """The target batches of a refresh: all, or the next ones in turn."""
        if self._batches_per_refresh is None:
            yield from self._target
            return
        left = self._batches_per_refresh
        for again in (False, True):
            if again:
                self._turn, self._taken = iter(self._target), 0
            for batch in islice(self._turn, left):
                left, self._taken = left - 1, self._taken + 1
                yield batch
            if not left:
                return

    def without_graph(self, compute: Callable[[], T]) -> T:
        """What is computed of losses, without keeping a graph of them.

        Losses that differentiate the model themselves, as those of differential equations do, need one on the way:
        they are found out by their failure.
        """
        if self._differentiates is None:
            before = ModelState(unwrapped(self.model))
            try:
                with torch.no_grad():
                    result = compute()
                self._differentiates = False
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                before.restore()
                self._differentiates = True
            else:
                return result
        with torch.set_grad_enabled(self._differentiates):
            return compute()

    def is_usable(self, name: str, loss: float) -> bool:
        """Whether a target or guard loss is finite; those that are not are counted, and logged once.

        Args:
            name: `target_loss` or `guard_loss`.
            loss: its value, nats.
        """
        if isfinite(loss):
            return True
        self.unusable += 1
        level = logging.WARNING if self.unusable == 1 else logging.DEBUG
        _log.log(
            level, "%s = %s is left out: is there a bad value in its batches, or does the training diverge?", name, loss
        )
        return False

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of the direction: float64, without dimensions."""
        return norm_of(self.vectors)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: numbers.

        The vectors, as large as the trainable parameters, are left out: the next capture computes them anew, here as in
        the job that resumes from the checkpoint, so that both go on alike, bit for bit. With `momentum` they hold
        what cannot be computed again, and are part of it, as is the average of the training gradients of a norm-matched
        direction; of a sharded model those of this process.
        """
        rest: dict[str, Any] = {"drawn": self._signs.drawn, "refreshes": self._refreshes, "largest": self._largest}
        if self._average is not None:
            rest |= {"gradients": self._average.state_dict(), "lengths": self._average.lengths()}
        if self._momentum:
            return {
                "age": self.age,
                "batches_taken": self._taken,
                "target_loss": self.target_loss,
                "guard_loss": self.guard_loss,
                "vectors": named_vectors(self.model, self.plain),
                **rest,
            }
        self._due = True
        return {"batches_taken": self._taken, **rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the direction stood that gave `state`, of a model of the same shape.

        Raises:
            DirectionError: the vectors are not those of this model.
        """
        self._taken = state["batches_taken"]
        self._refreshes, self._largest = (state.get(name, 0) for name in ("refreshes", "largest"))
        self._signs.drawn = state.get("drawn", 0)
        self._due = "vectors" not in state
        if self._average is not None and "gradients" in state:
            self._average.load_state_dict(state["gradients"], state.get("lengths"))
        if not self._due:
            self.plain, self.age = load_vectors(self.model, state["vectors"]), state["age"]
            self._aim()
            self._parameters = _trainable(self.model)
            self.target_loss, self.guard_loss = state["target_loss"], state["guard_loss"]
        self._turn = islice(iter(self._target), self._taken, None) if self._taken else iter(())

    def _aim(self) -> None:
        """Makes the direction of V, and of ḡ where it is known."""
        average = self._average
        self.vectors = self.plain if average is None or not average.known else average.without(self.plain)

    def _averaged(self, fresh: dict[nn.Parameter, Tensor], count: int) -> dict[nn.Parameter, Tensor]:
        """The fresh direction, of `count` examples, with what is kept of those before."""
        if not self._momentum:
            return fresh
        old, self._largest = self.plain, max(self._largest, count)
        kept = self._momentum ** (count / self._largest)
        return {p: torch.lerp(vector, old[p], kept) if p in old else vector for p, vector in fresh.items()}

    @property
    def _everybody(self) -> Group:
        """The processes whose batches are taken together."""
        return world() if sharded_modules(self.model) else self._group

    def _gradients(self, parameters: list[nn.Parameter]) -> tuple[dict[nn.Parameter, Tensor], Tensor, int]:
        """Gradient of the mean loss over the target batches, that loss, and of how many examples it is."""
        sharded, group = bool(sharded_modules(self.model)), self._everybody
        sums: dict[nn.Parameter, Tensor] = {}
        if group is not None:
            sums = {p: torch.zeros_like(p, dtype=precise(p.dtype)) for p in parameters}
        means = LossMean()
        for batch in self.next_batches():
            with torch.enable_grad():
                losses = self.quiet_losses(batch)
                gradients = self._reduced(losses, parameters) if sharded else _gradient(losses.sum(), parameters)
            means.add(losses)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:  # sums in half precision lose what is small beside them
                    gradient = _dense(gradient).to(precise(gradient.dtype))
                    sums[parameter] = gradient if parameter not in sums else sums[parameter] + gradient
        mean, count = means.over(group, field="target_batches")
        if not sharded:
            sums = {parameter: total(gradient, group) for parameter, gradient in sums.items()}
        return {parameter: gradient / count for parameter, gradient in sums.items()}, mean, count

    def _reduced(self, losses: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """Gradients of the sum of the losses of all processes, each with its shards, by a backward pass of all."""
        with scratch_gradients(self.model, parameters):
            losses.sum().backward()  # type: ignore[no-untyped-call]
            averaged = num_averaged(parameters)
            return [None if parameter.grad is None else parameter.grad * averaged for parameter in parameters]

    def _mean_loss(self, batches: Iterable[Any], group: Group) -> Tensor:
        means = LossMean()
        for batch in batches:
            means.add(self.without_graph(partial(self.quiet_losses, batch)))
        return means.over(group, field="guard_batches")[0]


def norm_of(vectors: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Euclidean norm of a direction: float64, without dimensions."""
    return torch.stack([whole(vector.abs().double().square().sum()) for vector in vectors.values()]).sum().sqrt()


def checked_losses(losses: Tensor, count: int | None = None) -> Tensor:
    """The losses, if there is one per example.

    Raises:
        DirectionError: there is not.
    """
    if losses.ndim != 1 or (count is not None and len(losses) != count):
        expected = "one loss per example" if count is None else f"one loss for each of {count} examples"
        raise DirectionError(
            f"losses of shape {tuple(losses.shape)}: must be {expected}; use reduction='none' and average over tokens"
        )
    return losses


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Sequence[Tensor | None]:
    """Gradients of a loss; of float16 parameters by a scaled loss, since small ones would vanish, and in float32."""
    try:
        if not any(parameter.dtype == torch.float16 for parameter in parameters):
            return torch.autograd.grad(loss, parameters, allow_unused=True)
        scaled = torch.autograd.grad(loss * _SCALE, parameters, allow_unused=True, retain_graph=True)
        if all(gradient is None or bool(gradient.isfinite().all()) for gradient in scaled):
            return [None if gradient is None else gradient.float() / _SCALE for gradient in scaled]
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise DirectionError(
            "model: checkpoints activations with use_reentrant=True in evaluation mode, through which only `.grad` can "
            "be computed: use use_reentrant=False"
        ) from error


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _same(one: list[nn.Parameter], other: list[nn.Parameter]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _check_repeatable(field: str, batches: Iterable[Any] | None) -> None:
    if isinstance(batches, Iterator):
        raise DirectionError(f"{field} = {type(batches).__name__}: can be read once only; give a list or a loader")


def _check_positive(field: str, value: int) -> None:
    if value < 1:
        raise DirectionError(f"{field} = {value}: must be at least 1")
