"""The README's lines for PyTorch jobs run as they stand."""

import re
import runpy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lightning
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments

import equipoise.torch
from equipoise import ExampleKeys, PolicyClient
from equipoise.lightning import PolicyCallback
from equipoise.transformers import PolicyTrainer, PolicyTraining
from tests.client.torch.models import gpt2, lm_losses, tokens
from tests.servers import ServerProcess

N, BATCH = 16, 8
LIBRARY = {name: getattr(equipoise.torch, name) for name in equipoise.torch.__all__}

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


@pytest.fixture
def client(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[PolicyClient]:
    name = request.node.name.replace("_", "-")
    with PolicyClient(server.address, policy=name, num_examples=N, rule="ema_sign", when_lost="wait") as connected:
        yield connected


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Runs the section's only block that holds some words, with these names known; gives all names afterwards."""
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## In a PyTorch job\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)

    def run_block(words: str, **names: Any) -> dict[str, Any]:
        [block] = [block for block in blocks if words in block]
        script = tmp_path / "block.py"
        script.write_text(block, encoding="utf-8")
        return runpy.run_path(str(script), {**LIBRARY, "torch": torch, **names})

    return run_block


def examples(count: int, *, seed: int) -> list[dict[str, Any]]:
    batch = tokens(count, seed=seed)
    return [{"id": i, **{name: values[i] for name, values in batch.items()}} for i in range(count)]


def batches(count: int = N, *, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(examples(count, seed=seed), batch_size=BATCH)  # type: ignore[arg-type]


def assert_all_scored(client: PolicyClient) -> None:
    assert client.flush(30)
    assert (client.status().version, client.status().scored_examples) == (N // BATCH, N)
    assert np.isfinite(client.read_weights("score")).all()


def test_plain_loop(server: ServerProcess, run: Any) -> None:
    model = gpt2()
    names = run(
        "steps = weighted_steps(client, model, example_losses, target_batches, guard=guard_batches)",
        PolicyClient=partial(PolicyClient, when_lost="wait"),
        address=server.address,
        train=range(N),
        model=model,
        example_losses=lm_losses,
        target_batches=batches(8, seed=1),
        guard_batches=batches(8, seed=2),
        loader=[(batch["id"], batch) for batch in batches()],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    with names["client"] as client:
        assert client.flush(30)
        status = client.status()
        assert (status.spec.rule, status.version, status.scored_examples) == ("strata", N // BATCH, N)
        assert status.guard_loss is not None
        assert np.isfinite(client.read_weights("score")).all()


def test_transformers(client: PolicyClient, run: Any, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    run(
        "PolicyTraining(client, target=target, guard=guard)",
        client=client,
        model=gpt2(),
        arguments=arguments,
        PolicyTraining=PolicyTraining,
        PolicyTrainer=PolicyTrainer,
        **{
            name: examples(count, seed=seed)
            for seed, (name, count) in enumerate({"train": N, "target": 8, "guard": 8}.items())
        },
    )
    assert_all_scored(client)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = gpt2()

    def forward(self, **inputs: Tensor) -> Any:
        return self.net(**inputs)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning(client: PolicyClient, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(
        "PolicyCallback(client, example_losses",
        client=client,
        example_losses=lm_losses,
        target_batches=list(batches(8, seed=1)),
        loader=batches(),
        Model=Module,
        PolicyCallback=PolicyCallback,
        lightning=lightning,
    )
    assert client.flush(30)
    assert (client.status().version, client.status().scored_examples) == (3 * N // BATCH, N)


def test_accelerate(client: PolicyClient, run: Any, tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path)), gpt2()
    accelerator.init_trackers("run")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    names = {"model": model, "optimizer": optimizer, "loader": loader, "example_losses": lm_losses}
    target = list(batches(8, seed=1))
    run("accelerator.accumulate", client=client, accelerator=accelerator, target_batches=target, **names)
    assert_all_scored(client)


def test_names(client: PolicyClient, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"example {i}" for i in range(N)]
    found = run("ExampleKeys(", ExampleKeys=ExampleKeys, names=names[::-1], batch={"name": names[:3]})
    assert found["ids"].tolist() == [sorted(names).index(name) for name in names[:3]]
    assert list(ExampleKeys.load("keys.csv")) == sorted(names)


def test_sampling_and_resuming(client: PolicyClient, run: Any, tmp_path: Path) -> None:
    client.step(range(N), contributions=np.linspace(-1, 1, N))
    names = {"dataset": range(N), "path": tmp_path / "checkpoint.pt"}
    sampler = run("WeightedSampler(", client=client, **names)["sampler"]
    drawn = np.array([i for _ in range(8) for i in sampler])
    assert (drawn >= N // 2).mean() > 0.9  # the others are at the floor
    client.step(range(N), contributions=np.linspace(1, -1, N))  # what the resumed run shall not know of
    with client.for_policy(client.policy) as another:
        names["sampler"] = equipoise.torch.WeightedSampler(another, N)
        resumed = run("resume_run(", client=another, **names)["client"]
    assert resumed.policy != client.policy
    assert (np.diff(resumed.read_weights("score")) > 0).all()
    resumed.close()


def test_text_without_sources_is_cut_into_buckets(run: Any) -> None:
    rows = [[i % 7, i % 5, i % 3] * 4 for i in range(50)]
    found = run("perplexity_buckets(", tokens=rows, rows=rows, np=np, Subset=Subset)["sources"]
    assert sorted(len(part) for part in found.values()) == [4] * 10 + [5] * 2
    assert sorted(row for part in found.values() for row in part) == sorted(rows)


def test_exploring_sources(server: ServerProcess, run: Any) -> None:
    """Explored for 44 batches, of which every second one after the 20th is measured; then the guard is heard."""

    def connected(address: str, **options: Any) -> PolicyClient:
        return PolicyClient(server.address, when_lost="wait", **options)

    model = gpt2()
    known = run(
        "measure_until",
        PolicyClient=connected,
        sources={name: examples(16, seed=seed) for seed, name in enumerate(("books", "code", "web"))},
        model=model,
        losses=lm_losses,
        optimizer=torch.optim.AdamW(model.parameters()),
        target_batches=list(batches(8, seed=3)),
        guard_batches=list(batches(8, seed=4)),
    )
    client, mixture, steps = known["client"], known["mixture"], known["steps"]
    assert next(iter(mixture)) in range(3 * 48)
    schedule = steps.schedule
    assert [number for number in range(99) if schedule.measures(number)] == [*range(20, 44, 2)]
    assert [number for number in range(60) if schedule.hears(number)] == [44, 52]
    with steps.capture([0, 1, 2]) as step:
        assert not step.measured
    client.close()


def test_mixing_sources(server: ServerProcess, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain loop, Hugging Face and Lightning, one after the other."""
    monkeypatch.chdir(tmp_path)

    def sources() -> dict[str, Any]:
        table = {name: values.tolist() for name, values in tokens(24, seed=2).items()}
        stream = datasets.Dataset.from_dict(table).to_iterable_dataset().with_format("torch")
        rows = [{k: v for k, v in row.items() if k != "id"} for row in examples(40, seed=1)]
        return {"books": rows[:24], "code": rows[24:], "web": stream}

    def connected(address: str, **options: Any) -> PolicyClient:
        assert address == "localhost:50051"
        return PolicyClient(server.address, when_lost="wait", **options)

    def mixed(given: dict[str, Any], **options: Any) -> Any:
        sizes = {"books": 24, "code": 16, "web": 24}
        return equipoise.torch.Mixture(given, num_samples=64, refresh_every=16, sizes=sizes, **options)

    model = gpt2()
    names = {
        "model": model,
        "direction": equipoise.torch.TargetDirection(model, lm_losses, list(batches(8, seed=3))),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    known = run("temperature=", PolicyClient=connected, Mixture=mixed, DataLoader=DataLoader, **sources(), **names)
    client, mixture = known["client"], known["mixture"]
    assert client.flush(30)
    assert (client.status().version, client.status().scored_examples) == (8, 3)
    shares = [mixture.metrics()[f"policy/share/{name}"] for name in ("books", "code", "web")]
    assert sum(shares) == pytest.approx(1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    run(
        "mixture=mixture",
        client=client,
        mixture=mixture,
        model=gpt2(),
        arguments=arguments,
        target=examples(8, seed=3),
        PolicyTraining=PolicyTraining,
        PolicyTrainer=PolicyTrainer,
    )
    assert client.flush(30)
    assert client.status().version == 16
    run(
        "options=TrainingOptions(sampled=True)",
        client=client,
        mixture=mixture,
        losses=lm_losses,
        target_batches=list(batches(8, seed=3)),
        DataLoader=DataLoader,
        PolicyCallback=PolicyCallback,
        lightning=lightning,
        Model=Module,
    )
    assert client.flush(30)
    assert client.status().version == 24
    client.close()


def test_mixing_by_losses_alone(server: ServerProcess, run: Any) -> None:
    rows = [{k: v for k, v in row.items() if k != "id"} for row in examples(48, seed=1)]
    model = gpt2()
    known = run(
        'rule="group_softmax"',
        PolicyClient=lambda _, **options: PolicyClient(server.address, when_lost="wait", **options),
        DataLoader=DataLoader,
        books=rows[:16],
        code=rows[16:32],
        web=rows[32:],
        example_losses=lm_losses,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    client = known["client"]
    assert client.flush(30)
    assert (client.status().version, client.status().scored_examples) == (6, 3)
    scores, weights = client.read_weights("score"), client.read_weights()
    assert (np.argsort(scores) == np.argsort(weights)).all()
    assert np.ptp(weights) > 0
    client.close()
