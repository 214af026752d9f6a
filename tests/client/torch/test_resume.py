"""An interrupted job goes on as if nothing had happened, whether the policy has moved since its checkpoint or not."""

import copy
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equipoise import PolicyAdmin, PolicyClient, Timeout
from equipoise.torch import (
    GhostContributions,
    TargetDirection,
    WeightedSampler,
    WeightedSteps,
    look_ahead,
    resume_run,
    run_state,
)
from tests.servers import ServerProcess, serve

N, BATCH, STEPS, CHECKPOINT = 60, 12, 20, 8


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).squeeze(1) - batch[1]).square()


class Job:
    """A training job with everything a checkpoint must bring back."""

    def __init__(self, client: PolicyClient, *, sampled: bool, momentum: float = 0.0, matched: bool = False) -> None:
        torch.manual_seed(0)
        self.x, self.truth = torch.randn(N, 5), torch.randn(5)
        self.y = self.x @ self.truth
        self.y[::3] *= -1  # a third of the examples are wrong
        target = torch.randn(32, 5)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        batches = [(part, part @ self.truth) for part in target.split(8)]
        self.direction = TargetDirection(
            self.model,
            losses_of,
            batches,
            preconditioner=self.optimizer,
            refresh_every=3,
            batches_per_refresh=3,
            momentum=momentum,
            norm_matched=matched,
            step_noise=2.0 if matched else 0.0,
        )
        self.client = client
        self.sampler = WeightedSampler(client, N, num_samples=STEPS * BATCH, draw=BATCH, timeout=30)
        self.sampled = sampled
        self.step = 0

    def batches(self) -> Iterator[list[int]]:
        """Ids of the batches from `step` on."""
        if self.sampled:
            ids = iter(self.sampler)
            while batch := [i for _, i in zip(range(BATCH), ids, strict=False)]:
                yield batch
        else:
            for step in range(self.step, STEPS):
                yield np.random.default_rng(step).choice(N, BATCH, replace=False).tolist()

    def run(self, *, until: int, patience: float = 30) -> None:
        steps = WeightedSteps(self.client, GhostContributions(self.model, self.direction), sampled=self.sampled)
        # Looking ahead would draw from the policy before this step.
        pairs = ((ids, None) for ids in self.batches()) if self.sampled else look_ahead(self.batches())
        while self.step < until:
            ids, following = next(pairs)
            self.sampler.state_dict()  # what is drawn ahead is there before the policy moves
            with steps.capture(ids, upcoming=following) as step:
                step.loss((self.x[ids], self.y[ids])).backward()
            assert self.client.flush(patience)  # so that the network's timing makes no difference
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    def checkpoint(self) -> bytes:
        file = io.BytesIO()
        policy = run_state(self.client, direction=self.direction, sampler=self.sampler)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(copy.deepcopy(state) | {"policy": policy}, file)
        return file.getvalue()

    def restore(self, data: bytes) -> None:
        state = torch.load(io.BytesIO(data), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.client = resume_run(self.client, state["policy"], direction=self.direction, sampler=self.sampler)


def client_of(server: ServerProcess, name: str) -> PolicyClient:
    return PolicyClient(server.address, policy=name, num_examples=N, rule="ema_sign", timeout=Timeout(step=30))


def outcome(job: Job) -> list[Any]:
    return [*(parameter.detach() for parameter in job.model.parameters()), torch.tensor(job.client.read_weights())]


@pytest.mark.parametrize(
    ("sampled", "momentum", "matched"),
    [(False, 0.0, False), (True, 0.0, False), (False, 0.5, False), (False, 0.0, True), (False, 0.5, True)],
)
@pytest.mark.parametrize("lost_steps", [0, 5])
def test_a_resumed_job_ends_where_one_does_that_goes_on(
    server: ServerProcess, sampled: bool, momentum: float, matched: bool, lost_steps: int
) -> None:
    """Bit for bit: model, optimizer, direction, policy, ids. With steps lost after the checkpoint, on a fork."""
    name = f"resume-{sampled}-{momentum}-{matched}-{lost_steps}".lower()
    with client_of(server, f"{name}-whole") as client:
        whole = Job(client, sampled=sampled, momentum=momentum, matched=matched)
        whole.run(until=CHECKPOINT)
        whole.checkpoint()
        whole.run(until=STEPS)
        expected = outcome(whole)
    with client_of(server, name) as client:
        interrupted = Job(client, sampled=sampled, momentum=momentum, matched=matched)
        interrupted.run(until=CHECKPOINT)
        data = interrupted.checkpoint()
        vectors = "vectors" in torch.load(io.BytesIO(data), weights_only=True)["policy"]["direction"]
        assert vectors == bool(momentum)  # else they are computed again
        interrupted.run(until=CHECKPOINT + lost_steps)
    with client_of(server, name) as client:
        job = Job(client, sampled=sampled, momentum=momentum, matched=matched)
        job.restore(data)
        with job.client:
            assert (job.client.policy == name) == (not lost_steps)
            job.run(until=STEPS)
            torch.testing.assert_close(outcome(job), expected, rtol=0, atol=0)
            assert job.client.status().version == STEPS - (CHECKPOINT if lost_steps else 0)
            assert float(expected[-1].max()) > 2 * float(expected[-1].min())


def test_a_checkpoint_can_be_resumed_again_and_again(server: ServerProcess) -> None:
    """Each time on a policy of its own; names do not grow."""
    with client_of(server, "again") as client:
        job = Job(client, sampled=False)
        job.run(until=CHECKPOINT)
        data = job.checkpoint()
        job.run(until=CHECKPOINT + 1)
        client.delete()
    names = set()
    for _ in range(2):
        with client_of(server, "again") as client:
            job = Job(client, sampled=False)
            job.restore(data)
            with job.client:
                job.run(until=CHECKPOINT + 2)
                data_later = job.checkpoint()
                job.run(until=CHECKPOINT + 3)
                names.add(job.client.policy)
    with client_of(server, "again") as client:
        job = Job(client, sampled=False)
        job.restore(data_later)
        names.add(job.client.policy)
        job.client.close()
    assert len(names) == 3
    assert {name.rpartition("-")[0] for name in names} == {f"again.from-{CHECKPOINT}", "again.from-2"}


def test_only_the_newest_forks_are_kept(server: ServerProcess) -> None:
    with client_of(server, "kept") as client:
        job = Job(client, sampled=False)
        for step in (8, 9, 10, 11):
            job.run(until=step)
            state = run_state(client, keep=2)
        names = sorted(policy.spec.name for policy in client.admin.list_policies("kept.at-"))
        assert names == ["kept.at-10", "kept.at-11"]
        assert state["snapshot"]["name"] == "kept.at-11"
        assert (state["direction"], state["sampler"]) == (None, None)


def test_without_a_server_checkpoints_are_made_and_loaded_and_training_goes_on(server: ServerProcess) -> None:
    """What was not answered is sent again when the server is back."""
    with serve() as lost:
        client = PolicyClient(lost.address, policy="lost", num_examples=N, timeout=Timeout(call=0.5, close=0.1))
        job = Job(client, sampled=False)
        job.run(until=3)
        lost.kill()
        with pytest.raises(AssertionError):
            job.run(until=4, patience=0.1)
        data = job.checkpoint()
        client.close()
        resumed = PolicyClient(lost.address, policy="lost", num_examples=N, timeout=Timeout(call=0.5, connect=0.2))
        other = Job(resumed, sampled=False)
        other.restore(data)
        assert other.client is resumed
        assert other.step == 3
        lost.start()
        resumed.submit([0], contributions=[1.0])
        assert resumed.flush(30)
        resumed.close()
        with PolicyAdmin(lost.address) as admin:
            assert admin.get("lost").version == 5
