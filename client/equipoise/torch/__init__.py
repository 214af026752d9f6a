"""Contributions of training examples from any PyTorch job, in five lines.

Example:
    >>> steps = weighted_steps(client, model, example_losses, target_batches)
    >>> for ids, batch in loader:
    ...     with steps.capture(ids) as step:
    ...         step.loss(batch).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()

The same with everything in sight, for loops that need something else:

    >>> direction = TargetDirection(model, example_losses, target_batches)
    >>> contributions = GhostContributions(model, direction)
    >>> with contributions.capture(ids) as capture:
    ...     losses = capture.losses(batch)
    ...     weighted_mean(losses, client.weights(ids)).backward()
    >>> client.submit(ids, **capture.fields())

Accelerate wraps the model and scales the loss; the rest is the same:

    >>> steps = weighted_steps(client, model, example_losses, target_batches, accelerator=accelerator)
    >>> with accelerator.accumulate(model), steps.capture(ids) as step:
    ...     accelerator.backward(step.loss(batch))
    >>> accelerator.log(steps.metrics())

A batch may be skipped anywhere in the block, by `continue` or an exception: nothing of it is sent. `steps.metrics()`
has the policy's numbers for any logger, `steps.progress()` a line that says whether it helps, `steps.state()` and
`steps.resume(...)` the run's part of a checkpoint. Trainers of frameworks take `TrainingOptions`.

| method | contributions known | extra cost | exact | models |
|---|---|---|---|---|
| `GhostContributions` | after the backward pass | 0.3 step | yes | nearly any; see below |
| `OnePassContributions` | before the weights | 0.4 step | yes | same; makes the backward pass itself |
| `FiniteDifferenceContributions` | before the backward pass | 0.4 step | 0.5 % | any, in float32 |
| `LastLayerContributions` | after the backward pass | small | no | any with a last linear layer |
| `SketchContributions` | by the server, after the backward pass | small | no | transformers; see there |
| `JvpContributions` | before the backward pass | 1.3 steps | yes | any with forward-mode kernels |
| `LossesAlone` | never: losses are compared with those of the target, for rule `strata` | none | | any |

Contributions are exact, or the model is refused with the line to paste instead; training is never touched: losses,
gradients and random numbers are those of the same job without hooks, bit for bit. The first step is surveyed, at two
more backward passes: every place in the autograd graph where a trainable parameter enters must lie in exactly one
observed call, and rows must belong to one example each. Linear, Embedding, normalisations, convolutions and
transformers' Conv1D have formulas; any other module is called once more under forward-mode differentiation, which
costs about two of its forward passes. Packed rows, padding-free batches and pairs are told apart by their losses.
Batch normalisation in training mode and in-batch negatives, where a loss depends on other examples, are refused: for
them `JvpContributions` is exact. At every refresh Σ s·c = ⟨V, gradient⟩ is compared, and a difference logged with its
likely cause; `WeightedSteps` has four examples of the first step verified by gradients of their own.

`TargetDirection(..., norm_matched=True)` makes them norm-matched: what an example does for the target at equal step
length, since to lower the target loss by longer steps along what all examples share is no merit of one. Plain ones are
those of the Learning Law. Rule `strata` takes the former, of some batches. It is content with losses, of the training
and of target examples: that is what `weighted_steps` and trainers send it, at a forward pass every sixth batch.

`Mixture` draws rows of several sources by the weights of a policy whose examples are the sources. For text
`WeightedSteps(..., relative=True)` sends contributions relative to their batch, by `relative` and `shrunk`, and
`perplexity_buckets` makes sources where there are none.

Needs PyTorch: `pip install 'equipoise[torch]'`.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("equipoise.torch needs PyTorch: pip install 'equipoise[torch]'", name="torch") from error

from equipoise.torch.batches import look_ahead
from equipoise.torch.capture import Capture, Contributions, join
from equipoise.torch.comparison import relative, shrunk
from equipoise.torch.direction import ExampleLoss, TargetDirection
from equipoise.torch.errors import (
    CaptureError,
    ContributionsDifferError,
    DirectionError,
    UnsupportedModuleError,
)
from equipoise.torch.ghost import GhostContributions, LastLayerContributions
from equipoise.torch.losses import causal_lm_losses, token_losses, weighted_mean
from equipoise.torch.mixture import Mixture
from equipoise.torch.one_pass import OnePassContributions
from equipoise.torch.perplexity import perplexity_buckets
from equipoise.torch.resume import resume_run, run_state
from equipoise.torch.sampler import DistributedWeightedSampler, WeightedSampler
from equipoise.torch.second_pass import FiniteDifferenceContributions, JvpContributions
from equipoise.torch.sketch import SketchContributions
from equipoise.torch.step import WeightedStep
from equipoise.torch.steps import WeightedSteps
from equipoise.torch.target_losses import LossesAlone
from equipoise.torch.training import TrainingOptions, weighted_steps

__all__ = [
    "Capture",
    "CaptureError",
    "Contributions",
    "ContributionsDifferError",
    "DirectionError",
    "DistributedWeightedSampler",
    "ExampleLoss",
    "FiniteDifferenceContributions",
    "GhostContributions",
    "JvpContributions",
    "LastLayerContributions",
    "LossesAlone",
    "Mixture",
    "OnePassContributions",
    "SketchContributions",
    "TargetDirection",
    "TrainingOptions",
    "UnsupportedModuleError",
    "WeightedSampler",
    "WeightedStep",
    "WeightedSteps",
    "causal_lm_losses",
    "join",
    "look_ahead",
    "perplexity_buckets",
    "relative",
    "resume_run",
    "run_state",
    "shrunk",
    "token_losses",
    "weighted_mean",
    "weighted_steps",
]
