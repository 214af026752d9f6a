"""What each of two processes draws of a mixture, by every way of sharing it out; the test compares."""

import os
from datetime import timedelta
from itertools import islice
from multiprocessing import set_start_method
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from equipoise.torch import Mixture
from tests.client.torch.mixtures import NAMES, Places, Policy, SharedStream, Stream

TOTAL, BATCH, EVERY, EXPLORED = 240, 6, 25, 60


def mixture_of(rank: int, **options: Any) -> Mixture:
    """One whose weights move with every answer; the second process would be told others."""
    sources = {"books": Places("books", 60), "code": Stream("code", 25), "web": SharedStream("web", 15)}
    policy = Policy(1, 1, 1, moves=True)
    policy.version = 1000 * rank
    return Mixture(
        sources,
        client=policy,
        num_samples=TOTAL,
        sizes=dict(zip(NAMES, (4, 2, 1), strict=True)),
        refresh_every=EVERY,
        **options,
    )


def loader_of(mixture: Mixture, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(mixture.dataset, batch_size=BATCH, sampler=mixture, num_workers=workers)  # type: ignore[arg-type]


def rows_of(batches: Any) -> list[str]:
    return [row for _, batch in batches for row in batch]


def trained(loader: DataLoader[Any]) -> list[str]:
    """A loop in which processes wait for each other in every step."""
    model = DistributedDataParallel(nn.Linear(1, 1))
    rows = []
    for numbers, batch in loader:
        model(numbers[:, None].float()).sum().backward()
        rows += batch
    return rows


def resumed(rank: int, workers: int) -> dict[str, Any]:
    """Before and after a checkpoint in mid-epoch, of which the loader is ahead; and its state, for other numbers."""
    mixture = mixture_of(rank)
    before = rows_of(islice(loader_of(mixture, workers), 9))
    state = mixture.state_dict(trained=9 * BATCH)
    fresh = mixture_of(rank)
    client: Any = fresh.client
    client.version += mixture.client.reads  # type: ignore[union-attr]
    fresh.load_state_dict(state)
    return {"before": before, "after": rows_of(loader_of(fresh)), "state": state}


def numbered(rows: list[tuple[int, str]]) -> Tensor:
    """Rows as numbers, which can be sent to another process."""
    return torch.tensor([NAMES.index(row.split()[0]) * 1000 + int(row.split()[1]) for _, row in rows])


def dispatched(rank: int) -> list[int]:
    """Batches that the first process reads for both."""
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    mixture = mixture_of(rank)
    loader = DataLoader(mixture.dataset, batch_size=BATCH, sampler=mixture, collate_fn=numbered)  # type: ignore[arg-type]
    return [number for batch in accelerator.prepare(loader) for number in batch.tolist()]


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.rows = nn.Linear(1, 1), list[str]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rows += batch[1]
        return self.net(batch[0][:, None].float()).sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(rank: int) -> list[str]:
    module = Module()
    lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader_of(mixture_of(rank)))
    return module.rows


def process(rank: int, folder: str) -> None:
    set_start_method("fork", force=True)  # for workers; a process that was spawned would spawn them
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    mixture = mixture_of(rank)
    results: dict[str, Any] = {
        "plain": trained(loader_of(mixture)),
        "reads": mixture.client.reads,  # type: ignore[union-attr]
        "length": len(loader_of(mixture)),
        "shares": mixture.metrics(),
        "workers": trained(loader_of(mixture_of(rank), 2)),
        "resumed": resumed(rank, 2),
    }
    exploring = mixture_of(rank, explore=EXPLORED)
    results["exploring"] = trained(loader_of(exploring))
    results["exploring, reads"] = exploring.client.reads  # type: ignore[union-attr]
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(loader_of(mixture_of(rank)))
    results["accelerate"], results["accelerate, length"] = rows_of(prepared), len(prepared)
    ending = mixture_of(rank, ends="drop")
    results["ending"] = [trained(loader_of(ending)) for _ in range(2)]
    results["dispatched"] = dispatched(rank)
    wrong = Mixture({"a": Places("a", 9 + rank)}, num_samples=8)
    try:
        list(wrong)
        results["said"] = ""
    except ValueError as error:
        results["said"] = str(error)
    results["lightning"] = fitted(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
