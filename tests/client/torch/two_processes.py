"""What each of two processes does with its half of a batch; the test compares with one process that has all of it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from equipoise.torch import (
    Contributions,
    DirectionError,
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    OnePassContributions,
    TargetDirection,
    TrainingOptions,
    UnsupportedModuleError,
    weighted_mean,
)
from equipoise.torch.gradients import GradientAverage
from tests.client.torch.models import gpt2, lm_losses, reference, relative_error, tokens
from tests.client.torch.zoo import CASES, Case, shaken

COUNT, HALF = 12, 6
WEIGHTS = torch.linspace(0.5, 1.5, COUNT)
STEPS = 2
Result: TypeAlias = dict[str, Any]
Method: TypeAlias = Callable[[nn.Module, TargetDirection], Contributions[Any]]


def rows(batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: values[start:stop] for name, values in batch.items()}


def training() -> list[dict[str, Tensor]]:
    return [tokens(COUNT, seed=10 + step, padded=True) for step in range(STEPS)]


def targets() -> list[dict[str, Tensor]]:
    """Of unequal size, so that a mean of means would be wrong."""
    return [tokens(8, seed=1), tokens(5, seed=2, padded=True)]


def run(
    model: nn.Module, method: Method, *, part: slice, batches: list[Any], matched: bool = False, group: Any = None
) -> Result:
    """Steps of Adam on a part of each batch: what is known after them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    direction = TargetDirection(
        model,
        lm_losses,
        batches,
        refresh_every=1,
        guard_batches=batches,
        preconditioner=optimizer,
        group=group,
        norm_matched=matched,
        step_noise=2.0 if matched else 0.0,
    )
    contributions, found = method(model, direction), []
    for batch in training():
        with contributions.capture(range(COUNT)[part]) as capture:
            losses = capture.losses(rows(batch, part.start, part.stop))
            weighted_mean(losses, WEIGHTS[part].to(losses)).backward()
        found.append(capture.contributions.double())
        optimizer.step()
        optimizer.zero_grad()
    return {
        "contributions": torch.stack(found),
        "target_loss": direction.target_loss,
        "guard_loss": direction.guard_loss,
        "guard_now": direction.measure_guard(),
        "norm": direction.norm,
        "parameters": [full(parameter) for parameter in model.parameters()],
    }


def alone(method: Method, *, matched: bool = False) -> Result:
    """The same in one process."""
    return run(gpt2().double(), method, part=slice(0, COUNT), batches=targets(), matched=matched)


def replicated(method: Method, rank: int, *, matched: bool = False) -> Result:
    return run(
        DistributedDataParallel(gpt2().double()),
        method,
        part=slice(rank * HALF, (rank + 1) * HALF),
        batches=targets()[rank : rank + 1],
        matched=matched,
        group=dist.group.WORLD,
    )


def sharded_model() -> Any:
    model: Any = gpt2().double()
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


def sharded(rank: int, *, matched: bool = False) -> Result:
    part, batches = slice(rank * HALF, (rank + 1) * HALF), targets()[rank : rank + 1]
    return run(sharded_model(), FiniteDifferenceContributions, part=part, batches=batches, matched=matched)


def refusals() -> Result:
    """Messages of methods that cannot work, and of a model whose shards are hidden."""
    found = {}
    for name, model, method in (
        ("one pass, replicated", DistributedDataParallel(gpt2()), OnePassContributions),
        ("ghost, sharded", sharded_model(), GhostContributions),
        ("jvp, sharded", sharded_model(), JvpContributions),
    ):
        try:
            method(model, TargetDirection(model, lm_losses, targets()))
        except UnsupportedModuleError as error:
            found[name] = str(error)
    try:
        TargetDirection(
            fully_shard(gpt2(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("tensors", "data"))["data"]),
            lm_losses,
            targets(),
        ).refresh()
    except DirectionError as error:
        found["a part of the mesh"] = str(error)
    return found


