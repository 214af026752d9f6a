"""The real Lightning trainer under a policy: what it trains on, what it sends, and that it resumes."""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from equipoise import PolicyClient, Timeout
from equipoise.lightning import PolicyCallback
from equipoise.testing import ServerProcess
from equipoise.torch import CaptureError, TargetDirection, WeightedSampler
from equipoise.torch.training import TrainingOptions
from tests.client.torch.models import reference, relative_error

N = 24

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


class Recording(PolicyClient):
    """A client that notes what is sent, and asks and waits, so that timing makes no difference."""

    sent: list[tuple[list[int], dict[str, Any]]]

    def weights(self, ids: Any) -> Any:
        return self.read(ids).weights

    def submit(self, ids: Any = None, **fields: Any) -> None:
        self.__dict__.setdefault("sent", []).append((np.asarray(ids).tolist(), dict(fields)))
        super().submit(ids, **fields)
        assert self.flush(30)


def client_of(server: ServerProcess, name: str) -> Recording:
    return Recording(server.address, policy=name, num_examples=N, rule="ema_sign", timeout=Timeout(step=30))


def examples(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.linspace(-1, 1, 5)
    inputs = torch.randn(count, 5, generator=generator)
    return [{"id": torch.tensor(i), "x": x, "y": x @ truth * (-1 if i % 3 == 0 else 1)} for i, x in enumerate(inputs)]


def batches(count: int, seed: int, size: int) -> DataLoader[Any]:
    return DataLoader(examples(count, seed), batch_size=size)  # type: ignore[arg-type]


def losses_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]).squeeze(1).float() - batch["y"]).square()


