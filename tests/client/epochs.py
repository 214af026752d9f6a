"""A training process whose DataLoader has forked workers, while its client trains, reads statuses and draws samples.

Prints counts as JSON at the end; a worker that crashes, or an epoch that is not complete, ends it before.
"""

import argparse
import gc
import json
import os

import equipoise
from equipoise.torch import WeightedSampler

# isort: split
import grpc
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

NUM_EXAMPLES = 64
BATCH = 8


class Numbers(Dataset[int]):
    """Each example is its id. Workers collect garbage now and then, so that they meet what they have inherited."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> int:
        if index == 0:
            gc.collect()
        return index


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--persistent", action="store_true")
    parser.add_argument("--sampler", action="store_true", help="draw the examples by their weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = f"epochs-{os.getpid()}"
    patient = equipoise.Timeout(step=60, connect=60, call=60, close=60)
    with equipoise.PolicyClient(options.address, policy=policy, num_examples=NUM_EXAMPLES, timeout=patient) as client:
        client.step([0], contributions=[1.0])
        client.status()
        loader = DataLoader(
            Numbers(),
            batch_size=BATCH,
            sampler=WeightedSampler(client, NUM_EXAMPLES) if options.sampler else None,
            num_workers=options.workers,
            persistent_workers=options.persistent,
            multiprocessing_context="fork" if options.workers else None,
        )
        seen = 0
        for _ in range(options.epochs):
            for ids in loader:
                client.submit(ids.numpy(), contributions=np.ones(len(ids)))
                seen += len(ids)
            client.status()
        assert seen == options.epochs * NUM_EXAMPLES, f"{seen} examples"
        assert client.flush(30)
        print(json.dumps({"grpc": grpc.__version__, "applied": client.stats.applied, "outages": client.stats.outages}))


if __name__ == "__main__":
    main()
