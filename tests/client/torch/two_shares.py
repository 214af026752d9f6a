"""What each of two processes gets of an epoch, by every way of sharing it out; the test counts."""

import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import set_start_method
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler

from equipoise import PolicyClient, Timeout
from equipoise.errors import InvalidRequestError
from equipoise.lightning import PolicyCallback
from equipoise.torch import CaptureError, DistributedWeightedSampler, WeightedSampler
from equipoise.torch.training import TrainingOptions

N = 70
HEAVY = 7
"""Only ids below it have a weight: whatever else comes was not drawn by weight."""
Epochs: TypeAlias = list[list[int]]
Maker: TypeAlias = Callable[[], Sampler[int]]

PREPARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "a last batch that is short": ({}, {"batch_size": 4}),
    "an uneven number of batches": ({}, {"batch_size": 14}),
    "not even": ({"even_batches": False}, {"batch_size": 14}),
    "drop_last": ({}, {"batch_size": 4, "drop_last": True}),
    "split": ({"split_batches": True}, {}),
    "split, a last batch that is short": ({"split_batches": True}, {"batch_size": 4}),
    "dispatch": ({"dispatch_batches": True}, {}),
    "dispatch, a last batch that is short": ({"dispatch_batches": True}, {"batch_size": 4}),
    "dispatch and split": ({"dispatch_batches": True, "split_batches": True}, {}),
    "dispatch, workers": ({"dispatch_batches": True}, {"num_workers": 1}),
    "workers that stay": ({}, {"num_workers": 1, "persistent_workers": True}),
    "seedable": ({"use_seedable_sampler": True}, {}),
    "batch_sampler=": ({}, {"batch_sampler": 10}),
    "one row": ({}, {"rows": 1}),
    "fewer rows than a batch": ({}, {"rows": 3}),
}
"""Options of `DataLoaderConfiguration`, and of the loader, by name."""


