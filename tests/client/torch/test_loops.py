"""Loops as people write them, well and badly: right, or refused with a message whose way out is right."""

import logging
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from equipoise import EquipoiseError, PolicyAdmin, PolicyClient, PolicySpec
from equipoise.errors import PolicyNotFoundError
from equipoise.testing import ServerProcess
from equipoise.torch import (
    CaptureError,
    ContributionsDifferError,
    GhostContributions,
    JvpContributions,
    LastLayerContributions,
    TargetDirection,
    WeightedSteps,
)
from tests.client.torch.models import reference, relative_error
from tests.patience import PATIENT

N, BATCH = 40, 8
NUMBERS = count()
Batch = tuple[Tensor, Tensor]


def losses_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Job:
    """A model, a direction and a client of a policy of its own."""

    def __init__(
        self,
        server: ServerProcess,
        *,
        method: Any = GhostContributions,
        target: Callable[[Tensor], Tensor] = lambda x: x,
        guard: Callable[[Tensor], Tensor] | None = None,
        rate: float = 0.1,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        self.batch = torch.randn(BATCH, 5, dtype=dtype), torch.randint(3, (BATCH,))
        x, y = torch.randn(32, 5, dtype=dtype), torch.randint(3, (32,))
        guards = None if guard is None else [(guard(x.clone()), y)]
        self.direction = TargetDirection(
            self.model, losses_of, [(target(x.clone()), y)], guard_batches=guards, refresh_every=2
        )
        fixed: dict[str, Any] = {
            "num_examples": N,
            "rule": "ema_sign",
            "policy": f"loops-{next(NUMBERS)}",
            "timeout": PATIENT,
        }
        self.client = PolicyClient(server.address, **(fixed | options))
        self.steps = WeightedSteps(self.client, method(self.model, self.direction))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate)

    def train(self, ids: Any = range(BATCH)) -> Any:
        with self.steps.capture(ids) as step:
            step.loss(tuple(part[: len(list(ids))] for part in self.batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return step.capture

    def error(self, capture: Any) -> float:
        return relative_error(capture.contributions, reference(self.model, self.direction, self.batch))


def with_nan(x: Tensor) -> Tensor:
    x[0] = torch.nan
    return x


def test_one_bad_value_in_target_or_guard_ends_nothing(server: ServerProcess, caplog: pytest.LogCaptureFixture) -> None:
    """The field is left out, logged once and counted; the rest of the step is sent."""
    for options, field in (({"target": with_nan}, "target_loss"), ({"guard": with_nan}, "guard_loss")):
        caplog.clear()
        job = Job(server, **options)
        with job.client as client:
            for _ in range(5):
                job.train()
            assert client.flush(30)
            assert (client.stats.applied, client.stats.refused) == (5, 0)
            status = client.status()
            assert getattr(status, field) is None
            assert (status.target_loss is None) == (field == "target_loss")
            assert status.scored_examples == (0 if field == "target_loss" else BATCH)
            assert job.steps.metrics()["policy/unusable_losses"] == 3
            assert f"policy/{field}" not in job.steps.metrics()
            assert sum(f"{field} = nan is left out" in record.message for record in caplog.records) == 1


def test_a_training_that_diverges_is_not_ended_by_us(server: ServerProcess) -> None:
    job = Job(server, rate=float("inf"))
    with job.client as client:
        for _ in range(6):
            job.train()
        assert client.flush(30)
        assert (client.stats.applied, client.stats.refused) == (6, 0)
        assert losses_of(job.model, job.batch).isnan().all()
        assert not job.model[0]._forward_hooks


RIGHT: dict[str, Any] = {
    "list": [1, 2, 3],
    "tuple": (1, 2, 3),
    "range": range(1, 4),
    "int8": np.array([1, 2, 3], np.int8),
    "int32": np.array([1, 2, 3], np.int32),
    "uint64": np.array([1, 2, 3], np.uint64),
    "tensor": torch.tensor([1, 2, 3]),
    "tensor of int32": torch.tensor([1, 2, 3], dtype=torch.int32),
    "list of tensors": list(torch.tensor([1, 2, 3])),
    "repeated": [1, 1, 1],
}
WRONG: dict[str, tuple[Any, str]] = {
    "negative": ([-1, 2, 3], "ids: -1 must not be negative"),
    "floats": ([1.0, 2.0, 3.0], "must be one integer for each example"),
    "flags": ([True, False, True], "must be one integer for each example"),
    "two dimensions": (torch.tensor([[1], [2], [3]]), r"ids of shape \(3, 1\)"),
    "none": ([], r"ids of shape \(0,\)"),
    "one number": (5, r"ids of shape \(\)"),
    "too few": ([1, 2], r"losses of shape \(3,\): must be one loss for each of 2 examples"),
    "too large": ([1, 2, N], rf"ids\[2\] = {N}: ids must be below num_examples = {N}"),
}


@pytest.mark.parametrize("name", [*RIGHT, *WRONG])
def test_ids(server: ServerProcess, name: str) -> None:
    job = Job(server)
    batch = tuple(part[:3] for part in job.batch)

    def step(ids: Any) -> None:
        with job.steps.capture(ids) as step:
            step.loss(batch).backward()

    with job.client as client:
        if name in RIGHT:
            step(RIGHT[name])
            assert client.flush(30)
            assert client.status().scored_examples == len({int(i) for i in RIGHT[name]})
            return
        ids, message = WRONG[name]
        with pytest.raises(EquipoiseError, match=message):
            step(ids)
        assert not job.model[0]._forward_hooks
        step([1, 2, 3])  # the next step is like any other
        assert client.flush(30)
        assert client.stats.applied == 1


def test_a_policy_that_is_not_there_needs_its_size(server: ServerProcess) -> None:
    job = Job(server, num_examples=None)
    with job.client as client:
        job.train()
        with pytest.raises(PolicyNotFoundError, match="does not exist; create it first"):
            client.flush(30)
    with PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name=job.client.policy, num_examples=N))
    again = Job(server, num_examples=None, policy=job.client.policy)
    with again.client as client:
        again.train()
        assert client.flush(30)
    job = Job(server, num_examples=5)
    with job.client, pytest.raises(EquipoiseError, match=r"ids\[5\] = 5: ids must be below num_examples = 5"):
        job.train()


