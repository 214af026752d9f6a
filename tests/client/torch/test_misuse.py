"""What cannot give right contributions is refused, with a message that says what to do instead."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.torch import (
    CaptureError,
    DirectionError,
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    LastLayerContributions,
    OnePassContributions,
    TargetDirection,
    UnsupportedModuleError,
    join,
    weighted_mean,
)
from tests.client.torch.models import reference, relative_error

COUNT = 5


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1).square().mean(1)


def direction_of(model: nn.Module, *shape: int) -> TargetDirection:
    return TargetDirection(model, losses_of, [torch.randn(3, *shape)])


def linear() -> tuple[nn.Module, TargetDirection, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, direction_of(model, 4), torch.randn(COUNT, 4)


class Doubled(nn.Linear):
    """Not what `nn.Linear` computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) ** 2


@pytest.mark.parametrize(
    "module",
    [Doubled(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Bilinear(4, 4, 4)],
)
def test_near_misses_are_not_taken_for_what_they_resemble(module: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Twofold(module)).double()
    direction = TargetDirection(model, losses_of, [torch.randn(3, 4).double()])
    x = torch.randn(COUNT, 4).double()
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        capture.losses(x).mean().backward()
    assert relative_error(capture.contributions, reference(model, direction, x)) < 1e-10


class Twofold(nn.Module):
    """Calls a module with as many inputs as it takes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x) if isinstance(self.inner, nn.Bilinear) else self.inner(x)
        return y


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_embeddings_whose_gradients_depend_on_other_examples_are_refused(options: dict[str, Any]) -> None:
    model = nn.Embedding(4, 4, **options)
    ids = torch.randint(4, (COUNT, 3))
    direction = TargetDirection(model, losses_of, [ids])
    with (
        GhostContributions(model, direction).capture(range(COUNT)) as capture,
        pytest.raises(UnsupportedModuleError, match=r"\(Embedding\): .* depend on the other examples; use FiniteDiff"),
    ):
        capture.losses(ids)


class Rounded(torch.autograd.Function):
    """Rounds, and passes the gradient on: without a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class Quantised(nn.Linear):
    """A layer with rounded weights."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, Rounded.apply(self.weight * 8) / 8, self.bias)  # type: ignore[no-untyped-call]


def test_what_has_no_forward_mode_is_refused_with_the_method_that_needs_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Quantised(4, 4))
    with (
        GhostContributions(model, direction_of(model, 4)).capture(range(COUNT)) as capture,
        pytest.raises(UnsupportedModuleError, match=r"1 \(Quantised\): cannot be called again .* use FiniteDifference"),
    ):
        capture.losses(torch.randn(COUNT, 4))


@pytest.mark.filterwarnings("ignore")  # the compiler itself warns
def test_compiled_modules_are_refused_for_hooks_and_work_with_finite_differences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 2), backend="eager"))
    direction = direction_of(model, 4)
    with pytest.raises(UnsupportedModuleError, match=r"1 .*: compiled modules run no hooks; use JvpContr"):
        GhostContributions(model, direction)
    x = torch.randn(COUNT, 4)
    assert FiniteDifferenceContributions(model, direction).verify(x) < 0.02
    assert JvpContributions(model, direction).verify(x) < 1e-5


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
        pytest.raises(DirectionError, match=r"losses of shape \(5,\): must be one loss for each of 2 examples"),
    ):
        capture.losses(x)
    with pytest.raises(CaptureError, match="ids: -3 must not be negative"):
        contributions.capture([1, -3])
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


def test_positions_are_told_from_examples() -> None:
    """By what they do to the losses, or by their name."""
    torch.manual_seed(0)
    model = Table().double()
    direction = TargetDirection(model, losses_of, [torch.randn(2, COUNT, 4).double()])
    x = torch.randn(COUNT, COUNT, 4).double()
    for options in ({}, {"shared": ["table"]}):
        contributions = GhostContributions(model, direction, **options)
        for count in (COUNT, 3, 1, COUNT):
            with contributions.capture(range(count)) as capture:
                capture.losses(x[:count]).mean().backward()
            expected = reference(model, direction, x[:count])
            assert relative_error(capture.contributions, expected) < 1e-10


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
    with pytest.raises(UnsupportedModuleError, match=r"0 \(LSTM\): is no layer whose formula is known; name"):
        LastLayerContributions(nn.Sequential(nn.LSTM(4, 4)), direction, layer="0")
    with pytest.raises(UnsupportedModuleError, match=r"has no nn\.Linear; name a layer"):
        LastLayerContributions(nn.Sequential(nn.ReLU()), direction)
    with pytest.raises(UnsupportedModuleError, match=r"the model itself \(Linear\): has no trainable parameter"):
        LastLayerContributions(model.requires_grad_(False), direction)


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

    direction.example_losses = fails_the_second_time
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="no number"), contributions.capture(range(COUNT)) as capture:
        capture.losses(x)
    assert not torch.equal(calls[1], before)
    assert torch.equal(model[0].weight, before)
