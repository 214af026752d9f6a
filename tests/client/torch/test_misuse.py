"""What cannot give right contributions is refused, with a message that says what to do instead."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise import EquipoiseError
from equipoise.torch import (
    BatchShapeError,
    CaptureError,
    ContributionsDifferError,
    DirectionError,
    FiniteDifferenceContributions,
    GhostContributions,
    LastLayerContributions,
    OnePassContributions,
    TargetDirection,
    UnsupportedModuleError,
    join,
    weighted_mean,
)
from tests.client.torch.models import relative_error

COUNT = 5


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).square().mean(1)


def direction_of(model: nn.Module, *shape: int) -> TargetDirection:
    return TargetDirection(model, losses_of, [torch.randn(3, *shape)])


def linear() -> tuple[nn.Module, TargetDirection, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, direction_of(model, 4), torch.randn(COUNT, 4)


class Learnt(nn.Module):
    """Parameters that no hook can see through."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4))
        self.offset = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner[1](x, self.inner[0](x)) + self.offset
        return y


@pytest.mark.parametrize("method", [GhostContributions, OnePassContributions])
def test_modules_that_hooks_cannot_see_through_are_all_named_with_the_method_that_can(method: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Learnt())
    direction = direction_of(model, 4)
    with pytest.raises(UnsupportedModuleError) as caught:
        method(model, direction)
    assert "1 (Learnt), 1.inner.1 (Bilinear): hooks see through Linear, " in str(caught.value)
    assert str(caught.value).endswith("FiniteDifferenceContributions handles any module")
    assert [path for path, _ in caught.value.modules] == ["1", "1.inner.1"]
    assert isinstance(caught.value, EquipoiseError)
    with FiniteDifferenceContributions(model, direction).capture(range(COUNT)) as capture:
        capture.losses(torch.randn(COUNT, 4))
    assert capture.fields()["scored"].all()  # type: ignore[union-attr]


class Doubled(nn.Linear):
    """Not what `nn.Linear` computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) ** 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm1d(4), r"\(BatchNorm1d\): batch normalisation mixes examples"),
        (Doubled(4, 4), r"\(Doubled\): hooks see through"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), r"\(Embedding\)"),
        (nn.Embedding(4, 4, max_norm=1.0), r"\(Embedding\)"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), r"ParametrizationList"),
        (nn.LSTM(4, 4), r"\(LSTM\)"),
    ],
)
def test_near_misses_are_not_taken_for_what_they_resemble(module: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=message):
        GhostContributions(module, direction_of(module, 4))
    frozen = nn.Sequential(module.requires_grad_(False), nn.Linear(4, 4))
    GhostContributions(frozen, direction_of(frozen, 4))


@pytest.mark.filterwarnings("ignore")  # the compiler itself warns
def test_compiled_modules_are_refused_for_hooks_and_work_with_finite_differences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 2), backend="eager"))
    direction = direction_of(model, 4)
    with pytest.raises(UnsupportedModuleError, match=r"1 .*: compiled modules run no hooks; FiniteDifference"):
        GhostContributions(model, direction)
    assert FiniteDifferenceContributions(model, direction).verify(torch.randn(COUNT, 4)) < 0.02


def test_the_order_of_a_step() -> None:
    model, direction, x = linear()
    contributions = GhostContributions(model, direction)
    capture = contributions.capture(range(COUNT))
    with pytest.raises(CaptureError, match="the forward pass belongs into `with"):
        capture.losses(x)
    with pytest.raises(CaptureError, match="no forward pass was captured"):
        capture.fields()
    with capture:
        losses = capture.losses(x)
        with pytest.raises(CaptureError, match="make one capture for each micro-batch"):
            capture.losses(x)
        with pytest.raises(CaptureError, match="no backward pass was captured: it belongs into"):
            capture.fields()
    losses.mean().backward()  # after the block: not seen
    with pytest.raises(CaptureError, match="no backward pass was captured"):
        capture.fields()
    with pytest.raises(CaptureError, match="a capture is used once"), capture:
        pass
    with contributions.capture(range(COUNT)) as capture, torch.no_grad(), pytest.raises(CaptureError, match="no_grad"):
        capture.losses(x)
    with contributions.capture(range(COUNT)) as capture:
        capture.watch(losses_of(nn.Linear(4, 2), x)).mean().backward()
    with pytest.raises(CaptureError, match="did not go through the whole model"):
        capture.fields()
    with pytest.raises(CaptureError, match="there is no capture to join"):
        join()


def test_the_order_of_one_pass() -> None:
    model, direction, x = linear()
    with OnePassContributions(model, direction).capture(range(COUNT)) as capture:
        with pytest.raises(CaptureError, match="no forward pass was captured"):
            capture.backward(torch.ones(COUNT))
        capture.losses(x)
        with pytest.raises(CaptureError, match=r"weights of shape \(3,\): must be one for each of 5 losses"):
            capture.backward(torch.ones(3))
        capture.backward(torch.ones(COUNT))
        with pytest.raises(CaptureError, match="makes one backward pass"):
            capture.backward(torch.ones(COUNT))


def test_shapes_are_checked() -> None:
    model, direction, x = linear()
    contributions = GhostContributions(model, direction)
    for ids in ([], [[1]], [0.5], "a"):
        with pytest.raises(CaptureError, match="must be one integer for each example"):
            contributions.capture(ids)
    with (
        contributions.capture([0, 1]) as capture,
        pytest.raises(BatchShapeError, match=r"gave shape \(5, 2\) for 2 exam"),
    ):
        capture.losses(x)
    with (
        contributions.capture(range(COUNT)) as capture,
        pytest.raises(DirectionError, match=r"losses of shape \(5, 2\)"),
    ):
        capture.watch(model(x))
    with pytest.raises(CaptureError, match=r"weights of shape \(2,\): must be one for each of 5 losses"):
        weighted_mean(torch.ones(COUNT), [1.0, 2.0])


class Table(nn.Module):
    """As many positions as examples cannot be told from one index for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(COUNT + 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table(torch.arange(x.shape[1]))


def test_positions_are_told_from_examples_or_asked_for() -> None:
    torch.manual_seed(0)
    model = Table()
    direction = TargetDirection(model, losses_of, [torch.randn(2, COUNT, 4)])
    x = torch.randn(COUNT, COUNT, 4)
    contributions = GhostContributions(model, direction)
    with (
        contributions.capture(range(COUNT)) as capture,
        pytest.raises(BatchShapeError, match=r"table \(Embedding\) got 5 consecutive .* give shared=\['table'\]"),
    ):
        capture.losses(x)
    results = []
    for chosen in (GhostContributions(model, direction, shared=["table"]), contributions):
        with chosen.capture(range(3)) as capture:  # now it can be told
            capture.losses(x[:3]).mean().backward()
        with chosen.capture(range(COUNT)) as capture:
            capture.losses(x).mean().backward()
        results.append(capture.contributions)
    torch.testing.assert_close(*results)


def test_finite_differences_refuse_half_precision() -> None:
    model, direction, x = linear()
    with pytest.raises(UnsupportedModuleError, match="need float32 parameters; GhostContributions does not"):
        FiniteDifferenceContributions(nn.Linear(4, 2).bfloat16(), direction)
    with pytest.raises(DirectionError, match="step = 0: must be positive"):
        FiniteDifferenceContributions(model, direction, step=0)
    contributions = FiniteDifferenceContributions(model, direction)
    with (
        contributions.capture(range(COUNT)) as capture,
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(CaptureError, match="half precision are mostly rounding"),
    ):
        capture.losses(x)
    with contributions.capture(range(COUNT)) as capture, pytest.raises(CaptureError, match=r"use `capture\.losses"):
        capture.watch(losses_of(model, x))


def test_the_last_layer_must_be_one() -> None:
    model, direction, _ = linear()
    with pytest.raises(UnsupportedModuleError, match=r"0 \(LSTM\): hooks see through"):
        LastLayerContributions(nn.Sequential(nn.LSTM(4, 4)), direction, layer="0")
    with pytest.raises(UnsupportedModuleError, match=r"has no nn\.Linear; name a layer"):
        LastLayerContributions(nn.Sequential(nn.ReLU()), direction)
    with pytest.raises(UnsupportedModuleError, match=r"the model itself \(Linear\): has no trainable parameter"):
        LastLayerContributions(model.requires_grad_(False), direction)


class Mixing(nn.Module):
    """Subtracts the mean over the batch, which no hook notices."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y - y.mean(0)


class TimeFirst(nn.Module):
    """Examples in the second dimension, as many as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.transpose(0, 1))
        return y.transpose(0, 1)


