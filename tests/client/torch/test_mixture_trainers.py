"""Jobs of every framework train on a mixture, and go on from their checkpoints with the rows that come next."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from equipoise import PolicyClient
from equipoise.errors import InvalidRequestError
from equipoise.lightning import PolicyCallback
from equipoise.torch import (
    GhostContributions,
    Mixture,
    TargetDirection,
    TrainingOptions,
    WeightedSteps,
    run_state,
)
from equipoise.transformers import PolicyTrainer, PolicyTraining
from tests.client.torch.models import gpt2, lm_losses, tokens
from tests.servers import ServerProcess

BATCH = 4
QUIET = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`"),
]
pytestmark = QUIET
NUMBERS = itertools.count()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[PolicyClient]:
    name = f"mixture-{next(NUMBERS)}-{np.random.default_rng().integers(2**40)}"
    with PolicyClient(
        server.address, policy=name, num_examples=2, rule="exponentiated_gradient", when_lost="wait"
    ) as connected:
        yield connected


def examples(count: int, seed: int) -> list[dict[str, Any]]:
    batch = tokens(count, seed=seed)
    return [{name: values[i] for name, values in batch.items()} for i in range(count)]


def mixture_of(client: PolicyClient) -> Mixture:
    sources = {"other": examples(20, 4), "wanted": examples(12, 5)}
    return Mixture(sources, client=client, num_samples=64, refresh_every=16, seed=3)


class Noted:
    """The rows that a model was trained on, by their first tokens."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.model = model
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.rows += [tuple(row[:4].tolist()) for row in inputs["input_ids"]]


def batches(count: int, seed: int) -> list[dict[str, Any]]:
    return [tokens(count, seed=seed)]


def test_a_plain_loop_teaches_the_policy_and_resumes(client: PolicyClient) -> None:
    def job(client: PolicyClient) -> tuple[torch.nn.Module, WeightedSteps, Mixture]:
        model = gpt2()
        direction = TargetDirection(model, lm_losses, batches(8, 1), refresh_every=2)
        return model, WeightedSteps(client, GhostContributions(model, direction), sampled=True), mixture_of(client)

    def run(job: tuple[torch.nn.Module, WeightedSteps, Mixture], count: int | None) -> list[list[int]]:
        model, steps, mixture = job
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        loader = DataLoader(mixture.dataset, batch_size=BATCH, sampler=mixture)  # type: ignore[arg-type]
        for batch in itertools.islice(loader, count):
            ids = batch.pop("example_id")
            with steps.capture(ids) as step:
                step.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert steps.client.flush(30)  # type: ignore[attr-defined]
            seen.append([*ids.tolist(), *batch["input_ids"][:, 0].tolist()])
        return seen

    first = job(client)
    run(first, 7)
    model, steps, mixture = first
    state, weights = run_state(client, sampler=mixture, direction=steps.contributions.direction), model.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    assert (client.status().version, client.status().scored_examples) == (7, 2)
    again = job(client.for_policy(client.policy))
    again[0].load_state_dict(weights)
    going_on: Any = again[1].client
    assert again[1].resume(state, sampler=again[2]).policy == client.policy  # it has not moved since
    rest = run(again, None)
    assert len(rest) == 9
    served = client.read_weights()
    assert served[0] != served[1]
    shares = np.array([20, 12]) * served / (np.array([20, 12]) * served).sum()
    list(itertools.islice(again[2], 1))
    assert [again[2].metrics()[f"policy/share/{name}"] for name in ("other", "wanted")] == pytest.approx(shares)
    restored = job(client.for_policy(client.policy))
    restored[0].load_state_dict(weights)
    fork = restored[1].resume(state, sampler=restored[2])
    assert fork.policy != client.policy  # now it has
    assert run(restored, None) == rest
    fork.close()
    going_on.close()


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        **options,
    )


