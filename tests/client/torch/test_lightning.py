"""The real Lightning trainer under a policy: what it trains on, what it sends, and that it resumes."""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from equipoise import ExampleKeys, PolicyClient, Timeout
from equipoise.errors import InvalidRequestError
from equipoise.lightning import PolicyCallback
from equipoise.torch import CaptureError, TargetDirection, WeightedSampler
from equipoise.torch.training import TrainingOptions
from tests.client.torch.models import reference, relative_error
from tests.client.torch.recording import Recording
from tests.servers import ServerProcess

N = 24
NOT_RESUMABLE = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
"""Lightning's word on loaders without a state; it does not know of the sampler's."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


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
    """At the end of an epoch, to the same weights and the same model as one that was not interrupted, bit for bit."""
    name, ends, path = f"lightning-{lost_steps}-{sampled}".lower(), [], tmp_path / "saved.ckpt"
    sent: list[Any] = []

    def job(client: PolicyClient, **options: Any) -> tuple[PolicyCallback, Model, lightning.Trainer, Any]:
        sampler = WeightedSampler(client, N, num_samples=32, draw=32, timeout=30) if sampled else None
        measured = {"measure_from": 2, "measure_every": 3} if sampled else {}
        chosen = TrainingOptions(refresh_every=5, sampled=sampled, **measured)
        policy = PolicyCallback(client, losses_of, batches(9, 1, 4), options=chosen, sampler=sampler)
        loader = DataLoader(examples(N, 0), batch_size=8, sampler=sampler)  # type: ignore[arg-type]
        return policy, Model(policy), trainer_of(policy, tmp_path, max_epochs=3, **options), loader

    per_epoch = 4 if sampled else 3
    for part in ("whole", "first", "rest"):
        with client_of(server, name if part != "whole" else f"{name}-whole") as client:
            client.step(np.arange(N), contributions=np.ones(N)) if part != "rest" else None
            ends_at = per_epoch + lost_steps if part == "first" else 3 * per_epoch
            stop = Stop(save=per_epoch if part != "rest" else 0, path=path, end=ends_at)
            policy, model, trainer, loader = job(client, callbacks=[stop])
            trainer.fit(model, loader, ckpt_path=path if part == "rest" else None, weights_only=True)
            ends.append((policy.client.read_weights(), model))
            assert (policy.client is client) == (part != "rest" or not lost_steps)
            policy.client.close()
            sent.append(policy.client.sent)  # type: ignore[attr-defined]
    (expected_weights, expected), _, (weights, model) = ends
    if sampled:  # of 12 batches the 3rd, 6th, 9th and 12th are measured, also where the job begins anew at the 5th
        assert [len(steps) for steps in sent] == [4, 2 if lost_steps else 1, 3]
    else:  # what was drawn ahead of the checkpoint depends on timing
        np.testing.assert_array_equal(weights, expected_weights)
        torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    assert trainer.global_step == 3 * per_epoch


class Noting(Model):
    """Notes the ids that it is trained on."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.__dict__.setdefault("ids", []).extend(batch["id"].tolist())
        return super().training_step(batch, batch_idx)


@NOT_RESUMABLE
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [True, False])
def test_a_job_that_is_interrupted_in_mid_epoch_draws_the_rest(
    server: ServerProcess, tmp_path: Path, workers: int, first: bool
) -> None:
    """What workers took ahead of the checkpoint is not lost, whatever the order of the callbacks."""
    drawn, path = [], tmp_path / "saved.ckpt"
    for part in ("whole", "begun", "resumed"):
        name = f"middle-{workers}-{first}-{'whole' if part == 'whole' else 'parts'}".lower()
        with client_of(server, name) as client:
            client.step(np.arange(N), contributions=np.ones(N)) if part != "resumed" else None
            sampler = WeightedSampler(client, N, draw=N, timeout=30)
            options = TrainingOptions(sampled=True)
            policy = PolicyCallback(client, losses_of, batches(9, 1, 4), options=options, sampler=sampler)
            stop = Stop(save=2, path=path, end=2 if part == "begun" else 2 * N)
            trainer = trainer_of(policy, tmp_path, max_epochs=2)
            trainer.callbacks = [policy, stop] if first else [stop, policy]  # type: ignore[attr-defined]
            model = Noting(policy)
            context = "fork" if workers else None
            loader = DataLoader(
                examples(N, 0),
                4,
                sampler=sampler,
                num_workers=workers,
                multiprocessing_context=context,  # type: ignore[arg-type]
            )
            trainer.fit(model, loader, ckpt_path=path if part == "resumed" else None, weights_only=True)
            drawn.append(model.ids)
            policy.client.close()
    whole, begun, resumed = drawn
    assert len(begun) == 2 * 4
    assert [*begun, *resumed[: N - 8]] == whole[:N]
    assert len(resumed) == 2 * N - 8