@pytest.mark.parametrize(("model", "shape"), [(Mixing(), (4,)), (TimeFirst(), (COUNT, 4))])
def test_verify_finds_what_hooks_cannot_notice(model: nn.Module, shape: tuple[int, ...]) -> None:
    direction = direction_of(model, *shape)
    with pytest.raises(ContributionsDifferError, match=r"GhostContributions is off by .* does a module mix examples"):
        GhostContributions(model, direction).verify(torch.randn(COUNT, *shape))


@pytest.mark.parametrize("method", [GhostContributions, OnePassContributions])
def test_hooks_are_gone_after_a_step_and_after_a_failure(method: Any) -> None:
    model, direction, x = linear()
    contributions = method(model, direction)
    with contributions.capture(range(COUNT)) as capture:
        assert model._forward_hooks
        losses = capture.losses(x)
        if method is GhostContributions:
            losses.mean().backward()
    with pytest.raises(ZeroDivisionError), contributions.capture(range(COUNT)):
        _ = 1 / 0
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._backward_hooks
    assert relative_error(capture.contributions, capture.contributions.double()) < 1e-6


def test_finite_differences_leave_no_trace() -> None:
    """Parameters bit for bit, statistics of batch normalisation, random numbers; even when the second pass fails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    twin = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    twin.load_state_dict(model.state_dict())
    direction, x, calls = direction_of(model, 4), torch.randn(COUNT, 4), []
    direction.refresh()
    contributions = FiniteDifferenceContributions(model, direction)
    torch.manual_seed(1)
    with contributions.capture(range(COUNT)) as capture:
        capture.losses(x).mean().backward()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    losses_of(twin, x).mean().backward()
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=0)
    for parameter, same in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, rtol=0, atol=0)

    def fails_the_second_time(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(model[0].weight.detach().clone())
        return losses_of(model, x) / (len(calls) == 1 or int("no number"))

    direction.loss_fn = fails_the_second_time
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="no number"), contributions.capture(range(COUNT)) as capture:
        capture.losses(x)
    assert not torch.equal(calls[1], before)
    assert torch.equal(model[0].weight, before)
