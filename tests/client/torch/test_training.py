"""Contributions do not depend on how the loss is scaled, cut, rounded or recomputed on its way back."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise.torch import (
    CaptureError,
    Contributions,
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    OnePassContributions,
    TargetDirection,
    join,
    weighted_mean,
)
from tests.client.torch.models import FORWARD_MODE, gpt2, llama, lm_losses, reference, relative_error, tokens

COUNT = 12


def prepared(model: nn.Module) -> tuple[TargetDirection, dict[str, Tensor], Tensor]:
    """A direction, a batch and its contributions."""
    direction = TargetDirection(model, lm_losses, [tokens(8, seed=1)])
    direction.refresh()
    batch = tokens(COUNT, padded=True)
    return direction, batch, reference(model, direction, batch)


def part(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: values[rows] for name, values in batch.items()}


def test_accumulated_micro_batches_are_one_step() -> None:
    model = gpt2()
    direction, batch, expected = prepared(model)
    contributions, captures = GhostContributions(model, direction), []
    for start, stop in ((0, 5), (5, 12)):
        with contributions.capture(range(100 + start, 100 + stop)) as capture:
            losses = capture.losses(part(batch, slice(start, stop)))
            (losses.sum() / COUNT).backward()
        captures.append(capture)
    ids, fields = join(*captures)
    assert ids.tolist() == list(range(100, 112))
    assert relative_error(torch.tensor(fields["contributions"]), expected) < 1e-4
    assert fields["scored"].all()  # type: ignore[union-attr]
    torch.testing.assert_close(torch.tensor(fields["losses"]), lm_losses(model, batch).detach())
    whole = torch.autograd.grad(lm_losses(model, batch).mean(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_accumulated_one_pass_gradients() -> None:
    model = gpt2()
    direction, batch, expected = prepared(model)
    contributions = OnePassContributions(model, direction)
    for rows in (slice(0, 6), slice(6, 12)):
        with contributions.capture(range(6)) as capture:
            capture.losses(part(batch, rows))
            assert relative_error(capture.contributions, expected[rows]) < 1e-4
            capture.backward(torch.ones(6) / 2)
    whole = torch.autograd.grad(lm_losses(model, batch).mean(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_rows_of_weight_zero_are_not_scored_by_hooks_but_by_a_second_pass() -> None:
    model = gpt2()
    direction, batch, expected = prepared(model)
    weights = torch.ones(COUNT)
    weights[[2, 7]] = 0
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        weighted_mean(capture.losses(batch), weights).backward()
    scored = torch.tensor(capture.fields()["scored"])
    assert scored.tolist() == (weights != 0).tolist()
    assert capture.contributions[~scored].isnan().all()
    assert relative_error(capture.contributions[scored], expected[scored]) < 1e-4
    with FiniteDifferenceContributions(model, direction).capture(range(COUNT)) as capture:
        weighted_mean(capture.losses(batch), weights).backward()
    assert torch.tensor(capture.fields()["scored"]).all()


class Checkpointed(nn.Module):
    """A small network whose middle is recomputed on the way back."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.table = nn.Embedding(61, 8)
        self.middle = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))
        self.head = nn.Linear(8, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        plain = self.reentrant is None or not self.training
        middle = self.middle(x) if plain else self._recomputed(x)
        y: Tensor = self.head(x + middle)
        return y

    def _recomputed(self, x: Tensor) -> Any:
        return checkpoint(self.middle, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="none").view_as(ids).mean(1)

    results = []
    for kind in (None, reentrant):
        torch.manual_seed(3)
        model = Checkpointed(kind)
        ids = tokens(COUNT)["input_ids"]
        direction = TargetDirection(model, losses_of, [tokens(8, seed=1)["input_ids"]])
        with GhostContributions(model, direction).capture(range(COUNT)) as capture:
            capture.losses(ids).mean().backward()
        results.append((capture.contributions, [parameter.grad for parameter in model.parameters()]))
    (plain, gradients), (recomputed, same_gradients) = results
    torch.testing.assert_close(recomputed, plain)
    torch.testing.assert_close(same_gradients, gradients)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant: bool) -> None:
    model = llama()
    direction, batch, expected = prepared(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        capture.losses(batch).mean().backward()
    assert relative_error(capture.contributions, expected) < 1e-4


def test_one_pass_with_checkpoints() -> None:
    """Right without reentrance; with it the first pass has no gradients to show, which is said."""

    def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
        return model(ids).square().mean((1, 2))

    for reentrant in (True, False):
        torch.manual_seed(3)
        model = Checkpointed(reentrant)
        model.middle[3].p = 0.0
        ids = tokens(COUNT)["input_ids"]
        direction = TargetDirection(model, losses_of, [tokens(8, seed=1)["input_ids"]])
        with OnePassContributions(model, direction).capture(range(COUNT)) as capture:
            capture.losses(ids)
            if reentrant:
                with pytest.raises(CaptureError, match=r"^middle\.0, middle\.1, middle\.4: called without gradients"):
                    capture.fields()
                continue
            capture.backward(torch.ones(COUNT))
        assert relative_error(capture.contributions, reference(model, direction, ids)) < 1e-4
        expected_gradients = torch.autograd.grad(losses_of(model, ids).mean(), list(model.parameters()))
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], list(expected_gradients))


