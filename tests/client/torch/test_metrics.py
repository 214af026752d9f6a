"""What people see of a policy where they look: read back from TensorBoard's event files, of each framework."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import TrainerCallback

from equipoise import PolicyClient, Timeout
from equipoise.lightning import PolicyCallback
from equipoise.testing import ServerProcess
from equipoise.torch import GhostContributions, TargetDirection, TrainingOptions, WeightedSteps
from equipoise.torch.metrics import ASK_SECONDS
from equipoise.transformers import PolicyTrainer, PolicyTraining
from tests.client.torch.models import gpt2
from tests.client.torch.test_lightning import Model, batches, losses_of
from tests.client.torch.test_transformers import arguments, rows
from tests.patience import PATIENT

N = 24

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

HERE = {
    "mean_weight",
    "rows_weighted",
    "rows_scored",
    "target_loss",
    "guard_loss",
    "unanswered",
    "fallbacks",
    "dropped",
    "batches_discarded",
    "steps_left_out",
    "identity_checks",
    "identity_gaps",
    "unusable_losses",
}
"""What is known without the server."""
THERE = {
    "sim",
    "effective_ratio",
    "examples_scored",
    "positive_share",
    "guard_strength",
    "guard_trials_won",
    "guard_trials_lost",
}
"""What the server says."""


@pytest.fixture
def client(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[PolicyClient]:
    name = "metrics-" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower())
    with PolicyClient(
        server.address, policy=name, num_examples=N, rule="ema_sign", timeout=Timeout(step=30)
    ) as connected:
        yield connected


@pytest.fixture(autouse=True)
def asked_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equipoise.torch.metrics.ASK_SECONDS", 0.0)


def wait_for(condition: Callable[[], bool]) -> None:
    end = monotonic() + 60
    while not condition():
        assert monotonic() < end
        sleep(0.005)


def series(folder: Path, prefix: str) -> dict[str, list[float]]:
    """All numbers of the policy in the event files of a folder, by name."""
    found: dict[str, list[float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(prefix):
                found.setdefault(tag.removeprefix(prefix), []).extend(e.value for e in events.Scalars(tag))
    return found


def check(found: dict[str, list[float]], client: PolicyClient) -> None:
    """All there, and what is said at the end is true."""
    assert found.keys() == HERE | THERE
    assert all(math.isfinite(value) for values in found.values() for value in values)
    assert found["rows_weighted"][0] == 0
    assert found["mean_weight"][0] == 1
    assert found["rows_weighted"][-1] > 0.5
    assert found["rows_scored"][-1] == 1
    status = client.status()
    assert found["examples_scored"][-1] == pytest.approx(1)
    assert found["effective_ratio"][-1] == pytest.approx(status.effective_examples / N, abs=0.3)
    assert found["target_loss"][-1] == pytest.approx(status.target_loss, rel=1e-5)
    assert found["guard_loss"][-1] == pytest.approx(status.guard_loss, rel=1e-5)
    assert found["identity_checks"][-1] >= 1
    for name in ("identity_gaps", "fallbacks", "dropped", "unusable_losses", "steps_left_out", "batches_discarded"):
        assert found[name][-1] == 0, name


class Waiting:
    """Lets the server's answers arrive between steps, so that timing makes no difference."""

    def __init__(self, client: PolicyClient, steps: Callable[[], WeightedSteps | None]) -> None:
        self.client, self.steps = client, steps

    def wait(self) -> None:
        assert self.client.flush(30)
        steps = self.steps()
        assert steps is not None
        metrics = steps._metrics
        wait_for(lambda: not metrics._asking)


def test_transformers(client: PolicyClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))

    class Wait(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            Waiting(client, lambda: trainer._steps).wait()

    policy = PolicyTraining(
        client, target=rows(12, 1), guard=rows(6, 2), options=TrainingOptions(refresh_every=2, verify=False)
    )
    args = arguments(tmp_path, max_steps=6, report_to="tensorboard")
    trainer = PolicyTrainer(gpt2(), args, train_dataset=rows(N, 0), policy=policy, callbacks=[Wait()])
    trainer.train()
    check(series(tmp_path, "train/policy/"), client)
    assert trainer.state.log_history[0]["policy/rows_weighted"] == 0


@pytest.mark.parametrize("every", [1, 2])
def test_lightning(client: PolicyClient, tmp_path: Path, every: int) -> None:
    policy = PolicyCallback(
        client,
        losses_of,
        list(batches(9, 1, 4)),
        guard=list(batches(4, 2, 4)),
        options=TrainingOptions(refresh_every=2),
    )

    class Wait(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if policy._steps is not None and policy._steps._metrics._steps:
                Waiting(client, lambda: policy._steps).wait()

    lightning.Trainer(
        callbacks=[Wait(), policy],
        logger=TensorBoardLogger(tmp_path),
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        log_every_n_steps=every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Model(policy), batches(N, 0, 8))
    found = series(tmp_path, "policy/")
    check(found, client)
    assert len(found["mean_weight"]) == 6 // every


def test_accelerate(client: PolicyClient, tmp_path: Path) -> None:
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, log_with="tensorboard", project_dir=str(tmp_path)
    )
    accelerator.init_trackers("run")
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(N, 0, 4))
    direction = TargetDirection(
        model, losses_of, list(batches(9, 1, 4)), guard_batches=list(batches(4, 2, 4)), refresh_every=2
    )
    steps = WeightedSteps(client, GhostContributions(model, direction), accelerator=accelerator)
    number = 0
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model), steps.capture(batch["id"]) as step:
                accelerator.backward(step.loss(batch))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                Waiting(client, lambda: steps).wait()
                number += 1
                accelerator.log(steps.metrics(), step=number)
    accelerator.end_training()
    found = series(tmp_path, "policy/")
    check(found, client)
    assert len(found["mean_weight"]) == 6