def test_other_forward_passes_within_a_step(server: ServerProcess) -> None:
    """For a look at the model, with gradients and without, of other sizes, before and after the losses are known."""
    job = Job(server)
    x, _ = job.batch
    with job.client, job.steps.capture(range(BATCH)) as step:
        with torch.no_grad():
            job.model(x[:3])
        job.model.eval()
        with torch.inference_mode():
            job.model(x[:5])
        job.model.train()
        job.model(x[:3])
        loss = step.loss(job.batch)
        job.model(x[:7]).sum().item()
        loss.backward()
    assert job.error(step.capture) < 1e-6


def test_a_forward_pass_before_the_block(server: ServerProcess) -> None:
    job = Job(server)
    outputs = job.model(job.batch[0])
    losses = F.cross_entropy(outputs, job.batch[1], reduction="none")
    with (
        job.client,
        pytest.raises(CaptureError, match="no module was called in the `with` block: the forward pass belongs into it"),
        job.steps.capture(range(BATCH)) as step,
    ):
        step.weigh(losses)
    job = Job(server)
    with job.client, job.steps.capture(range(BATCH)) as step:  # as the message says
        step.weigh(losses_of(job.model, job.batch)).backward()
    assert job.error(step.capture) < 1e-6


def test_two_backward_passes_through_one_loss(server: ServerProcess) -> None:
    job = Job(server)
    with job.client, job.steps.capture(range(BATCH)) as step:
        loss = step.loss(job.batch)
        loss.backward(retain_graph=True)
        loss.backward()
    assert job.error(step.capture) < 1e-6


