"""Sources explored first, then drawn by weight: which batches are measured, what is sent of them, and what goes on."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from equipoise import PolicyClient
from equipoise.errors import InvalidRequestError
from equipoise.torch import (
    CaptureError,
    DirectionError,
    GhostContributions,
    Mixture,
    SketchContributions,
    TargetDirection,
    TrainingOptions,
    WeightedSteps,
)
from tests.client.torch.models import reference
from tests.servers import ServerProcess

BATCH = 12
OPTIONS: dict[str, Any] = {
    "sampled": True,
    "measure_every": 2,
    "measure_from": 3,
    "measure_until": 8,
    "guard_every": 3,
    "relative": True,
    "verify": False,
}
MEASURED, HEARD = [3, 5, 7], [8, 11]


class Sent:
    """Notes what is sent, as a policy whose server never answers; by a weight of 1 for all."""

    rule = "exponentiated_gradient"

    def __init__(self) -> None:
        self.sent: list[tuple[Any, dict[str, Any]]] = []

    def weights(self, ids: Any) -> Any:
        return np.ones(len(ids), np.float32)

    def submit(self, ids: Any = None, **fields: Any) -> None:
        self.sent.append((ids, fields))


class Asked(Sent):
    """One that weighs in the same step."""

    rule = "strata"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def step(self, ids: Any, **fields: Any) -> Any:
        self.asked.append((ids, fields))
        return SimpleNamespace(weights=np.ones(len(ids), np.float32))


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = (model(batch[0])[:, 0] - batch[1]).square()
    return loss


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def rows(count: int, seed: int, *, wrong: bool = False) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1) * (-1 if wrong else 1)


def direction_of(model: nn.Module, **options: Any) -> TargetDirection:
    return TargetDirection(model, losses_of, [rows(32, 90)], guard_batches=[rows(16, 91)], refresh_every=1, **options)


def train(steps: WeightedSteps, numbers: range) -> dict[int, Tensor]:
    """Trains on batches of two ids; what was contributed by definition, of those measured."""
    model = steps.contributions.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = {}
    for number in numbers:
        x, y = rows(BATCH, number)
        with steps.capture(torch.arange(BATCH) % 2) as step:
            step.loss((x, y)).backward()
        if step.measured:
            found[number] = reference(model, steps.contributions.direction, (x, y))
        optimizer.step()
        optimizer.zero_grad()
    return found


def expected_of(contributions: Tensor) -> Any:
    """By scipy: relative to the batch, times 1 - 1/F."""
    values = contributions.double().numpy()
    spread = scipy.stats.median_abs_deviation(values, scale=1 / 1.4826)
    cut = np.clip((values - np.median(values)) / spread, -2, 2)
    cut -= cut.mean()
    return cut * max(0.0, 1 - 1 / scipy.stats.f_oneway(cut[::2], cut[1::2]).statistic)


def test_batches_of_the_schedule_are_sent_relative_and_guard_losses_after_it() -> None:
    model, plain, client = network(), network(), Sent()
    direction = direction_of(model)
    steps = WeightedSteps(client, GhostContributions(model, direction), **OPTIONS)
    found = train(steps, range(13))
    assert list(found) == MEASURED
    measured, heard = client.sent[:3], client.sent[3:]
    for (ids, fields), contributions in zip(measured, found.values(), strict=True):
        assert ids.tolist() == [0, 1] * (BATCH // 2)
        np.testing.assert_allclose(fields["contributions"], expected_of(contributions), rtol=1e-3, atol=1e-4)
        assert "target_loss" in fields
        assert "guard_loss" not in fields  # weights are still being learned
    assert [ids for ids, _ in heard] == [None] * len(HEARD)
    assert all(set(fields) == {"guard_loss", "omit_weights"} for _, fields in heard)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for number in range(13):
        if number in HEARD:
            with torch.no_grad():
                loss = float(losses_of(plain, rows(16, 91)).mean())
            assert heard[HEARD.index(number)][1]["guard_loss"] == pytest.approx(loss, rel=1e-6)
        losses_of(plain, rows(BATCH, number)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)  # drawn by weight, and not weighed
    values = steps.metrics()
    assert values["policy/guard_loss"] == pytest.approx(loss)
    last = found[7].double().numpy()
    assert values["policy/plain_sim"] == pytest.approx(last.mean() / last.std(ddof=1), rel=1e-3)


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_gradients_are_read_while_batches_are_measured_and_no_longer(noise: float) -> None:
    """Of a norm-matched direction, also before the first batch that is measured: a batch is worth its price."""
    model = network()
    direction = direction_of(model, norm_matched=True, step_noise=noise)
    steps = WeightedSteps(Sent(), GhostContributions(model, direction), **OPTIONS)
    averages = []
    for number in range(10):
        train(steps, range(number, number + 1))
        averages.append({name: value.clone() for name, value in direction.state_dict()["gradients"].items()})
    changed = [
        number
        for number in range(1, 10)
        if any(not torch.equal(averages[number - 1][name], value) for name, value in averages[number].items())
    ]
    assert changed == [1, 2, 3, 4, 5, 6, 7]


def test_losses_that_come_first_are_sent_of_all_batches() -> None:
    model, client = network(), Asked()
    options: dict[str, Any] = {"measure_from": 2, "measure_until": 7, "measure_every": 2, "verify": False}
    steps = WeightedSteps(client, GhostContributions(model, direction_of(model)), **options)
    assert list(train(steps, range(9))) == [2, 4, 6]
    assert [set(fields) for _, fields in client.asked] == [{"losses", "scored"}] * 9
    assert ["contributions" in fields for _, fields in client.sent] == [True] * 3


def test_micro_batches_are_compared_together() -> None:
    model, client = network(), Sent()
    direction = direction_of(model)
    steps = WeightedSteps(
        client, GhostContributions(model, direction), accumulate=2, sampled=True, relative=True, verify=False
    )
    parts = []
    for number in range(2):
        x, y = rows(BATCH, number)
        with steps.capture(torch.arange(BATCH) % 2) as step:
            step.loss((x, y)).backward()
        parts.append(reference(model, direction, (x, y)))
    [(_, fields)] = client.sent
    np.testing.assert_allclose(fields["contributions"], expected_of(torch.cat(parts)), rtol=1e-3, atol=1e-4)


def test_rows_that_are_not_known_are_left_out_of_the_comparison() -> None:
    model, client = network(), Sent()
    direction = direction_of(model)
    steps = WeightedSteps(client, GhostContributions(model, direction), sampled=True, relative=True, verify=False)
    x, y = rows(BATCH + 2, 0)
    train(steps, range(1))
    y[3:5] = torch.nan
    with steps.capture(torch.arange(BATCH + 2) % 2) as step:
        step.loss((x, y)).backward()
    fields = client.sent[-1][1]
    known = np.delete(np.arange(BATCH + 2), [3, 4])
    assert fields["scored"].tolist() == [row in known for row in range(BATCH + 2)]
    alone = reference(model, direction, (x[known], y[known]))
    np.testing.assert_allclose(fields["contributions"][known], expected_of(alone), rtol=1e-3, atol=1e-4)


def drawn_job(client: PolicyClient) -> tuple[WeightedSteps, Mixture]:
    model = network()
    sources = {
        name: list(zip(*rows(40, seed, wrong=wrong), strict=True))
        for name, seed, wrong in (("right", 1, False), ("wrong", 2, True))
    }
    mixture = Mixture(sources, client=client, num_samples=8 * BATCH, refresh_every=BATCH, explore=8 * BATCH)
    direction = direction_of(model, momentum=0.5)
    return WeightedSteps(client, GhostContributions(model, direction), **OPTIONS), mixture


def learn(steps: WeightedSteps, mixture: Mixture, count: int, *, save_at: int | None = None) -> tuple[Any, Any]:
    """The ids of so many batches, over as many epochs as that takes; and the job's state before one of them."""
    model, saved = steps.contributions.model, None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    seen: list[list[int]] = []
    while len(seen) < count:
        for ids, batch in DataLoader(mixture.dataset, batch_size=BATCH, sampler=mixture):  # type: ignore[arg-type]
            with steps.capture(ids) as step:
                step.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(ids.tolist())
            if len(seen) == save_at:
                weights = {name: value.clone() for name, value in model.state_dict().items()}
                saved = weights, steps.state(sampler=mixture)
            if len(seen) == count:
                break
    return seen, saved


