"""Losses first: weights of the same step, from a real server, and contributions of all or of some batches after it."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equipoise import PolicyClient, Timeout
from equipoise.errors import StepRefusedError
from equipoise.torch import (
    CaptureError,
    FiniteDifferenceContributions,
    GhostContributions,
    JvpContributions,
    SketchContributions,
    TargetDirection,
    WeightedSteps,
)
from tests.client.torch.models import reference, relative_error
from tests.client.torch.recording import Recording
from tests.pairs import run_pair
from tests.patience import PATIENT
from tests.servers import ServerProcess

COUNT, BATCH = 200, 20
QUICK = {"strata": 2, "min_count": 4, "memory": 100, "lower_below": 0.0, "raise_above": 1.0}
"""Weights act after a step or two."""


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training examples of which a quarter has the wrong label, and target examples."""
    generator = torch.Generator().manual_seed(1)
    x, target, truth = (torch.randn(n, 8, generator=generator) for n in (COUNT, 64, 1))
    y = (x @ truth[0] > 0).long()
    y[: COUNT // 4] = 1 - y[: COUNT // 4]
    return (x, y), (target, (target @ truth[0] > 0).long())


def batches(count: int) -> list[NDArray[np.int64]]:
    """Ids of some steps; in the first ten each example comes once."""
    passes = [np.random.default_rng(number).permutation(COUNT).reshape(-1, BATCH) for number in range(-(-count // 10))]
    return list(np.concatenate(passes)[:count])


def client_of(server: ServerProcess, name: str, **settings: Any) -> Recording:
    rule = {"rule": "strata", "settings": QUICK | settings}
    return Recording(server.address, policy=f"same-step-{name}", num_examples=COUNT, timeout=Timeout(step=30), **rule)


def weighted_gradients(model: nn.Module, batch: tuple[Tensor, Tensor], weights: NDArray[np.float32]) -> list[Tensor]:
    mean = (torch.from_numpy(weights) * losses_of(model, batch)).mean()
    return list(torch.autograd.grad(mean, list(model.parameters())))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ghost", GhostContributions),
        ("own", GhostContributions),
        ("jvp", JvpContributions),
        ("differences", FiniteDifferenceContributions),
        ("sketch", partial(SketchContributions, width=200)),
    ],
)
def test_a_step_trains_under_the_weights_for_its_losses(server: ServerProcess, name: str, method: Any) -> None:
    """Also at a first visit, and the contributions, by whatever method, follow without the losses."""
    (x, y), target = data()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    direction = TargetDirection(model, losses_of, [target], refresh_every=1)
    with client_of(server, f"same-{name}") as client:
        steps = WeightedSteps(client, method(model, direction))
        for number, ids in enumerate(batches(10)):
            batch = x[ids], y[ids]
            with steps.capture(ids) as step:
                (step.weigh(losses_of(model, batch)) if name == "own" else step.loss(batch)).backward()
            (asked, told, weights), (sent, fields) = client.asked[number], client.sent[number]
            assert asked == sent == ids.tolist()
            assert told.keys() == {"losses", "scored"}
            torch.testing.assert_close(torch.tensor(told["losses"]), losses_of(model, batch).detach())
            np.testing.assert_array_equal(step.weights, weights)
            for parameter, gradient in zip(model.parameters(), weighted_gradients(model, batch, weights), strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
            assert "losses" not in fields
            assert fields["omit_weights"]
            if name == "sketch":
                found = torch.tensor(fields["gradient_sketches"] @ fields["target_sketch"])
            else:
                found = torch.tensor(fields["contributions"])
            assert relative_error(found, reference(model, direction, batch)) < (0.6 if name == "sketch" else 0.02)
            optimizer.step()
            optimizer.zero_grad()
        assert client.status().version == 20
        used = np.concatenate([weights for *_, weights in client.asked])
        assert used.min() < 0.7 < 1.1 < used.max()  # all of them first visits
        values = steps.metrics()
        assert values["policy/mean_weight"] == pytest.approx(float(client.asked[-1][2].mean()))
        assert values["policy/rows_scored"] == 1


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("matched", [False, True])
def test_with_weights_of_1_training_is_as_without_a_policy(server: ServerProcess, every: int, matched: bool) -> None:
    """Bit for bit, whatever is measured beside it."""
    (x, y), target = data()
    model, plain = network(), network()
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, plain)]
    direction = TargetDirection(model, losses_of, [target], norm_matched=matched)
    with client_of(server, f"ones-{every}-{matched}".lower(), min_count=1e5, memory=1e5) as client:
        steps = WeightedSteps(client, GhostContributions(model, direction), measure_every=every)
        for ids in batches(10):
            with steps.capture(ids) as step:
                step.loss((x[ids], y[ids])).backward()
            losses_of(plain, (x[ids], y[ids])).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert len(client.asked) == 10
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_contributions_of_every_third_batch(server: ServerProcess) -> None:
    """Losses of all; ḡ is that of all steps, and the target direction is refreshed for the measured ones alone."""
    (x, y), target = data()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    direction = TargetDirection(model, losses_of, [target], refresh_every=2, norm_matched=True)
    with client_of(server, "sparse") as client:
        steps = WeightedSteps(client, GhostContributions(model, direction), measure_every=3)
        average: list[Tensor] = []
        for number, ids in enumerate(batches(10)):
            with steps.capture(ids) as step:
                if number == 4:
                    continue  # it counts: else processes would not measure together
                step.loss((x[ids], y[ids])).backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            if number in (3, 9):
                products = torch.tensor(
                    [float((v * g).sum()) for v, g in zip(direction.vectors.values(), average, strict=True)]
                )
                size = sum(float(v.square().sum()) for v in direction.vectors.values()) ** 0.5
                assert abs(float(products.sum())) < 1e-5 * size  # orthogonal to ḡ of all steps before
                found = torch.tensor(client.sent[-1][1]["contributions"])
                assert relative_error(found, reference(model, direction, (x[ids], y[ids]))) < 1e-4
            optimizer.step()
            optimizer.zero_grad()
            average = [a.lerp(g, 0.1) for a, g in zip(average, gradients, strict=True)] if average else gradients
        asked = [ids for number, ids in enumerate(batches(10)) if number != 4]
        assert [ids for ids, *_ in client.asked] == [ids.tolist() for ids in asked]
        assert [ids for ids, _ in client.sent] == [batches(10)[number].tolist() for number in (0, 3, 6, 9)]
        assert ["target_loss" in fields for _, fields in client.sent] == [True, False, True, False]
        assert client.status().version == 13


def test_micro_batches_each_ask_and_report_together(server: ServerProcess) -> None:
    (x, y), target = data()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    direction = TargetDirection(model, losses_of, [target])
    with client_of(server, "micro") as client:
        steps = WeightedSteps(client, GhostContributions(model, direction), accumulate=2, measure_every=3)
        for number, ids in enumerate(batches(6)):
            with steps.capture(ids) as step:
                step.loss((x[ids], y[ids])).backward()
            if number % 2:
                parts = [
                    weighted_gradients(model, (x[ids], y[ids]), weights)
                    for ids, _, weights in ((torch.tensor(i), f, w) for i, f, w in client.asked[-2:])
                ]
                for parameter, one, other in zip(model.parameters(), *parts, strict=True):
                    torch.testing.assert_close(parameter.grad, (one + other) / 2)
                optimizer.step()
                optimizer.zero_grad()
        expected = batches(6)
        assert [ids for ids, *_ in client.asked] == [ids.tolist() for ids in expected]
        assert [ids for ids, _ in client.sent] == [expected[0].tolist(), expected[3].tolist()]


def test_groups_go_with_the_losses(server: ServerProcess) -> None:
    (x, y), target = data()
    model = network()
    direction = TargetDirection(model, losses_of, [target])
    with client_of(server, "grouped", groups=2) as client:
        steps = WeightedSteps(client, GhostContributions(model, direction))
        first, second, third = batches(3)
        with steps.capture(first, groups=y[first]) as step:
            step.loss((x[first], y[first])).backward()
        step = steps.begin()
        step.weigh(losses_of(model, (x[second], y[second])), ids=second, groups=y[second]).backward()
        step.end()
        for (_, told, _), ids in zip(client.asked, (first, second), strict=True):
            assert told["groups"].tolist() == y[ids].tolist()
        strata = client.read_weights("stratum", first)
        np.testing.assert_array_equal(strata // QUICK["strata"], y[first].numpy())
        with (
            pytest.raises(StepRefusedError, match="groups is absent: rule strata with 2 groups"),
            steps.capture(third) as step,
        ):
            step.loss((x[third], y[third]))


def test_a_rule_without_groups_refuses_them(server: ServerProcess) -> None:
    (x, y), target = data()
    model = network()
    steps_of = GhostContributions(model, TargetDirection(model, losses_of, [target]))
    with PolicyClient(
        server.address, policy="same-step-ungrouped", num_examples=COUNT, rule="ema_sign", timeout=PATIENT
    ) as client:
        steps, ids = WeightedSteps(client, steps_of), np.arange(4)
        with steps.capture(ids, groups=y[:4]) as step:
            step.loss((x[:4], y[:4])).backward()
        with pytest.raises(StepRefusedError, match="groups"):
            client.flush(10)


def test_the_rule_of_a_policy_that_is_joined_is_asked_for(server: ServerProcess) -> None:
    """So a client need not be told; a policy that is not there yet has the server's default."""
    (x, y), target = data()
    model = network()
    steps_of = GhostContributions(model, TargetDirection(model, losses_of, [target]))
    with client_of(server, "joined") as founder:
        founder.step([0], losses=[1.0])
    for options, waits in (
        ({"policy": "same-step-joined"}, True),
        ({"policy": "same-step-made", "num_examples": COUNT}, False),
    ):
        with Recording(server.address, timeout=Timeout(step=30), **options) as client:
            steps = WeightedSteps(client, steps_of)
            with steps.capture(range(4)) as step:
                step.loss((x[:4], y[:4])).backward()
            assert hasattr(client, "asked") == waits
            assert ("losses" in client.sent[0][1]) != waits


def test_weights_are_not_known_before_the_losses(server: ServerProcess) -> None:
    model = network()
    steps_of = GhostContributions(model, TargetDirection(model, losses_of, [data()[1]]))
    with (
        client_of(server, "early") as client,
        WeightedSteps(client, steps_of).capture(range(4)) as step,
        pytest.raises(CaptureError, match="no forward pass was captured"),
    ):
        _ = step.weights


def test_what_is_discarded_has_told_its_losses_alone(server: ServerProcess) -> None:
    (x, y), target = data()
    model = network()
    steps_of = GhostContributions(model, TargetDirection(model, losses_of, [target]))
    with client_of(server, "discarded") as client:
        steps = WeightedSteps(client, steps_of)
        with steps.capture(range(4)) as step:
            step.loss((x[:4], y[:4])).backward()
            step.discard()
        assert (len(client.asked), hasattr(client, "sent"), steps.discarded) == (1, False, 1)


def test_examples_that_are_sampled_have_no_other_weight_and_nobody_waits(server: ServerProcess) -> None:
    (x, y), target = data()
    model = network()
    steps_of = GhostContributions(model, TargetDirection(model, losses_of, [target]))
    with client_of(server, "drawn") as client:
        steps = WeightedSteps(client, steps_of, sampled=True)
        for ids in batches(4):
            with steps.capture(ids) as step:
                step.loss((x[ids], y[ids])).backward()
            np.testing.assert_array_equal(step.weights, 1)
        assert not hasattr(client, "asked")
        assert [sorted(fields.keys() & {"losses", "contributions"}) for _, fields in client.sent] == [
            ["losses"],
            ["contributions"],
        ] * 4


def test_a_lost_server_does_not_stop_the_training(server: ServerProcess) -> None:
    """What it has not heard it hears later, each once; meanwhile the newest weights known hold, else 1."""
    (x, y), target = data()
    model = network()
    steps_of = GhostContributions(model, TargetDirection(model, losses_of, [target]))
    options: dict[str, Any] = {"rule": "strata", "settings": QUICK, "timeout": Timeout(step=0.3)}
    with PolicyClient(server.address, policy="same-step-away", num_examples=COUNT, **options) as client:
        steps = WeightedSteps(client, steps_of)
        server.pause()
        try:
            for ids in batches(3):
                with steps.capture(ids) as step:
                    step.loss((x[ids], y[ids])).backward()
                np.testing.assert_array_equal(step.weights, 1)
        finally:
            server.resume()
        assert client.flush(60)
        assert (client.stats.applied, client.stats.dropped, client.status().version) == (6, 0, 6)


@pytest.mark.parametrize(
    ("options", "every", "message"),
    [
        ({"rule": "strata"}, -1, "measure_every = -1: must be an integer of at least 0"),
        ({"rule": "ema_sign"}, 2, "measure_every = 2: rule ema_sign needs contributions of every row; .* for strata"),
        ({}, 2, r"the policy's rule is not known, .* give PolicyClient\(rule=...\)"),
    ],
)
def test_what_cannot_be_measured_sparsely_is_refused(options: dict[str, str], every: int, message: str) -> None:
    model = network()
    steps_of = GhostContributions(model, TargetDirection(model, losses_of, [data()[1]]))
    with (
        PolicyClient(
            "127.0.0.1:1", policy="nowhere", num_examples=COUNT, timeout=Timeout(close=0.1), **options
        ) as client,
        pytest.raises(CaptureError, match=message),
    ):
        WeightedSteps(client, steps_of, measure_every=every).capture(range(4))


def replica(rank: int, address: str, folder: str) -> None:
    """One of two processes that train a model together: what it asked, was told, trained under and sent."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    (x, y), target = data()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    halves = [part[rank::2] for part in target]
    direction = TargetDirection(
        model, losses_of, [tuple(halves)], refresh_every=1, group=dist.group.WORLD, norm_matched=True
    )
    found = []
    options: dict[str, Any] = {"rule": "strata", "settings": QUICK, "timeout": Timeout(step=60)}
    with Recording(address, policy="same-step-replicas", num_examples=COUNT, **options) as client:
        steps = WeightedSteps(client, GhostContributions(model, direction), measure_every=2)
        for ids in batches(10):
            ids = ids[rank::2]
            before = {name: value.clone() for name, value in model.module.state_dict().items()}
            with steps.capture(ids) as step:
                step.loss((x[ids], y[ids])).backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found.append({"ids": ids, "before": before, "used": step.weights, "gradients": gradients})
            optimizer.step()
            optimizer.zero_grad()
        asked, sent = client.asked, client.sent
    torch.save({"steps": found, "asked": asked, "sent": sent}, Path(folder) / f"{rank}.pt")


def test_replicas_train_on_the_mean_of_what_each_was_told(server: ServerProcess, tmp_path: Path) -> None:
    run_pair(replica, server.address, str(tmp_path))
    (x, y), _ = data()
    both: list[Any] = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    model = network()
    for number, (one, other) in enumerate(zip(both[0]["steps"], both[1]["steps"], strict=True)):
        model.load_state_dict(one["before"])
        torch.testing.assert_close(one["before"], other["before"], rtol=0, atol=0)
        parts = []
        for each, process in zip((one, other), both, strict=True):
            ids, _, weights = process["asked"][number]
            assert ids == each["ids"].tolist()
            np.testing.assert_array_equal(each["used"], weights)
            parts.append(weighted_gradients(model, (x[ids], y[ids]), weights))
        for first, second, found in zip(*parts, one["gradients"], strict=True):
            torch.testing.assert_close(found, (first + second) / 2)
    for process in both:
        assert [ids for ids, _ in process["sent"]] == [step["ids"].tolist() for step in process["steps"][::2]]
    used = np.concatenate([step["used"] for process in both for step in process["steps"]])
    assert used.min() < 0.9 < 1.05 < used.max()