class Urn:
    """Draws by weight as a server does, in this process."""

    def __init__(self, heavy: int = HEAVY) -> None:
        self.heavy = heavy
        self.calls = 0

    def sample_examples(
        self, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        self.calls += 1
        return np.random.default_rng(seed).integers(self.heavy, size=count, dtype=np.uint64)


class Places:
    """A dataset of places."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def loader_of(sampler: Sampler[int], **options: Any) -> DataLoader[Any]:
    size, rows = options.pop("batch_sampler", None), options.pop("rows", N)
    if size is not None:
        return DataLoader(Places(rows), batch_sampler=BatchSampler(sampler, size, drop_last=False), **options)  # type: ignore[arg-type]
    return DataLoader(Places(rows), sampler=sampler, **({"batch_size": 10} | options))  # type: ignore[arg-type]


def accelerator_of(**configuration: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**configuration))


def epochs_of(loader: Any, count: int = 2) -> Epochs:
    return [[int(i) for batch in loader for i in batch] for _ in range(count)]


def prepared(name: str, make: Callable[[int], Sampler[int]]) -> Epochs:
    configuration, options = PREPARED[name]
    loader = accelerator_of(**configuration).prepare(loader_of(make(options.get("rows", N)), **options))
    epochs = epochs_of(loader)
    assert len(loader) == len(list(loader))
    return epochs


def weighted(rows: int = N) -> WeightedSampler:
    return WeightedSampler(Urn(min(HEAVY, rows)), rows, draw=16)


def share(rows: int = N) -> DistributedWeightedSampler:
    return DistributedWeightedSampler(Urn(min(HEAVY, rows)), rows, draw=16)


def uniform(rows: int = N) -> Sampler[int]:
    return RandomSampler(range(rows), replacement=True, num_samples=rows)


def draws_of_the_idle(rank: int) -> int:
    """How often a process asks for ids when another one reads for it."""
    sampler = weighted()
    epochs_of(accelerator_of(dispatch_batches=True).prepare(loader_of(sampler, num_workers=1)))
    client: Any = sampler.client
    return int(client.calls)


def resumed(rank: int, **configuration: Any) -> dict[str, Any]:
    """An epoch that is interrupted after two of its batches: what was trained before and after, and the epoch whole."""
    size = 14 if configuration.get("split_batches") else 7
    whole = epochs_of(accelerator_of(**configuration).prepare(loader_of(weighted(), batch_size=size)), 1)[0]
    sampler, ids = weighted(), []
    for step, batch in enumerate(accelerator_of(**configuration).prepare(loader_of(sampler, batch_size=size)), 1):
        ids += batch.tolist()
        if step == 2:
            break
    state = sampler.state_dict(trained=2 * len(ids))
    fresh = weighted()
    fresh.load_state_dict(state)
    again = accelerator_of(**configuration)
    following = again.prepare(loader_of(fresh, batch_size=size))
    reads = not configuration.get("dispatch_batches") or rank == 0
    said = said_by(lambda: next(iter(again.skip_first_batches(following, 2)))) if reads else ""
    return {"whole": whole, "parts": ids + epochs_of(following, 1)[0], "next": epochs_of(following, 1)[0], "said": said}


def losses_of(module: Any, batch: Tensor) -> Tensor:
    return module.net(batch[:, None].float()).squeeze(1)


class Module(lightning.LightningModule):
    """Notes what it is trained on."""

    policy: PolicyCallback | None = None

    def __init__(self, make: Maker | None = None, **options: Any) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.epochs: Epochs = []
        self.make, self.options = make, options

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.epochs[-1] += batch.tolist()
        return losses_of(self, batch).mean() if self.policy is None else self.policy.loss(batch, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        assert self.make is not None
        return loader_of(self.make(), **self.options)


def lightened(make: Maker, *, hooked: bool = False, trainer: dict[str, Any] | None = None, **options: Any) -> Epochs:
    module = Module(make, **options)
    lightning_trainer(**(trainer or {})).fit(module, None if hooked else loader_of(make(), **options))
    return module.epochs


def under_a_policy(**options: Any) -> Epochs:
    """The sampler in a `batch_sampler=`, and known to the policy."""
    sampler = share()
    with PolicyClient("127.0.0.1:1", policy="nobody", num_examples=N, timeout=Timeout(close=0.1)) as client:
        chosen = TrainingOptions(sampled=True, verify=False)
        policy = PolicyCallback(client, losses_of, [torch.arange(4)] * 2, options=chosen, sampler=sampler)
        module = Module()
        module.policy = policy
        lightning_trainer(callbacks=[policy], **options).fit(module, loader_of(sampler, batch_sampler=10))
    return module.epochs


def lightning_trainer(**options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def said_by(run: Callable[[], Any]) -> str:
    try:
        run()
    except (InvalidRequestError, CaptureError) as error:
        return str(error)
    return ""


def refusals(rank: int) -> dict[str, str]:
    return {
        "a plain loop": said_by(lambda: epochs_of(loader_of(weighted()))),
        "prepare": said_by(lambda: prepared("plain", share)),
        "split": said_by(lambda: prepared("split", share)),
        "dispatch": said_by(lambda: prepared("dispatch", share)) if rank == 0 else "",  # the other would wait for it
        "lightning": said_by(lambda: lightened(weighted)),
        "lightning, hook": said_by(lambda: lightened(weighted, hooked=True)),
        "lightning, alone": said_by(lambda: lightened(weighted, trainer={"use_distributed_sampler": False})),
        "lightning, batch_sampler=": said_by(under_a_policy),
    }


def process(rank: int, folder: str) -> None:
    """All of it, in one of two processes."""
    set_start_method("fork", force=True)  # for workers; a process that was spawned would spawn them
    os.environ["ACCELERATE_USE_CPU"] = "true"
    early = share()
    before = said_by(lambda: len(early))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    results = {
        "before": before,
        "prepared": {name: prepared(name, weighted) for name in PREPARED},
        "uniform": {name: prepared(name, uniform) for name in PREPARED},
        "idle": draws_of_the_idle(rank),
        "plain loop": epochs_of(loader_of(early)),
        "plain loop, workers": epochs_of(loader_of(share(), num_workers=2)),
        "plain loop, one row": epochs_of(loader_of(share(1), rows=1)),
        "plain loop, uniform": epochs_of(loader_of(DistributedSampler(range(N)))),
        "resumed": {
            "plain": resumed(rank),
            "split": resumed(rank, split_batches=True),
            "dispatch": resumed(rank, dispatch_batches=True),
        },
        "lightning": {
            "loader": lightened(share),
            "hook": lightened(share, hooked=True),
            "workers": lightened(share, num_workers=1, persistent_workers=True),
            "batch_sampler=": under_a_policy(use_distributed_sampler=False),
            "alone": lightened(share, trainer={"use_distributed_sampler": False}),
        },
        "refusals": refusals(rank),
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