def test_another_loss_beside(server: ServerProcess, caplog: pytest.LogCaptureFixture) -> None:
    """Of a second forward pass: right, and told. On the same outputs: refused, and right as the message says."""
    job = Job(server)
    with job.client, job.steps.capture(range(BATCH)) as step, caplog.at_level(logging.WARNING):
        (step.loss(job.batch) + 0.1 * job.model(job.batch[0]).square().mean()).backward()
    assert job.error(step.capture) < 1e-6
    assert sum("do not belong together" in record.message for record in caplog.records) == 1
    job = Job(server)

    def both(model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(batch[0])
        return F.cross_entropy(outputs, batch[1], reduction="none") + 0.1 * outputs.square().mean(1)

    refusal = pytest.raises(ContributionsDifferError, match="Give all of the loss, example by example, or use JvpCont")
    with job.client, refusal, job.steps.capture(range(BATCH)) as step:
        outputs = job.model(job.batch[0])
        losses = step.weigh(F.cross_entropy(outputs, job.batch[1], reduction="none"))
        (losses + 0.1 * outputs.square().mean()).backward()
    for method in (GhostContributions, JvpContributions):
        job = Job(server, method=method)
        with job.client, job.steps.capture(range(BATCH)) as step:
            if method is GhostContributions:  # all of the loss
                step.weigh(both(job.model, job.batch)).backward()
                expected = TargetDirection(job.model, both, [job.batch])
                expected.vectors = job.direction.vectors
                error = relative_error(step.capture.contributions, reference(job.model, expected, job.batch))
            else:  # contributions are those of the losses that are given
                (step.loss(job.batch) + 0.1 * job.model(job.batch[0]).square().mean()).backward()
                error = job.error(step.capture)
            assert error < 1e-6


def test_one_layers_share_can_be_compared(server: ServerProcess) -> None:
    job = Job(server, method=LastLayerContributions)
    with job.client:
        assert 0 < job.steps.contributions.verify(job.batch) < 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_grad_scaler_that_skips_steps(server: ServerProcess, accumulate: int) -> None:
    """What overflows is not scored; the parameters stay, and what follows is right."""
    job = Job(server, dtype=torch.float32)
    job.steps = WeightedSteps(job.client, GhostContributions(job.model, job.direction), accumulate=accumulate)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    sent: list[Any] = []
    submit = job.client.submit
    job.client.submit = lambda ids=None, **fields: (sent.append(fields), submit(ids, **fields))  # type: ignore[assignment]
    before = [parameter.detach().clone() for parameter in job.model.parameters()]
    with job.client as client:
        for number in range(2 * accumulate):
            with job.steps.capture(range(BATCH)) as step:
                loss = step.loss(job.batch)
                scaler.scale(loss * 1e6 if number < accumulate else loss * 1e-30).backward()
            if number % accumulate == accumulate - 1:
                scaler.step(job.optimizer)
                scaler.update()
                job.optimizer.zero_grad()
            if number < accumulate:
                same = zip(before, job.model.parameters(), strict=True)
                assert all(torch.equal(value, parameter) for value, parameter in same)
        assert client.flush(30)
        assert (client.stats.applied, client.stats.refused) == (2, 0)
    assert not sent[0]["scored"].any()
    assert sent[1]["scored"].all()


def test_two_jobs_in_one_process(server: ServerProcess) -> None:
    """Steps of both are open at once; each sees its own model."""
    first, second = Job(server), Job(server)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(1.5)
    with first.client, second.client:
        for _ in range(2):
            with first.steps.capture(range(BATCH)) as one, second.steps.capture(range(BATCH, 2 * BATCH)) as other:
                (one.loss(first.batch) + other.loss(second.batch)).backward()
            assert first.error(one.capture) < 1e-6
            assert second.error(other.capture) < 1e-6
