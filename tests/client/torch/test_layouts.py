"""Rows and structure that change from step to step: contributions are right, or left out, and never wrong."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils.checkpoint
from torch import Tensor, nn

from equipoise.torch import (
    GhostContributions,
    OnePassContributions,
    SketchContributions,
    TargetDirection,
    UnsupportedModuleError,
)
from equipoise.torch.owners import CoupledError, owners_of
from equipoise.torch.rows import Layout, Rows
from tests.client.torch.models import reference, relative_error
from tests.client.torch.zoo import WORDS, CausalLanguage, Experts, Language, by_segment, pairs, shaken, squares


def checked(contributions: GhostContributions, batch: Any, count: int) -> bool:
    """One step: whether its contributions are known; if so they are right."""
    with contributions.capture(range(count)) as capture:
        capture.losses(batch).sum().backward()
    found = capture.contributions
    if found.isnan().all():
        assert not capture.fields()["scored"].any()  # type: ignore[union-attr]
        return False
    right = reference(contributions.model, contributions.direction, batch)
    assert relative_error(found, right) < 1e-6
    return True


def segments(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def packed_losses(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Tokens [R, T] and the example of each; the first token of an example is not predicted."""
    ids, owners = batch
    losses = F.cross_entropy(model(ids, owners).flatten(0, 1), ids.flatten(), reduction="none")
    first = F.pad(owners.flatten()[1:] != owners.flatten()[:-1], (1, 0), value=True)
    return by_segment(losses * ~first, owners.flatten(), int(owners.max()) + 1)


def test_packed_rows_change_with_every_step() -> None:
    """As many examples as before, in other places; the first batch looks like an ordinary one."""
    torch.manual_seed(0)
    model = shaken(CausalLanguage())
    rows = [
        segments([4, 4, 4])[None],
        segments([2, 7, 3])[None],
        segments([6, 3, 3])[None],
        segments([3, 9])[None],
        segments([12])[None],
        segments([5, 2, 3, 2, 4, 8]).view(2, 12),
        torch.stack([segments([12]), segments([12]) + 1]),
    ]
    batches = [(torch.randint(WORDS, owners.shape), owners) for owners in rows]
    contributions = GhostContributions(model, TargetDirection(model, packed_losses, [batches[1]]))
    known = [checked(contributions, batch, int(batch[1].max()) + 1) for batch in batches]
    assert known.count(False) <= 1


def test_padding_free_tokens_whose_number_divides() -> None:
    torch.manual_seed(0)
    model = shaken(nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, WORDS)))

    def losses_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, owners = batch
        return by_segment(F.cross_entropy(model(ids), ids, reduction="none"), owners, int(owners.max()) + 1)

    batches = [
        (torch.randint(WORDS, (12,)), segments(lengths)) for lengths in ([4, 4, 4], [3, 4, 5], [2, 4, 6], [1, 11])
    ]
    contributions = GhostContributions(model, TargetDirection(model, losses_of, [batches[0]]))
    assert all(checked(contributions, batch, int(batch[1].max()) + 1) for batch in batches)


@pytest.mark.parametrize("count", [2, 6])
def test_experts_are_routed_otherwise_at_every_step(count: int) -> None:
    """Also where the first step sends all to one expert, and where rows happen to be as many as examples."""
    torch.manual_seed(0)
    model = shaken(Experts(4))
    contributions = GhostContributions(model, TargetDirection(model, squares, [torch.randn(9, 5).double()]))
    start = torch.randn(1, 5).double().expand(count, 5) + 1e-3 * torch.randn(count, 5).double()
    batches = [start, *(torch.randn(count, 5).double() for _ in range(30))]
    known = [checked(contributions, batch, count) for batch in batches]
    assert known[0]
    assert known.count(False) <= 4


def test_batches_of_other_sizes() -> None:
    torch.manual_seed(0)
    model = shaken(Language("[None]"))

    def losses_of(model: Any, ids: Tensor) -> Tensor:
        losses = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="none")
        return losses.view_as(ids).mean(1)

    contributions = GhostContributions(model, TargetDirection(model, losses_of, [torch.randint(WORDS, (5, 7))]))
    for shape in ((1, 6), (4, 6), (6, 6), (1, 4), (3, 9), (9, 3), (2, 1), (1, 1)):
        assert checked(contributions, torch.randint(WORDS, shape), shape[0])