def accumulating() -> Result:
    """A refresh that is due while gradients wait to be reduced; and what the job's gradients are in the end."""
    model, batch = sharded_model(), training()[0]
    direction = TargetDirection(model, lm_losses, targets(), refresh_every=1)
    contributions, ages = FiniteDifferenceContributions(model, direction), []
    for index, sync in enumerate((False, True)):
        model.set_requires_gradient_sync(sync)
        with contributions.capture(range(HALF)) as capture:
            capture.losses(rows(batch, index * HALF, (index + 1) * HALF)).mean().backward()
        ages.append(direction.age)
    gradients = [full(parameter.grad) for parameter in model.parameters()]
    with contributions.capture(range(HALF)):
        ages.append(direction.age)
    kept = [full(parameter.grad) for parameter in model.parameters()]
    return {"ages": ages, "gradients": gradients, "kept": kept}


def agreed(rank: int) -> Result:
    """What only one process knows: a multiplier of losses, and the policy's rule."""
    model = nn.Linear(2, 1)
    averages = [GradientAverage(model, noisy=True) for _ in range(2)]
    if rank:
        averages[0].multiplier = torch.tensor(0.5, dtype=torch.float64)
    for average in averages:
        average.agree(dist.group.WORLD)
    client: Any = SimpleNamespace(rule=None if rank else "strata")
    steps = TrainingOptions(measure_every=3, verify=False).steps(client, gpt2(), lm_losses, targets())
    multipliers = [average.multiplier for average in averages]
    return {"multipliers": multipliers, "norm_matched": steps.contributions.direction.norm_matched}


def restored(rank: int) -> Result:
    """A sharded direction from a checkpoint: with momentum its vectors are part of it; norm-matched, gradients too."""
    model, part = sharded_model(), targets()[rank : rank + 1]
    direction = TargetDirection(model, lm_losses, part, momentum=0.5, norm_matched=True)
    direction.advance()
    lm_losses(model, rows(training()[0], rank * HALF, (rank + 1) * HALF)).mean().backward()
    direction.note_gradients()
    direction.advance()
    assert direction.vectors is not direction.plain
    copy = TargetDirection(model, lm_losses, part, momentum=0.5, norm_matched=True)
    copy.load_state_dict(direction.state_dict())
    pairs = zip(copy.vectors.values(), direction.vectors.values(), strict=True)
    return {"same": all(torch.equal(full(a), full(b)) for a, b in pairs), "norms": (copy.norm, direction.norm)}


def full(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


KINDS = (
    "MultiheadAttention",
    "weight_norm, old",
    "routed experts",
    "learnt positions: [None]",
    "packed, logits[0]",
    "preferences (DPO)",
    "LSTM",
    "head tied by F.linear",
)


def kinds(rank: int) -> dict[str, Result]:
    """Replicas of models of many kinds, with the first step verified: errors, and gradients beside their means."""
    return {name: of_a_kind(CASES[name], rank) for name in KINDS}


def of_a_kind(case: Case, rank: int) -> Result:
    torch.manual_seed(0)
    inner = shaken(case.build())
    target = case.batch()
    torch.manual_seed(10 + rank)
    batch = case.batch()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    direction = TargetDirection(model, case.losses, [target], refresh_every=2, group=dist.group.WORLD)
    contributions = GhostContributions(model, direction)
    contributions.verify_first()
    errors = []
    for _ in range(3):
        model.zero_grad()
        with contributions.capture(range(case.count)) as capture:
            capture.losses(batch).mean().backward()
        errors.append(relative_error(capture.contributions, reference(inner, direction, batch)))
    parameters = list(inner.parameters())
    means = torch.autograd.grad(case.losses(inner, batch).mean(), parameters, allow_unused=True)
    expected = [torch.zeros_like(p) if g is None else g.clone() for p, g in zip(parameters, means, strict=True)]
    for gradient in expected:
        dist.all_reduce(gradient)
    return {
        "errors": errors,
        "gaps": contributions.coverage.gaps,
        "gradients": [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters],
        "expected": [gradient / 2 for gradient in expected],
    }


def process(rank: int, folder: str) -> None:
    """All of it, in one of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {
        "ghost": replicated(GhostContributions, rank),
        "finite_difference": replicated(FiniteDifferenceContributions, rank),
        "sharded": sharded(rank),
        "ghost, matched": replicated(GhostContributions, rank, matched=True),
        "sharded, matched": sharded(rank, matched=True),
        "refusals": refusals(),
        "accumulating": accumulating(),
        "agreed": agreed(rank),
        "restored": restored(rank),
        "kinds": kinds(rank),
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