class Silent:
    """A policy of which nothing can be asked."""

    def weights(self, ids: Any) -> Any:
        return np.ones(len(ids), np.float32)

    def submit(self, ids: Any = None, **fields: Any) -> None: ...


def plain(client: Any, **options: Any) -> tuple[WeightedSteps, Callable[..., None]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean(1)

    guard = [torch.randn(3, 3)] if options.pop("guard", False) else None
    direction = TargetDirection(model, losses, [torch.randn(5, 3)], guard_batches=guard)
    steps = WeightedSteps(client, GhostContributions(model, direction), **options)

    def train(count: int = 1, **upcoming: Any) -> None:
        for _ in range(count):
            with steps.capture(range(4), **upcoming) as step:
                step.loss(torch.randn(4, 3)).backward()

    return steps, train


def test_a_silent_server_costs_no_time_and_is_no_error(server: ServerProcess) -> None:
    """Whatever is not known is not there."""
    steps, train = plain(Silent())
    train()
    assert steps.metrics().keys() == {
        f"policy/{name}" for name in HERE - {"guard_loss", "unanswered", "fallbacks", "dropped"}
    }
    with PolicyClient("127.0.0.1:1", policy="nowhere", num_examples=N, timeout=Timeout(close=0.1)) as lost:
        steps, train = plain(lost)
        train(3)
        assert "policy/sim" not in steps.metrics()
        assert steps.metrics()["policy/unanswered"] == 3


def test_the_server_is_not_asked_at_every_step(monkeypatch: pytest.MonkeyPatch, server: ServerProcess) -> None:
    monkeypatch.setattr("equipoise.torch.metrics.ASK_SECONDS", ASK_SECONDS)
    asked = []

    class Counting(PolicyClient):
        def status(self) -> Any:
            asked.append(1)
            return super().status()

    with Counting(server.address, policy="seldom", num_examples=N) as client:
        _, train = plain(client)
        start = monotonic()
        train(50)
        assert 1 <= len(asked) <= 1 + (monotonic() - start) / ASK_SECONDS


@pytest.mark.parametrize("case", ["first pass", "ahead", "sampled", "known"])
def test_the_first_pass_over_the_data_is_told(
    server: ServerProcess, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and where it is true."""
    name = "first-" + case.replace(" ", "-")
    with PolicyClient(server.address, policy=name, num_examples=N, rule="ema_sign", timeout=PATIENT) as client:
        if case == "known":
            client.step(range(N), contributions=np.linspace(-1, 1, N))
            client.preload()
        _, train = plain(client, sampled=case == "sampled")
        train(3, **({"upcoming": range(4)} if case == "ahead" else {}))
        told = [
            record.message for record in caplog.records if "nothing is weighted in the first pass" in record.message
        ]
        assert len(told) == (case == "first pass")
        if told:
            caplog.clear()
            assert client.flush(30)
            with PolicyClient(server.address, policy=name, timeout=PATIENT) as joined:
                joined.preload()  # as the message says
                _, train = plain(joined)
                train()
            assert not caplog.records


def test_the_end_of_a_guard_trial_is_told(server: ServerProcess, caplog: pytest.LogCaptureFixture) -> None:
    with PolicyClient(server.address, policy="trials", num_examples=4, rule="ema_sign", timeout=PATIENT) as client:
        steps, train = plain(client, guard=True)
        for number in range(40):  # a guard loss that falls whatever is served: trials of uniform weights are lost
            client.step(range(4), contributions=[1.0, -1.0, 1.0, 1.0], guard_loss=3.0 * 0.97**number)
        before = client.status()
        assert before.guard_trials_won + before.guard_trials_lost > 0
        steps._metrics._status = replace(before, guard_trials_won=0, guard_trials_lost=0)
        with caplog.at_level(logging.INFO, "equipoise"):
            train()
            wait_for(lambda: not steps._metrics._asking)
        [line] = [record.message for record in caplog.records if "guard trials" in record.message]
        won, lost = before.guard_trials_won, before.guard_trials_lost
        assert f"its weights won {won} of {won + lost} guard trials" in line


def test_a_line_says_whether_the_policy_helps(server: ServerProcess, caplog: pytest.LogCaptureFixture) -> None:
    with PolicyClient(server.address, policy="line", num_examples=4, rule="ema_sign", timeout=PATIENT) as client:
        steps, train = plain(client)
        train()
        assert "line: step 1, no guard data, so that nobody knows whether the weights help" in steps.progress()
        steps, train = plain(client, guard=True)
        train(2)
        assert client.flush(30)
        train()
        wait_for(lambda: "policy/sim" in steps.metrics())
        with caplog.at_level(logging.INFO, "equipoise"):
            steps.close()
        assert (
            "line: step 3, its weights won 0 of 0 guard trials and they are served, SIM" in caplog.records[-1].message
        )
        assert "% effective examples" in caplog.records[-1].message