class Model(lightning.LightningModule):
    def __init__(self, policy: PolicyCallback | None = None, *, rate: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.policy, self.rate = policy, rate

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.policy is not None
        return self.policy.loss(batch["id"], batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def trainer_of(policy: PolicyCallback, folder: Path, **options: Any) -> lightning.Trainer:
    defaults: dict[str, Any] = {
        "callbacks": [policy, *options.pop("callbacks", [])],
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return lightning.Trainer(**(defaults | options))


def test_four_lines_train_under_a_policy(server: ServerProcess, tmp_path: Path) -> None:
    """Contributions by the definition, losses under the weights of the policy, accumulated batches in one step."""
    target, guard = list(batches(9, 1, 4)), list(batches(4, 2, 4))
    with client_of(server, "four") as client:
        client.step(np.arange(N), contributions=np.where(np.arange(N) % 2, 1.0, -1.0))
        weights = torch.tensor(client.read(np.arange(N)).weights)
        policy = PolicyCallback(client, losses_of, target, guard=guard)
        model, start = Model(policy), Model()
        trainer_of(policy, tmp_path, accumulate_grad_batches=2, max_steps=3).fit(model, batches(N, 0, 4))
        assert [(len(ids), fields["step"]) for ids, fields in client.sent] == [(8, 1), (8, 2), (8, 3)]
        assert ["guard_loss" in fields for _, fields in client.sent] == [True, False, False]
        assert not model.net[0]._forward_hooks
    ids, fields = client.sent[0]
    batch = next(iter(batches(N, 0, 8)))
    direction = TargetDirection(start, losses_of, target)
    direction.refresh()
    assert relative_error(torch.tensor(fields["contributions"]), reference(start, direction, batch)) < 1e-4
    (weights[ids] * losses_of(start, batch)).mean().backward()
    one = Model()
    optimizer = one.configure_optimizers()
    for parameter, same in zip(one.parameters(), start.parameters(), strict=True):
        parameter.grad = same.grad
    optimizer.step()
    with client_of(server, "four") as client:
        policy = PolicyCallback(client, losses_of, target)
        again = Model(policy)
        client.weights = lambda ids: weights[np.asarray(ids, np.int64)].numpy()  # type: ignore[method-assign]
        trainer_of(policy, tmp_path, accumulate_grad_batches=2, max_steps=1).fit(again, batches(N, 0, 4))
    torch.testing.assert_close(dict(again.state_dict()), dict(one.state_dict()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["ghost", "finite_difference", "last_layer"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_ways_of_training(server: ServerProcess, tmp_path: Path, method: Any, precision: Any) -> None:
    with client_of(server, f"way-{method}-{precision}".replace("_", "-")) as client:
        options = TrainingOptions(method=method, refresh_every=2, preconditioned=True)
        policy = PolicyCallback(client, losses_of, batches(9, 1, 4), options=options)
        fit = trainer_of(policy, tmp_path, precision=precision).fit
        if (method, precision) == ("finite_difference", "bf16-mixed"):
            with pytest.raises(CaptureError, match="half precision"):
                fit(Model(policy), batches(N, 0, 8))
            return
        fit(Model(policy), batches(N, 0, 8))
        assert ["target_loss" in fields for _, fields in client.sent] == [True, False] * 3
        weights = client.read_weights()
        assert weights.min() < 0.5 < weights.max()


class Stop(lightning.Callback):
    """Saves a checkpoint after a step and ends the job after another."""

    def __init__(self, *, save: int, path: Path, end: int) -> None:
        self.save, self.path, self.end = save, path, end

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.save:
            trainer.save_checkpoint(self.path)
        trainer.should_stop = trainer.global_step >= self.end


@pytest.mark.parametrize("lost_steps", [0, 2])
@pytest.mark.parametrize("sampled", [False, True])
def test_an_interrupted_job_goes_on_from_its_checkpoint(
    server: ServerProcess, tmp_path: Path, lost_steps: int, sampled: bool
) -> None:
    """At the end of an epoch, to the same weights and the same model as one that was not interrupted."""
    name, ends, path = f"lightning-{lost_steps}-{sampled}".lower(), [], tmp_path / "saved.ckpt"

    def job(client: PolicyClient, **options: Any) -> tuple[PolicyCallback, Model, lightning.Trainer, Any]:
        sampler = WeightedSampler(client, N, num_samples=32, draw=32, timeout=30) if sampled else None
        chosen = TrainingOptions(refresh_every=3, sampled=sampled)
        policy = PolicyCallback(client, losses_of, batches(9, 1, 4), options=chosen, sampler=sampler)
        loader = DataLoader(examples(N, 0), batch_size=8, sampler=sampler)  # type: ignore[arg-type]
        return policy, Model(policy), trainer_of(policy, tmp_path, max_epochs=3, **options), loader

    per_epoch = 4 if sampled else 3
    for part in ("whole", "first", "rest"):
        with client_of(server, name if part != "whole" else f"{name}-whole") as client:
            client.step(np.arange(N), contributions=np.ones(N)) if part != "rest" else None
            stop = [Stop(save=per_epoch, path=path, end=per_epoch + lost_steps)] if part == "first" else []
            policy, model, trainer, loader = job(client, callbacks=stop)
            trainer.fit(model, loader, ckpt_path=path if part == "rest" else None, weights_only=True)
            ends.append((policy.client.read_weights(), model))
            assert (policy.client is client) == (part != "rest" or not lost_steps)
            policy.client.close()
    (expected_weights, expected), _, (weights, model) = ends
    if not sampled:  # what was drawn ahead of the checkpoint depends on timing
        np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)
        torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-5)
    assert trainer.global_step == 3 * per_epoch


def test_misuse_is_named(tmp_path: Path) -> None:
    client = PolicyClient("127.0.0.1:1", policy="misused", num_examples=N)
    policy = PolicyCallback(client, losses_of, list(batches(4, 1, 4)))
    with pytest.raises(CaptureError, match="must be among the callbacks of the trainer, and in use within fit"):
        policy.loss([0], next(iter(batches(1, 0, 1))))
    manual = Model(policy)
    manual.automatic_optimization = False
    with pytest.raises(CaptureError, match="needs automatic optimization; use WeightedSteps in a loop of your own"):
        trainer_of(policy, tmp_path).fit(manual, batches(N, 0, 8))

    class Twice(Model):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)

    twice = Twice(policy)
    with pytest.raises(CaptureError, match="must be called once in a training step"):
        trainer_of(policy, tmp_path).fit(twice, batches(N, 0, 8))
    assert not twice.net[0]._forward_hooks
