"""Contributions of training examples from any PyTorch job, in five lines.

Example:
    >>> direction = TargetDirection(model, example_losses, target_batches)
    >>> steps = WeightedSteps(client, GhostContributions(model, direction))
    >>> for ids, batch in loader:
    ...     with steps.capture(ids) as step:
    ...         step.loss(batch).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()

The same with everything in sight, for loops that need something else:

    >>> with contributions.capture(ids) as capture:
    ...     losses = capture.losses(batch)
    ...     weighted_mean(losses, client.weights(ids)).backward()
    >>> client.submit(ids, **capture.fields())

Accelerate wraps the model and scales the loss; the rest is the same:

    >>> steps = WeightedSteps(client, GhostContributions(model, direction), accumulate=None)
    >>> with accelerator.accumulate(model), steps.capture(ids) as step:
    ...     accelerator.backward(step.loss(batch))
    >>> if accelerator.sync_gradients:
    ...     steps.submit()

| method | contributions known | extra cost | exact | models |
|---|---|---|---|---|
| `GhostContributions` | after the backward pass | 0.3 step | yes | modules with hooks; see `equipoise.torch.kinds` |
| `OnePassContributions` | before the weights | 0.4 step | yes | same; makes the backward pass itself |
| `FiniteDifferenceContributions` | before the backward pass | 0.4 step | 0.5 % | any, in float32 |
| `LastLayerContributions` | after the backward pass | small | no | any with a last linear layer |
| `SketchContributions` | by the server, after the backward pass | small | no | transformers; see there |
| `JvpContributions` | before the backward pass | 1.2 steps | yes | any with forward-mode kernels |

Needs PyTorch: `pip install 'equipoise[torch]'`.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("equipoise.torch needs PyTorch: pip install 'equipoise[torch]'", name="torch") from error

from equipoise.torch.capture import Capture, Contributions, join
from equipoise.torch.direction import ExampleLoss, TargetDirection
from equipoise.torch.errors import (
    BatchShapeError,
    CaptureError,
    ContributionsDifferError,
    DirectionError,
    UnsupportedModuleError,
)
from equipoise.torch.ghost import GhostContributions, LastLayerContributions
from equipoise.torch.losses import causal_lm_losses, token_losses, weighted_mean
from equipoise.torch.one_pass import OnePassContributions
from equipoise.torch.resume import resume_run, run_state
from equipoise.torch.sampler import WeightedSampler
from equipoise.torch.second_pass import FiniteDifferenceContributions, JvpContributions
from equipoise.torch.sketch import SketchContributions
from equipoise.torch.steps import WeightedStep, WeightedSteps, look_ahead

__all__ = [
    "BatchShapeError",
    "Capture",
    "CaptureError",
    "Contributions",
    "ContributionsDifferError",
    "DirectionError",
    "ExampleLoss",
    "FiniteDifferenceContributions",
    "GhostContributions",
    "JvpContributions",
    "LastLayerContributions",
    "OnePassContributions",
    "SketchContributions",
    "TargetDirection",
    "UnsupportedModuleError",
    "WeightedSampler",
    "WeightedStep",
    "WeightedSteps",
    "causal_lm_losses",
    "join",
    "look_ahead",
    "resume_run",
    "run_state",
    "token_losses",
    "weighted_mean",
]