@NOT_RESUMABLE
@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_without_a_sampler_is_interrupted_in_mid_epoch(
    server: ServerProcess, tmp_path: Path, workers: int
) -> None:
    """Lightning begins the loader anew, as it does without a policy; each row is sent by its id, once."""
    path, sent = tmp_path / "saved.ckpt", []
    for part in ("begun", "resumed"):
        with client_of(server, f"middle-{workers}") as client:
            policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
            stop = Stop(save=2, path=path, end=2 if part == "begun" else 2 * N)
            model = Noting(policy)
            context = "fork" if workers else None
            loader = DataLoader(examples(N, 0), 4, num_workers=workers, multiprocessing_context=context)  # type: ignore[arg-type]
            trainer = trainer_of(policy, tmp_path, max_epochs=2, callbacks=[stop])
            trainer.fit(model, loader, ckpt_path=path if part == "resumed" else None, weights_only=True)
            assert [int(i) for ids, _ in client.sent for i in ids] == model.ids
            assert policy.client is client  # the policy stands where it stood at the checkpoint
            assert policy.client.status().version == (2 if part == "begun" else 12)
            sent.append(len(client.sent))
    assert sent == [2, 10]


def test_examples_have_names(server: ServerProcess, tmp_path: Path) -> None:
    """Strings in the batch, as a loader collates them, become ids by a table."""
    names = [f"page-{place:02}" for place in reversed(range(N))]
    keys = ExampleKeys(names)
    named = [{**example, "name": name} for example, name in zip(examples(N, 0), names, strict=True)]

    class Named(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert self.policy is not None
            return self.policy.loss(keys.ids(batch["name"]), batch)

    class Unnamed(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert self.policy is not None
            return self.policy.loss(batch["name"], batch)

    with client_of(server, "named") as client:
        policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
        trainer_of(policy, tmp_path, max_epochs=1).fit(Named(policy), DataLoader(named, 4))  # type: ignore[arg-type]
        assert [int(i) for ids, _ in client.sent for i in ids] == keys.ids(names).tolist()
        assert sorted(keys.ids(names).tolist()) == list(range(N))
        policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
        with pytest.raises(CaptureError, match=r"`equipoise\.ExampleKeys` gives ids to names"):
            trainer_of(policy, tmp_path).fit(Unnamed(policy), DataLoader(named, 4))  # type: ignore[arg-type]


def test_examples_that_are_drawn_need_their_sampler() -> None:
    with (
        PolicyClient("127.0.0.1:1", policy="unused", num_examples=N, timeout=Timeout(close=0.1)) as client,
        pytest.raises(InvalidRequestError, match=r"sampled = True: needs PolicyCallback\.sampler, the one that draws"),
    ):
        PolicyCallback(client, losses_of, [], options=TrainingOptions(sampled=True))


def test_a_sampler_that_the_loader_does_not_have_is_named(tmp_path: Path) -> None:
    with PolicyClient("127.0.0.1:1", policy="unused", num_examples=N, timeout=Timeout(close=0.1)) as client:
        policy = PolicyCallback(client, losses_of, list(batches(4, 1, 4)), sampler=WeightedSampler(client, N))
        with pytest.raises(CaptureError, match="nothing was drawn from it: it must be the `sampler=` of the training"):
            trainer_of(policy, tmp_path).fit(Model(policy), batches(N, 0, 8))


def test_misuse_is_named(tmp_path: Path) -> None:
    client = PolicyClient("127.0.0.1:1", policy="misused", num_examples=N)
    policy = PolicyCallback(client, losses_of, list(batches(4, 1, 4)))
    with pytest.raises(CaptureError, match=r"\.loss: must be called in training_step, by a trainer that has it among"):
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


class Weighing(Model):
    """Makes its forward pass itself, as most modules do, and has a use for what it gives."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        assert self.policy is not None
        predicted = self(batch["x"]).squeeze(1)
        self.log("mean", predicted.detach().mean())
        return self.policy.weigh(batch["id"], (predicted.float() - batch["y"]).square())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_of_a_forward_pass_of_ones_own(server: ServerProcess, tmp_path: Path, accumulate: int) -> None:
    """The same statistics, and the same model, as from `loss`."""
    ends = []
    for kind in (Model, Weighing):
        with client_of(server, f"own-{kind.__name__.lower()}-{accumulate}") as client:
            policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
            model = kind(policy)
            trainer_of(policy, tmp_path, accumulate_grad_batches=accumulate).fit(model, batches(N, 0, 4))
            ends.append((model, client.sent))
    (model, sent), (same, same_sent) = ends
    torch.testing.assert_close(dict(same.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert [ids for ids, _ in same_sent] == [ids for ids, _ in sent]
    for (_, fields), (_, same_fields) in zip(sent, same_sent, strict=True):
        np.testing.assert_array_equal(same_fields["contributions"], fields["contributions"])


def test_a_second_pass_needs_the_batch(tmp_path: Path) -> None:
    client = PolicyClient("127.0.0.1:1", policy="second", num_examples=N)
    policy = PolicyCallback(client, losses_of, list(batches(4, 1, 4)), options=TrainingOptions(method="jvp"))
    model = Weighing(policy)
    with pytest.raises(CaptureError, match="or `loss` instead of `weigh`"):
        trainer_of(policy, tmp_path).fit(model, batches(N, 0, 8))


class Skipping(Model):
    """Skips some batches, before or after the forward pass, and trains on others without the policy."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        assert self.policy is not None
        if batch_idx == 1:
            return None
        loss = self.policy.loss(batch["id"], batch)
        if batch_idx == 3:
            return None
        if batch_idx == 4:
            self.policy.discard()
        return loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_batches_leave_nothing_behind(server: ServerProcess, tmp_path: Path, accumulate: int) -> None:
    """At the boundaries of accumulation too; what is sent is right."""
    with client_of(server, f"skipping-{accumulate}") as client:
        policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
        model, start = Skipping(policy), Model()
        trainer_of(policy, tmp_path, max_epochs=2, accumulate_grad_batches=accumulate).fit(model, batches(N, 0, 4))
        assert policy._steps is not None
        assert policy._steps.discarded == 6
        assert not model.net[0]._forward_hooks
        seen = [sorted({i // 4 for i in ids}) for ids, _ in client.sent]
        assert seen == [[0], [2], [5]] * 2
    _, fields = client.sent[0]
    direction = TargetDirection(start, losses_of, list(batches(9, 1, 4)))
    direction.refresh()
    batch = next(iter(batches(N, 0, 4)))
    assert relative_error(torch.tensor(fields["contributions"]), reference(start, direction, batch)) < 1e-4


def test_a_module_that_forgets_the_policy_is_told(tmp_path: Path) -> None:
    class Forgetting(Model):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return losses_of(self, batch).mean()

    class Discarding(Forgetting):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            assert self.policy is not None
            self.policy.discard()
            return super().training_step(batch, batch_idx)

    client = PolicyClient("127.0.0.1:1", policy="forgotten", num_examples=N)
    policy = PolicyCallback(client, losses_of, list(batches(4, 1, 4)))
    with pytest.raises(CaptureError, match=r"Forgetting.training_step: must return .* or call policy.discard\(\)"):
        trainer_of(policy, tmp_path).fit(Forgetting(policy), batches(N, 0, 8))
    trainer_of(policy, tmp_path).fit(Discarding(policy), batches(N, 0, 8))  # as the message says


def test_validation_in_mid_training_and_exceptions_change_nothing(server: ServerProcess, tmp_path: Path) -> None:
    class Validated(Model):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            assert not self.net[0]._forward_hooks
            self.log("held_out", losses_of(self, batch).mean())

    class Failing(Model):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                raise ZeroDivisionError
            return loss

    ends = []
    for kind in (Model, Validated):
        with client_of(server, f"validated-{kind.__name__.lower()}") as client:
            policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
            model = kind(policy)
            trainer = trainer_of(policy, tmp_path, val_check_interval=1, max_epochs=1)
            trainer.fit(model, batches(N, 0, 8), batches(8, 3, 4) if kind is Validated else None)
            ends.append((model, len(client.sent)))
    torch.testing.assert_close(dict(ends[1][0].state_dict()), dict(ends[0][0].state_dict()), rtol=0, atol=0)
    assert [count for _, count in ends] == [3, 3]
    with client_of(server, "failing") as client:
        policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
        failing = Failing(policy)
        with pytest.raises(ZeroDivisionError):
            trainer_of(policy, tmp_path).fit(failing, batches(N, 0, 8))
        assert not failing.net[0]._forward_hooks
        assert len(client.sent) == 1
        trainer_of(policy, tmp_path, max_epochs=1).fit(Model(policy), batches(N, 0, 8))  # the callback serves again
        assert len(client.sent) == 4


@pytest.mark.filterwarnings("ignore")  # the compiler itself warns
def test_a_compiled_module_is_refused_and_the_way_out_is_right(server: ServerProcess, tmp_path: Path) -> None:
    class Compiled(Model):
        def __init__(self, policy: PolicyCallback) -> None:
            super().__init__(policy)
            self.net: Any = torch.compile(self.net, backend="eager")

    with client_of(server, "compiled") as client:
        policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
        whole: Any = torch.compile(Model(policy), backend="eager")
        with pytest.raises(CaptureError, match=r"Model: is compiled .* and give TrainingOptions\(method=\"jvp\"\)"):
            trainer_of(policy, tmp_path).fit(whole, batches(N, 0, 8))
        policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)), options=TrainingOptions(method="jvp"))
        trainer_of(policy, tmp_path, max_epochs=1).fit(Compiled(policy), batches(N, 0, 8))
        _, fields = client.sent[0]
    start = Model()
    direction = TargetDirection(start, losses_of, list(batches(9, 1, 4)))
    direction.refresh()
    batch = next(iter(batches(N, 0, 8)))
    assert relative_error(torch.tensor(fields["contributions"]), reference(start, direction, batch)) < 1e-4


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    """By Lightning, which sends people to manual optimization, and then by us."""

    class Two(Model):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]

    client = PolicyClient("127.0.0.1:1", policy="two", num_examples=N)
    policy = PolicyCallback(client, losses_of, list(batches(4, 1, 4)))
    two = Two(policy)
    with pytest.raises(RuntimeError, match="only supported with manual optimization"):
        trainer_of(policy, tmp_path).fit(two, batches(N, 0, 8))
    two.automatic_optimization = False
    with pytest.raises(CaptureError, match="use WeightedSteps in a loop of your own"):
        trainer_of(policy, tmp_path).fit(two, batches(N, 0, 8))


def test_averages_of_weights(server: ServerProcess, tmp_path: Path) -> None:
    """A module that holds its policy is copied by them."""
    with client_of(server, "averages") as client:
        policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
        average = lightning.pytorch.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)
        trainer_of(policy, tmp_path, callbacks=[average], max_epochs=3).fit(Model(policy), batches(N, 0, 8))
        assert len(client.sent) == 9


def test_the_first_epoch_is_not_weighted_and_that_is_told(
    server: ServerProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Weights(lightning.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            self.seen.append(float(trainer.callback_metrics["policy/rows_weighted"]))

    weights = Weights()
    with client_of(server, "one-epoch") as client:
        client.weights = super(Recording, client).weights  # type: ignore[method-assign]
        policy = PolicyCallback(client, losses_of, list(batches(9, 1, 4)))
        trainer_of(policy, tmp_path, callbacks=[weights], max_epochs=2, log_every_n_steps=1).fit(
            Model(policy), batches(N, 0, 8)
        )
    assert weights.seen[:3] == [0, 0, 0]
    assert min(weights.seen[3:]) == 1
    told = [record.message for record in caplog.records if "nothing is weighted in the first pass" in record.message]
    assert len(told) == 1
