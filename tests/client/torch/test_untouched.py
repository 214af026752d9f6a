"""Hooks change nothing of a training: losses, gradients, optimizer, buffers and random numbers, bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise.torch import (
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    TargetDirection,
    UnsupportedModuleError,
    weighted_mean,
)
from equipoise.torch.direction import ExampleLoss
from tests.client.torch.architectures import ARCHITECTURES
from tests.client.torch.zoo import CASES, COUNT, shaken, squares, vectors

STEPS = 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def one_code_of_torchscript() -> Iterator[None]:
    """TorchScript compiles a module anew after some calls, of which the checks of the first step make their own."""
    before = torch._C._jit_set_profiling_mode(False)
    yield
    torch._C._jit_set_profiling_mode(before)


def trained(
    model: nn.Module,
    batches: list[Any],
    losses_of: ExampleLoss,
    step: Callable[[Any], AbstractContextManager[Callable[[Any], Tensor]]],
    *,
    count: int,
    accumulate: int = 1,
    autocast: bool = False,
) -> dict[str, Any]:
    """Everything that a training leaves: each step's losses and gradients, and the state at the end."""
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen: list[Any] = []
    for number, batch in enumerate(batches):
        with step(range(count)) as forward:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = forward(batch)
            (weighted_mean(losses, torch.ones(count)) / accumulate).backward()
        seen.append(losses.detach())
        if (number + 1) % accumulate == 0:
            seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
    return {
        "seen": seen,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "random": torch.get_rng_state(),
    }


def compare(
    make: Callable[[], nn.Module], batches: list[Any], losses_of: ExampleLoss, *, count: int, **options: Any
) -> None:
    twin = make()
    plain = trained(
        twin, batches, losses_of, lambda _ids: nullcontext(lambda batch: losses_of(twin, batch)), count=count, **options
    )
    model = make()
    direction = TargetDirection(model, losses_of, [batches[0]], refresh_every=2)
    contributions = GhostContributions(model, direction)
    contributions.verify_first()
    hooked = trained(model, batches, losses_of, lambda ids: Hooked(contributions, ids), count=count, **options)
    torch.testing.assert_close(hooked, plain, rtol=0, atol=0, equal_nan=True)


class Hooked(AbstractContextManager[Callable[[Any], Tensor]]):
    """A capture as a forward pass."""

    def __init__(self, contributions: GhostContributions, ids: Any) -> None:
        self._contributions, self._capture = contributions, contributions.capture(ids)

    def __enter__(self) -> Callable[[Any], Tensor]:
        self._capture.__enter__()
        return self._capture.losses

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)
        if error[0] is None:
            known = self._capture.contributions.isfinite().all()
            plan = self._contributions.coverage.plan
            # What is checkpointed and called again is known from the second step on.
            assert known or (plan is not None and not all(block.rehearsed for block in plan.blocks.values()))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused and not case.options])
def test_models(name: str) -> None:
    case = CASES[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return shaken(case.build())

    torch.manual_seed(1)
    compare(make, [case.batch() for _ in range(STEPS)], case.losses, count=case.count)


@pytest.mark.parametrize("name", ["GPT-2", "Gemma 2", "Mixtral", "BERT, masked", "ViT", "T5"])
@pytest.mark.parametrize("way", ["plain", "checkpointed", "autocast", "accumulated"])
def test_architectures(name: str, way: str) -> None:
    """In training mode: dropout, where there is any, draws the same numbers."""
    architecture = ARCHITECTURES[name]

    def make() -> nn.Module:
        model: Any = architecture.build().float().train()
        if way == "checkpointed":
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model  # type: ignore[no-any-return]

    batch = {key: value.float() if value.is_floating_point() else value for key, value in architecture.batch().items()}
    options = {"autocast": way == "autocast", "accumulate": 2 if way == "accumulated" else 1}
    try:
        compare(make, [batch] * 4, architecture.losses, count=4, **options)
    except UnsupportedModuleError as error:
        pytest.fail(str(error))


class Router(nn.Module):
    """Leaves its balance on itself, and in a list, for the loss to be added to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 3)
        self.balance: Tensor | None = None
        self.balances: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x @ self.weight)
        self.balance = y.square().mean()
        self.balances.append(self.balance)
        out: Tensor = self.head(y)
        return out


@pytest.mark.parametrize("method", [GhostContributions, JvpContributions, FiniteDifferenceContributions])
@pytest.mark.filterwarnings("ignore:The contributions and the gradient")
def test_losses_that_modules_keep(method: Any) -> None:
    """Calls of ours leave nothing in their place, and nothing beside them."""

    def gradients(hooks: bool) -> list[Any]:
        torch.manual_seed(0)
        model, found = shaken(Router()), []
        direction = TargetDirection(model, squares, [torch.randn(COUNT, 8).double()], refresh_every=2)
        contributions = method(model, direction)
        for batch in (torch.randn(COUNT, 8).double() for _ in range(STEPS)):
            with contributions.capture(range(COUNT)) if hooks else nullcontext() as capture:
                losses = capture.losses(batch) if capture is not None else squares(model, batch)
                assert model.balance is not None
                (losses.mean() + model.balance + sum(model.balances)).backward()
            model.balances.clear()
            found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        return found

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


class Blocks(nn.Module):
    """Checkpointed blocks with dropout and with a module taken as a whole."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.start = nn.Linear(8, 8)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8))
        self.whole = nn.Sequential(nn.PReLU(4), nn.Dropout(0.1))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.middle, self.start(x), use_reentrant=self.reentrant and self.training)
        return checkpoint(self.whole, y, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:

    def make() -> nn.Module:
        torch.manual_seed(0)
        return shaken(Blocks(reentrant)).train()

    compare(make, [vectors(4, 8)() for _ in range(STEPS)], squares, count=COUNT)