class Sometimes(nn.Module):
    """Uses another layer, or one by a function, when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.second, self.third = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.way = "one"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.always(x)
        if self.way == "module":
            y = self.second(y)
        elif self.way == "function":
            y = F.linear(y, self.third.weight)
        elif self.way == "few":
            y = y + F.pad(self.always(x[:2]), (0, 0, 0, len(x) - 2))
        return y


@pytest.mark.parametrize("way", ["module", "function", "few"])
def test_layers_that_come_later(way: str) -> None:
    """A step unlike the surveyed one is left out and the next is surveyed; functions are found at a refresh."""
    torch.manual_seed(0)
    model = shaken(Sometimes())
    direction = TargetDirection(model, squares, [torch.randn(4, 5).double()], refresh_every=2)
    contributions = GhostContributions(model, direction)
    x = torch.randn(4, 5).double()
    assert checked(contributions, x, 4)
    assert checked(contributions, x, 4)
    assert model.__setattr__("way", way) is None
    assert not checked(contributions, x, 4)
    assert contributions.coverage.left_out == 1
    assert checked(contributions, x, 4)
    assert checked(contributions, x, 4)


class Dropped(nn.Module):
    """Layers that are left out by chance, one of them seen through as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([*(nn.Linear(5, 5) for _ in range(4)), nn.Sequential(nn.Bilinear(5, 5, 5))])
        self.chosen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for index in self.chosen:
            layer = self.layers[index]
            x = x + (layer[0](x, x) if isinstance(layer, nn.Sequential) else layer(x)).tanh()
        return x


def test_layers_that_are_dropped_by_chance_are_learnt_once() -> None:
    torch.manual_seed(0)
    model = shaken(Dropped())
    assert isinstance(model, Dropped)
    model.chosen = list(range(5))
    direction = TargetDirection(model, squares, [torch.randn(4, 5).double()], refresh_every=10**9)
    direction.refresh()
    contributions = GhostContributions(model, direction)
    known = []
    for step in range(40):
        model.chosen = [index for index in range(5) if torch.rand(()) < 0.6 or index == step % 5]
        known.append(checked(contributions, torch.randn(4, 5).double(), 4))
    assert known.count(False) <= 4
    assert all(known[20:])


class Recomputed(nn.Module):
    """A module taken as a whole under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(5, 5)
        self.whole = nn.Sequential(nn.Linear(5, 5), nn.PReLU(5), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.utils.checkpoint.checkpoint(self.whole, self.start(x), use_reentrant=False)
        return y


def test_what_is_checkpointed_and_called_again_is_known_from_the_second_step_on() -> None:
    """Until then its inputs would be the memory that is saved. The first step that is known is the one verified."""
    torch.manual_seed(0)
    model = shaken(Recomputed()).train()
    direction = TargetDirection(model, squares, [torch.randn(4, 5).double()], refresh_every=3)
    contributions = GhostContributions(model, direction)
    contributions.verify_first()
    x = torch.randn(4, 5).double()
    for number in range(6):
        with contributions.capture(range(4)) as capture:
            random = torch.get_rng_state()
            capture.losses(x).mean().backward()
        assert bool(capture.contributions.isfinite().all()) == (number > 0)
        assert capture.verified is (False if number == 0 else True if number == 1 else None)
        if number:
            torch.set_rng_state(random)
            assert relative_error(capture.contributions, reference(model, direction, x)) < 1e-10
    assert contributions.coverage.gaps == 0


def test_a_forward_pass_on_other_rows_before_the_losses() -> None:
    torch.manual_seed(0)
    model = shaken(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    contributions = GhostContributions(model, TargetDirection(model, squares, [torch.randn(4, 5).double()]))
    x = torch.randn(6, 5).double()
    for _ in range(2):
        with contributions.capture(range(6)) as capture:
            model(x[:4])
            capture.losses(x).mean().backward()
        assert relative_error(capture.contributions, reference(model, contributions.direction, x)) < 1e-10


def test_one_pass_trains_on_a_step_that_it_cannot_see_through() -> None:
    torch.manual_seed(0)
    model = shaken(Sometimes())
    contributions = OnePassContributions(model, TargetDirection(model, squares, [torch.randn(4, 5).double()]))
    x, weights = torch.randn(4, 5).double(), torch.rand(4).double()
    for way, known in (("one", True), ("module", False), ("module", True)):
        model.way = way
        model.zero_grad()
        with contributions.capture(range(4)) as capture:
            capture.losses(x)
            assert bool(capture.contributions.isfinite().all()) == known
            capture.backward(weights)
        gradients = torch.autograd.grad(
            (weights * squares(model, x)).mean(), list(model.parameters()), allow_unused=True
        )
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient)


def test_sketches_are_of_plain_batches() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    two = torch.randn(6, 5), torch.randn(6, 5)
    contributions = SketchContributions(model, TargetDirection(model, pairs, [two]))
    with contributions.capture(range(6)) as capture:
        losses = capture.losses(two)
        with pytest.raises(UnsupportedModuleError, match=r"use GhostContributions.* for packed and paired examples"):
            losses.mean().backward()


def owned(owners: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses of which each depends on its rows, and the rows."""
    y = torch.randn(*owners.shape, 5, dtype=dtype, requires_grad=True)
    each = (y.float() * torch.randn(5)).square().sum(-1).flatten()
    return torch.zeros(count).index_add(0, owners.flatten(), each), y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 70, 700])