def test_checkpointing_keeps_its_memory() -> None:
    """What is recomputed is not held meanwhile by us."""
    saved: list[int] = []
    for kind in (None, False):
        model = Checkpointed(kind)
        direction = TargetDirection(model, lambda m, ids: m(ids).square().mean((1, 2)), [torch.zeros(2, 2).long()])
        contributions = GhostContributions(model, direction)
        alive: list[Any] = []
        model.middle[4].register_forward_pre_hook(lambda _module, args, alive=alive: alive.append(_weak(args[0])))
        with contributions.capture(range(COUNT)) as capture:
            losses = capture.losses(torch.zeros(COUNT, 4).long())
            saved.append(sum(reference() is not None for reference in alive))
            losses.mean().backward()
    assert saved == [1, 0]


def _weak(tensor: Tensor) -> Any:
    import weakref

    return weakref.ref(tensor.untyped_storage())


@pytest.mark.parametrize("build", [gpt2, llama])
def test_bfloat16_autocast(build: Any) -> None:
    """Forward and backward round to 8 bits: contributions are as exact as the gradients themselves, about 1 %."""
    model = build()
    _, batch, _ = prepared(model)

    def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view_as(labels).sum(1) / (labels != -100).sum(1)

    direction = TargetDirection(model, losses_of, [tokens(8, seed=1)])
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        capture.losses(batch).mean().backward()
    precise = copy.deepcopy(model).double()
    exact = TargetDirection(precise, lm_losses, [tokens(8, seed=1)])
    exact.refresh()
    expected = reference(precise, exact, batch)
    assert relative_error(capture.contributions, expected) < 0.05
    with OnePassContributions(model, direction).capture(range(COUNT)) as capture:
        capture.losses(batch)
        assert relative_error(capture.contributions, expected) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_half_precision_loss(dtype: torch.dtype) -> None:
    """What a GradScaler multiplies losses by does not show in contributions; its overflow is not scored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    batch = (torch.randn(COUNT, 6), torch.randint(3, (COUNT,)))

    def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1], reduction="none")

    direction = TargetDirection(model, losses_of, [batch])
    direction.refresh()
    expected = reference(model, direction, batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # type: ignore[attr-defined]
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        scaler.scale(capture.losses(batch).mean()).backward()
    assert relative_error(capture.contributions, expected) < 0.05
    model.zero_grad()
    with OnePassContributions(model, direction, scaler=scaler).capture(range(COUNT)) as capture:
        capture.losses(batch)
        assert relative_error(capture.contributions, expected) < 0.05
        capture.backward(torch.ones(COUNT))
    plain = torch.autograd.grad(losses_of(model, batch).mean() * 2.0**10, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), plain, strict=True):
        assert parameter.grad is not None
        assert relative_error(parameter.grad, gradient.double()) < 0.05
    if dtype is torch.float16:
        with GhostContributions(model, direction).capture(range(COUNT)) as capture:
            (capture.losses(batch).mean() * 1e30).backward()
        assert not capture.fields()["scored"].any()  # type: ignore[union-attr]


def test_a_weighted_token_loss() -> None:
    """A loss is what the user says: here the sum over tokens, of a model in bfloat16 throughout."""

    def losses_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["input_ids"][:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
        return (losses * torch.linspace(0, 1, labels.shape[1])).sum(1)

    model = llama().bfloat16()
    direction = TargetDirection(model, losses_of, [tokens(8, seed=1)])
    batch = tokens(COUNT)
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        capture.losses(batch).mean().backward()
    assert relative_error(capture.contributions, reference(model, direction, batch)) < 0.03


@pytest.mark.parametrize("method", [FiniteDifferenceContributions, JvpContributions])
@FORWARD_MODE
def test_a_second_pass_sees_the_dropout_of_the_first(method: type[Contributions[Any]]) -> None:
    model = gpt2(dropout=0.3)
    direction = TargetDirection(model, lm_losses, [tokens(8, seed=1)])
    contributions, batch = method(model, direction), tokens(COUNT)
    direction.refresh()
    state = torch.get_rng_state()
    with contributions.capture(range(COUNT)) as capture:
        capture.losses(batch)
    torch.set_rng_state(state)
    assert relative_error(capture.contributions, reference(model, direction, batch)) < 0.02


def test_a_forward_pass_beside_the_training_one_is_not_taken_for_it() -> None:
    model = gpt2()
    direction, batch, expected = prepared(model)
    with GhostContributions(model, direction).capture(range(COUNT)) as capture:
        with torch.no_grad():
            lm_losses(model, tokens(3))
        losses = capture.losses(batch)
        other = lm_losses(model, tokens(COUNT, seed=9)).mean()
        losses.mean().backward()
        other.backward()
    assert relative_error(capture.contributions, expected) < 1e-4


@FORWARD_MODE
@pytest.mark.parametrize(
    "method", [GhostContributions, OnePassContributions, FiniteDifferenceContributions, JvpContributions]
)
def test_verify_confirms_a_method_and_changes_nothing(method: type[Contributions[Any]]) -> None:
    model = gpt2(dropout=0.1)
    contributions = method(model, TargetDirection(model, lm_losses, [tokens(8, seed=1)]))
    state = torch.get_rng_state()
    assert contributions.verify(tokens(COUNT, padded=True)) < 0.02
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
