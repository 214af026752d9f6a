"""Losses of target examples, sent beside those of the training: what they are, and that measuring leaves no trace."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equipoise import PolicyClient, Timeout
from equipoise.torch import (
    CaptureError,
    DirectionError,
    GhostContributions,
    LossesAlone,
    TargetDirection,
    WeightedSteps,
)
from tests.client.torch.recording import Recording
from tests.pairs import run_pair
from tests.patience import PATIENT
from tests.servers import ServerProcess

COUNT, BATCH = 120, 12
SETTINGS = {"strata": 2, "min_target_losses": 8, "target_memory": 64, "window": 32}


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Sorted(nn.Module):
    """A network whose examples no method of contributions can tell apart: they are put in order within it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        hidden = torch.tanh(self.first(x[order]))
        return self.last(hidden)[order.argsort()]


def network(kind: str = "plain") -> nn.Module:
    torch.manual_seed(0)
    if kind == "sorted":
        return Sorted()
    middle = {"plain": [nn.Tanh()], "dropout": [nn.Tanh(), nn.Dropout(0.5)], "norm": [nn.BatchNorm1d(16), nn.Tanh()]}
    return nn.Sequential(nn.Linear(8, 16), *middle[kind], nn.Linear(16, 2))


def data() -> tuple[tuple[Tensor, Tensor], list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Training examples of which a third has the wrong label; target and guard batches, of right ones."""
    generator = torch.Generator().manual_seed(1)
    x, target, guard, truth = (torch.randn(n, 8, generator=generator) for n in (COUNT, 25, 16, 1))
    y, of_target, of_guard = ((part @ truth[0] > 0).long() for part in (x, target, guard))
    y[: COUNT // 3] = 1 - y[: COUNT // 3]
    return (x, y), list(zip(target.split(8), of_target.split(8), strict=True)), [(guard, of_guard)]


def client_of(server: ServerProcess, name: str, **settings: Any) -> Recording:
    return Recording(
        server.address,
        policy=f"target-losses-{name}",
        num_examples=COUNT,
        rule="strata",
        settings=SETTINGS | settings,
        timeout=PATIENT,
    )


def ids_of(number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    epoch, step = divmod(number, COUNT // BATCH)
    order: np.ndarray[Any, np.dtype[np.int64]] = np.random.default_rng(epoch).permutation(COUNT)
    return order[step * BATCH : (step + 1) * BATCH]


def train(steps: WeightedSteps, model: nn.Module, numbers: range, *, optimizer: Any = None) -> list[Tensor]:
    """Trains on batches with these numbers; the gradients of the last one."""
    (x, y), *_ = data()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.5)
    for number in numbers:
        ids = ids_of(number)
        optimizer.zero_grad()
        with steps.capture(ids) as step:
            step.loss((x[ids], y[ids])).backward()
        optimizer.step()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", ["plain", "dropout", "norm", "sorted"])
def test_they_are_those_that_a_forward_pass_of_training_gives(server: ServerProcess, kind: str) -> None:
    """In turn, every third batch, under the same parameters, random numbers and batch statistics."""
    (x, y), target, guard = data()
    model = network(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    direction = TargetDirection(model, losses_of, target[:3], guard_batches=guard, batches_per_refresh=1, look_every=2)
    with client_of(server, kind) as client:
        steps = WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=3)
        looks = []
        for number in range(9):
            ids = ids_of(number)
            if number in (1, 4, 7):
                twin = network(kind)
                twin.load_state_dict(model.state_dict())
                with torch.no_grad(), torch.random.fork_rng():
                    looks.append(losses_of(twin.train(), target[len(looks)]).numpy())
                with torch.no_grad():
                    of_guard = float(losses_of(twin.eval(), guard[0]).mean()) if kind != "norm" else None
            before = torch.get_rng_state(), {name: value.clone() for name, value in model.named_buffers()}
            with steps.capture(ids) as step:
                assert torch.equal(torch.get_rng_state(), before[0])
                for name, value in model.named_buffers():
                    assert torch.equal(value, before[1][name])
                assert all(module.training for module in model.modules())
                step.loss((x[ids], y[ids])).backward()
            told = client.asked[-1][1]
            if number in (1, 4, 7):
                np.testing.assert_allclose(told["target_losses"], looks[-1], rtol=1e-5)
                assert told["target_loss"] == pytest.approx(float(looks[-1].mean()), rel=1e-5)
                assert ("guard_loss" in told) == (number != 4)
                if of_guard is not None and number != 4:
                    assert told["guard_loss"] == pytest.approx(of_guard, rel=1e-5)
            else:
                assert told.keys() == {"losses", "scored"}
            optimizer.step()
            optimizer.zero_grad()
        assert not hasattr(client, "sent")  # nothing follows after the backward pass
        assert client.status().version == 9
        values = steps.metrics()
        assert values["policy/target_loss"] == pytest.approx(float(looks[-1].mean()), rel=1e-5)
        assert "policy/guard_loss" in values


def test_wrong_labels_lose_weight_by_them_alone(server: ServerProcess) -> None:
    """In a model of which no contributions can be had."""
    model, (_, target, _) = network("sorted"), data()
    with client_of(server, "alone", strata=8, smoothing=0.2) as client:
        direction = TargetDirection(model, losses_of, target, batches_per_refresh=1)
        train(WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=1), model, range(60))
        weights = client.read_weights()
    assert weights[: COUNT // 3].mean() < 0.7 * weights[COUNT // 3 :].mean()


def test_training_is_the_same_bit_for_bit_with_weights_of_1(server: ServerProcess) -> None:
    _, target, guard = data()
    plain, model = network("dropout"), network("dropout")
    (x, y), *_ = data()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    torch.manual_seed(5)
    for number in range(8):
        optimizer.zero_grad()
        losses_of(plain, (x[ids_of(number)], y[ids_of(number)])).mean().backward()
        optimizer.step()
    torch.manual_seed(5)
    with client_of(server, "ones", min_target_losses=1e6) as client:
        shuffled = torch.utils.data.DataLoader(list(zip(*target[0], strict=True)), batch_size=4, shuffle=True)
        direction = TargetDirection(model, losses_of, shuffled, guard_batches=guard)
        steps = WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=2)
        train(steps, model, range(8), optimizer=torch.optim.Adam(model.parameters(), lr=0.01))
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_that_comes_from_an_evaluation_is_looked_at_in_training(server: ServerProcess) -> None:
    """As frameworks do it: the mode is set after the step has begun."""
    (x, y), target, _ = data()
    model = network("dropout")
    direction = TargetDirection(model, losses_of, target[:1])
    with client_of(server, "modes") as client:
        steps = WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=1)
        for number in range(3):
            model.eval()
            with torch.no_grad(), torch.random.fork_rng():
                expected = losses_of(model.train(), target[0]).numpy()
            model.eval()
            with steps.capture(ids_of(number)) as step:
                assert not model.training
                model.train()
                step.loss((x[ids_of(number)], y[ids_of(number)])).backward()
            told = client.asked[-1][1]
            assert ("target_losses" in told) == (number > 0)  # at first it is not known how it is trained
            if number:
                np.testing.assert_allclose(told["target_losses"], expected, rtol=1e-5)


def test_a_single_example_is_enough_for_batch_normalisation(server: ServerProcess) -> None:
    _, target, _ = data()
    model = network("norm")
    last = target[-1]
    assert len(last[0]) == 1
    with client_of(server, "single") as client:
        direction = TargetDirection(model, losses_of, [last])
        steps = WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=1)
        train(steps, model, range(3))
        assert [len(told.get("target_losses", ())) for _, told, _ in client.asked] == [0, 1, 1]
    assert model.training


def test_losses_that_are_not_finite_are_left_out_and_counted(server: ServerProcess) -> None:
    _, target, _ = data()
    model = network()
    spoilt = target[0][0].clone()
    spoilt[2] = float("nan")
    with client_of(server, "finite") as client:
        direction = TargetDirection(model, losses_of, [(spoilt, target[0][1])])
        steps = WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=1)
        train(steps, model, range(2))
        assert len(client.asked[-1][1]["target_losses"]) == 7
        assert direction.unusable == 1
        assert steps.metrics()["policy/unusable_losses"] == 1


def test_a_job_that_resumes_goes_on_bit_for_bit(server: ServerProcess) -> None:
    """Also where a checkpoint is made more often than the target is looked at."""
    _, target, guard = data()

    def steps_of(model: nn.Module, client: PolicyClient) -> WeightedSteps:
        direction = TargetDirection(model, losses_of, target, guard_batches=guard, batches_per_refresh=1, look_every=2)
        return WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=4)

    model = network("dropout")
    with client_of(server, "whole") as client:
        steps = steps_of(model, client)
        train(steps, model, range(6))
        state = {"run": steps.state(), "model": {n: v.clone() for n, v in model.state_dict().items()}}
        random = torch.get_rng_state()
        looked = sum("target_losses" in told for _, told, _ in client.asked)
        train(steps, model, range(6, 9))
        steps.state()
        train(steps, model, range(9, 12))
        assert sum("target_losses" in told for _, told, _ in client.asked) == looked + 2
        whole = [(ids, fields, weights.tolist()) for ids, fields, weights in client.asked[6:9]]
    resumed = network("dropout")
    resumed.load_state_dict(state["model"])
    torch.set_rng_state(random)
    with client_of(server, "whole") as client:
        steps = steps_of(resumed, client)
        fork: Any = steps.resume(state["run"])
        train(steps, resumed, range(6, 9))
        again = [(ids, fields, weights.tolist()) for ids, fields, weights in fork.asked]
    assert len(again) == 3
    for (ids, fields, weights), (same_ids, same, same_weights) in zip(whole, again, strict=True):
        assert (ids, weights, fields.keys()) == (same_ids, same_weights, same.keys())
        for name, values in fields.items():
            np.testing.assert_array_equal(values, same[name])


def test_the_guard_is_left_to_its_own_batches_where_these_are_given(server: ServerProcess) -> None:
    """Contributions of the first four batches beside it; what is heard of guard B comes afterwards, by itself."""
    _, target, guard = data()
    model = network()
    with client_of(server, "guard") as client:
        direction = TargetDirection(model, losses_of, target, guard_batches=guard)
        options: dict[str, int] = {"measure_every": 2, "compare_every": 3, "measure_until": 4, "guard_every": 2}
        train(WeightedSteps(client, GhostContributions(model, direction), **options), model, range(9))
        assert ["target_losses" in told for _, told, _ in client.asked] == [False, True, False] * 3
        assert not any("guard_loss" in told for _, told, _ in client.asked)
        sent = [fields for _, fields in client.sent]
        assert ["contributions" in fields for fields in sent] == [True, True, False, False, False]
        assert ["guard_loss" in fields for fields in sent] == [False, False, True, True, True]


def test_a_norm_matched_direction_is_of_no_matter_where_nothing_is_measured(server: ServerProcess) -> None:
    _, target, _ = data()
    model = network()
    with client_of(server, "norm-matched") as client:
        direction = TargetDirection(model, losses_of, target, norm_matched=True)
        options = {"measure_every": 0, "compare_every": 2}
        train(WeightedSteps(client, GhostContributions(model, direction), **options), model, range(4))
        assert len(client.asked) == 4
        assert not direction.ready  # no gradient was read


def replica(rank: int, address: str, folder: str) -> None:
    """One of two processes; the second skips its first batch, and has another number of target batches."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    (x, y), target, guard = data()
    model = DistributedDataParallel(network("norm"))
    direction = TargetDirection(
        model, losses_of, target[rank : rank + 1 + rank], guard_batches=guard, group=dist.group.WORLD
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options: dict[str, Any] = {"rule": "strata", "settings": SETTINGS, "timeout": PATIENT}
    with Recording(address, policy="target-losses-replicas", num_examples=COUNT, **options) as client:
        steps = WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=2)
        for number in range(8):
            ids = ids_of(number)[rank::2]
            if number == 0 and rank:
                with steps.capture(ids) as step:
                    step.discard()
                    model(x[ids]).sum().backward()  # of no use to the policy
            else:
                with steps.capture(ids) as step:
                    step.loss((x[ids], y[ids])).backward()
            optimizer.step()
            optimizer.zero_grad()
        looks = [len(told.get("target_losses", ())) for _, told, _ in client.asked]
    torch.save({"looks": looks, "model": model.module.state_dict()}, Path(folder) / f"{rank}.pt")


def test_processes_look_on_their_own_and_wait_for_none(server: ServerProcess, tmp_path: Path) -> None:
    run_pair(replica, server.address, str(tmp_path))
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert one["looks"] == [0, 8, 0, 8, 0, 8, 0, 8]
    assert other["looks"] == [0, 16, 0, 16, 0, 16, 0]
    for name, value in one["model"].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(value, other["model"][name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "contributions", "rule", "message"),
    [
        ({"measure_every": 0}, LossesAlone, "strata", "measure_every = 0: must be at least 1 where compare_every is 0"),
        ({"compare_every": -1}, GhostContributions, "strata", "compare_every = -1: must be an integer of at least 0"),
        ({"compare_every": 2}, LossesAlone, "strata", "measure_every = 1: must be 0 with LossesAlone"),
        ({"compare_every": 2}, GhostContributions, "ema_sign", "compare_every = 2: rule ema_sign needs"),
        (
            {"measure_every": 0, "compare_every": 2},
            LossesAlone,
            "ema_sign",
            "measure_every = 0, compare_every = 2: rule ema_sign needs",
        ),
        (
            {"compare_every": 2, "sampled": True},  # they go with losses that are sent first
            GhostContributions,
            "exponentiated_gradient",
            "compare_every = 2: rule exponentiated_gradient needs",
        ),
        (
            {"measure_every": 0, "compare_every": 2, "relative": True},
            LossesAlone,
            "strata",
            "relative = True: is for contributions, and measure_every = 0 measures none",
        ),
    ],
)
def test_what_tells_a_policy_nothing_is_refused(
    options: dict[str, Any], contributions: Any, rule: str, message: str
) -> None:
    model = network()
    direction = TargetDirection(model, losses_of, data()[1])
    with (
        PolicyClient(
            "127.0.0.1:1", policy="nowhere", num_examples=COUNT, rule=rule, timeout=Timeout(close=0.1)
        ) as client,
        pytest.raises(CaptureError, match=message),
    ):
        WeightedSteps(client, contributions(model, direction), **options).capture(range(4))


def test_a_target_without_examples_is_refused(server: ServerProcess) -> None:
    model = network()
    empty = (torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))
    with client_of(server, "empty") as client:
        direction = TargetDirection(model, losses_of, [empty])
        steps = WeightedSteps(client, LossesAlone(model, direction), measure_every=0, compare_every=1)
        with pytest.raises(DirectionError, match="target_batches: must hold at least one example"):
            train(steps, model, range(2))