@pytest.mark.parametrize("options", [
    {},
    {"gradient_accumulation_steps": 2},
    {"dataloader_num_workers": 2},
    {"ignore_data_skip": True},
], ids=str)  # fmt: skip
def test_trainer_goes_on_in_mid_epoch(client: PolicyClient, tmp_path: Path, options: dict[str, Any]) -> None:
    def trainer(client: PolicyClient) -> tuple[Any, Noted]:
        mixture, model = mixture_of(client), gpt2()
        noted = Noted(model)
        policy = PolicyTraining(client, target=examples(8, 1), mixture=mixture, options=TrainingOptions(keep=None))
        given = arguments(tmp_path, num_train_epochs=2, save_steps=5, **options)
        return PolicyTrainer(model, given, train_dataset=mixture.dataset, policy=policy), noted

    whole, noted = trainer(client)
    whole.train()
    accumulated = options.get("gradient_accumulation_steps", 1)
    assert whole.state.global_step == 32 // accumulated
    shares = [line for line in whole.state.log_history if "policy/share/other" in line]
    assert len(shares) >= 16 // accumulated
    assert all(line["policy/share/other"] + line["policy/share/wanted"] == pytest.approx(1) for line in shares)
    assert client.status().scored_examples == 2
    rows = noted.rows
    for step in (5, 15):
        resumed, again = trainer(client.for_policy(client.policy))
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        before = step * accumulated * BATCH
        if options.get(
            "ignore_data_skip"
        ):  # `Trainer` then counts batches from the epoch's beginning, and ends earlier
            assert again.rows[: 64 - before] == rows[before:64]
            break
        assert resumed.state.global_step == whole.state.global_step
        assert again.rows == rows[before:]
        resumed.policy_client.close()


def test_what_is_no_mixtures_dataset_is_refused(client: PolicyClient, tmp_path: Path) -> None:
    mixture = mixture_of(client)
    policy = PolicyTraining(client, target=examples(8, 1), mixture=mixture)
    with pytest.raises(InvalidRequestError, match=r"must be `mixture\.dataset`"):
        PolicyTrainer(gpt2(), arguments(tmp_path), train_dataset=examples(8, 1), policy=policy)
    policy = PolicyTraining(client, target=examples(8, 1), mixture=mixture, id_column="id")
    with pytest.raises(InvalidRequestError, match="id_column = 'id': must be that of the mixture, 'example_id'"):
        PolicyTrainer(gpt2(), arguments(tmp_path), train_dataset=mixture.dataset, policy=policy)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = gpt2()
        self.noted = Noted(self.net)
        self.policy: Any = None

    def forward(self, **inputs: Any) -> Any:
        return self.net(**inputs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self.policy.loss(batch.pop("example_id"), batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_goes_on_in_mid_epoch(client: PolicyClient, tmp_path: Path, workers: int) -> None:
    path, rows = tmp_path / "saved.ckpt", {}

    def fit(part: str, client: PolicyClient, **options: Any) -> None:
        mixture, module = mixture_of(client), Module()
        module.policy = PolicyCallback(
            client, lm_losses, batches(8, 1), options=TrainingOptions(sampled=True), sampler=mixture
        )
        loader = DataLoader(mixture.dataset, batch_size=BATCH, sampler=mixture, num_workers=workers)  # type: ignore[arg-type]
        trainer = lightning.Trainer(
            callbacks=[module.policy],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=2,
            log_every_n_steps=1,
            **options,
        )
        trainer.fit(module, loader, ckpt_path=path if part == "rest" else None, weights_only=True)
        if part == "first":
            trainer.save_checkpoint(path)
        assert {"policy/share/other", "policy/share/wanted"} <= set(trainer.callback_metrics)
        rows[part] = module.noted.rows

    fit("first", client, max_steps=5)
    fit("rest", client.for_policy(client.policy))
    state = torch.load(path, weights_only=True)["callbacks"]["PolicyCallback"]["sampler"]
    assert state["position"] == 5 * BATCH
    mixture = mixture_of(client)
    mixture.load_state_dict(state)
    known = [mixture.dataset[place]["input_ids"][:4] for place in itertools.islice(mixture, 12)]
    assert rows["rest"][:12] == [tuple(row.tolist()) for row in known]
    assert len(rows["rest"]) >= 64 - 20