def test_owners_are_found_at_any_precision(dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(0)
    owners = torch.cat([torch.randperm(count), torch.randint(count, (2 * count,))])
    losses, y = owned(owners, count, dtype)
    found = owners_of(losses, y)
    assert found is not None
    assert torch.equal(found, owners)


def test_owners_of_rows_without_a_gradient_are_those_of_the_next() -> None:
    torch.manual_seed(0)
    owners = segments([3, 2, 4])
    y = torch.randn(9, 5, requires_grad=True)
    known = torch.tensor([False, True, True, False, True, False, True, True, False])
    losses = torch.zeros(3).index_add(0, owners, y.square().sum(-1) * known)
    assert torch.equal(owners_of(losses, y), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]))  # type: ignore[arg-type]
    assert owners_of(losses.detach() + (0 * y).sum() * 0, y) is None


def test_rows_of_several_examples_are_told() -> None:
    torch.manual_seed(0)
    y = torch.randn(6, 5, requires_grad=True)
    for losses in ((y @ y.T).logsumexp(1), (y - y.mean(0)).square().sum(1)):
        with pytest.raises(CoupledError):
            owners_of(losses, y)


@pytest.mark.parametrize("owners", [None, torch.tensor([2, 0, 1, 1, 0, 2])])
def test_rows_sum_and_spread(owners: Tensor | None) -> None:
    """Against a loop over the rows."""
    torch.manual_seed(0)
    rows, a, b = Rows(3, owners), torch.randn(6, 4), torch.randn(6, 4)
    each = torch.arange(6) // 2 if owners is None else owners
    expected = torch.stack([sum(a[i] @ b[i] for i in range(6) if each[i] == n) for n in range(3)])
    torch.testing.assert_close(rows.dots(a, b), expected)
    torch.testing.assert_close(rows.sums(a * b), expected)
    weights = torch.rand(3)
    torch.testing.assert_close(rows.weighted(a, weights), a * weights[each][:, None])
    only = torch.zeros(6, 4)
    only[3, 1] = 1.0
    for example in range(3):
        chosen = torch.arange(3) == example
        assert bool(rows.touched(only, chosen)) == (each[3] == example)


def test_routed_rows_are_not_taken_for_examples() -> None:
    layout = Layout(4)
    layout.note((4, 6, 8))
    assert layout.rows((4, 8)) is not None
    assert layout.rows((24, 8)) is not None
    assert layout.rows((8, 8)) is None
    assert layout.rows((7, 8)) is None
    assert layout.rows(()) is None