@pytest.mark.parametrize("save_at", [4, 8, 11])
def test_sources_are_explored_alike_then_drawn_by_weight_also_after_a_resumption(
    server: ServerProcess, save_at: int
) -> None:
    settings = {"learning_rate": 1.0, "unit": 1.0, "decay": 0.0, "guard": False}
    options: dict[str, Any] = {"num_examples": 2, "rule": "exponentiated_gradient", "settings": settings}
    name = f"explore-{save_at}"
    with PolicyClient(server.address, policy=name, when_lost="wait", **options) as client:
        steps, mixture = drawn_job(client)
        seen, (weights, state) = learn(steps, mixture, 20, save_at=save_at)
        shares = [np.mean(batch) for batch in seen]  # of the wrong source
        assert shares[:8] == [0.5] * 8
        assert np.mean(shares[8:]) < 0.3
        assert client.flush(30)
        assert client.status().version == len(MEASURED) + 4  # heard at 8, 11, 14 and 17
        again, other = drawn_job(client.for_policy(name))
        again.contributions.model.load_state_dict(weights)
        resumed = again.resume(state, sampler=other)
        assert again.batches == save_at
        assert learn(again, other, 20 - save_at)[0] == seen[save_at:]
        resumed.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure_every": -1}, "measure_every = -1: must be an integer of at least 0"),
        ({"compare_every": 1.5}, "compare_every = 1.5: must be an integer of at least 0"),
        ({"measure_every": 0, "compare_every": 6, "measure_until": 4}, "measure_until = 4: needs measure_every"),
        ({"measure_from": 4, "measure_until": 4}, "measure_until = 4: must be an integer above measure_from"),
        ({"guard_every": 3}, "guard_every = 3: needs measure_until"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_named(options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(CaptureError, match=message):
        WeightedSteps(Sent(), GhostContributions(model, direction_of(model)), **options)
    with pytest.raises(InvalidRequestError, match=message):
        TrainingOptions(**options)


def test_what_is_missing_is_named() -> None:
    model = network()
    direction = direction_of(model)
    with pytest.raises(CaptureError, match=r"measure_from = 3: rule exponentiated_gradient needs .* sampled=True"):
        WeightedSteps(Sent(), GhostContributions(model, direction), measure_from=3).capture([0])
    with pytest.raises(CaptureError, match="relative = True: SketchContributions"):
        WeightedSteps(Sent(), SketchContributions(model, direction), relative=True)
    with pytest.raises(InvalidRequestError, match="relative = True: is not for method sketch"):
        TrainingOptions(method="sketch", relative=True)
    alone = TargetDirection(model, losses_of, [rows(8, 0)])
    with pytest.raises(DirectionError, match="guard_batches = None: must be given"):
        WeightedSteps(Sent(), GhostContributions(model, alone), sampled=True, measure_until=4, guard_every=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative": True}, "relative = True: is for contributions, and measure_every = 0 measures none"),
        ({"measure_until": 4}, "measure_until = 4: needs measure_every, which is 0"),
    ],
)
def test_what_is_for_contributions_is_refused_where_the_rule_makes_do_with_losses(
    options: dict[str, Any], message: str
) -> None:
    client: Any = Asked()
    with pytest.raises(CaptureError, match=message):
        TrainingOptions(**options).steps(client, network(), losses_of, [rows(8, 0)])


def test_options_of_frameworks_reach_the_steps() -> None:
    model = network()
    options = TrainingOptions(**{**OPTIONS, "refresh_every": 2})
    client: Any = Sent()
    steps = options.steps(client, model, losses_of, [rows(32, 90)], guard=[rows(16, 91)])
    found = train(steps, range(13))
    assert list(found) == MEASURED
    for (_, fields), contributions in zip(client.sent, found.values(), strict=False):
        np.testing.assert_allclose(fields["contributions"], expected_of(contributions), rtol=1e-3, atol=1e-4)
    assert [set(fields) for _, fields in client.sent[len(MEASURED) :]] == [{"guard_loss", "omit_weights"}] * len(HEARD)
