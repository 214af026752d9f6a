"""What suits a rule is taken where nothing else is said."""

from typing import Any

import pytest
import torch
from torch import nn

from equipoise import PolicyClient
from equipoise.errors import InvalidRequestError
from equipoise.torch import (
    GhostContributions,
    LossesAlone,
    TargetDirection,
    TrainingOptions,
    WeightedSteps,
    weighted_steps,
)
from equipoise.torch.training import Measuring
from tests.client.torch.models import class_losses
from tests.client.torch.test_norm_matched import batch, network
from tests.patience import PATIENT
from tests.servers import ServerProcess

N, BATCH, STEPS = 40, 8, 20


def test_a_rule_without_needs_of_its_own_measures_plain_contributions_of_every_batch() -> None:
    assert TrainingOptions().measuring("ema_sign") == TrainingOptions().measuring(None) == Measuring()


def test_what_is_said_is_taken_and_the_rest_suits_the_rule() -> None:
    suits = TrainingOptions().measuring("strata")
    assert (suits.measure_every, suits.compare_every, suits.norm_matched, suits.batches_per_refresh) == (0, 6, True, 1)
    told = TrainingOptions(measure_every=5, batches_per_refresh="all", momentum=0.0).measuring("strata")
    assert (told.measure_every, told.batches_per_refresh, told.momentum) == (5, "all", 0.0)
    assert told.step_noise == suits.step_noise > 0
    assert TrainingOptions(norm_matched=False).measuring("strata").step_noise == 0.0
    assert TrainingOptions(norm_matched=True).measuring("ema_sign").step_noise == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure_every": -1}, "measure_every = -1: must be an integer of at least 0"),
        ({"compare_every": -1}, "compare_every = -1: must be an integer of at least 0"),
        ({"refresh_every": 0}, "refresh_every = 0: must be an integer of at least 1"),
        ({"look_every": 1.5}, "look_every = 1.5: must be an integer of at least 1"),
        ({"batches_per_refresh": "some"}, "batches_per_refresh = .*some.*: must be all or an integer of at least 1"),
        ({"batches_per_refresh": 0}, "batches_per_refresh = 0: must be all or an integer of at least 1"),
        ({"momentum": 1.0}, r"momentum = 1.0: must be in \[0, 1\)"),
        ({"step_noise": -0.5}, "step_noise = -0.5: must be finite and not negative"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        TrainingOptions(**options)


@pytest.mark.parametrize("measure_every", [0, 3])
def test_two_lines_are_the_long_way_with_all_that_suits_strata(server: ServerProcess, measure_every: int) -> None:
    target = [batch(10, 1), batch(10, 2), batch(4, 3)]
    options = TrainingOptions(measure_every=measure_every) if measure_every else None

    def trained(name: str, *, long: bool) -> list[torch.Tensor]:
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        settings = {"strata": 2, "min_count": 4, "memory": 40, "window": 16, "min_target_losses": 4}
        with PolicyClient(
            server.address, policy=name, num_examples=N, rule="strata", settings=settings, timeout=PATIENT
        ) as client:
            if long:
                steps = by_hand(client, model, target, measure_every)
            else:
                steps = weighted_steps(client, model, class_losses, target, options=options)
            for step in range(STEPS):
                ids = [(step * BATCH + row) % N for row in range(BATCH)]
                with steps.capture(ids) as weighted:
                    weighted.loss(batch(BATCH, 100 + step % 5)).backward()
                assert client.flush(60)  # so that contributions are there before the next losses
                optimizer.step()
                optimizer.zero_grad()
            assert client.status().version == STEPS + (-(-STEPS // 3) if measure_every else 0)
            assert float(client.read_weights().std()) > 0
        return [parameter.detach() for parameter in model.parameters()]

    names = [f"options-{way}-{measure_every}" for way in ("short", "long")]
    for one, other in zip(trained(names[0], long=False), trained(names[1], long=True), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def by_hand(client: PolicyClient, model: nn.Module, target: list[Any], measure_every: int) -> WeightedSteps:
    if not measure_every:
        direction = TargetDirection(model, class_losses, target, look_every=10, batches_per_refresh=1)
        return WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=6)
    direction = TargetDirection(
        model,
        class_losses,
        target,
        refresh_every=1,
        look_every=10,
        batches_per_refresh=1,
        momentum=0.85,
        norm_matched=True,
        step_noise=2.0,
    )
    return WeightedSteps(client, GhostContributions(model, direction), measure_every=measure_every, compare_every=6)
