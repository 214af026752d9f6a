"""A PyTorch job of several processes (DistributedDataParallel); all of them train one policy.

A fifth of the training labels is wrong; trusted examples are target and guard.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from equipoise import PolicyClient
from equipoise.torch import GhostContributions, TargetDirection, WeightedSteps

NUM_EXAMPLES, EPOCHS = 2000, 10

torch.manual_seed(0)
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")

truth = torch.randn(20)
inputs, trusted = torch.randn(NUM_EXAMPLES, 20), torch.randn(400, 20)
flipped = torch.rand(NUM_EXAMPLES) < 0.2
labels, trusted_labels = ((inputs @ truth > 0) ^ flipped).long(), (trusted @ truth > 0).long()
data = TensorDataset(torch.arange(NUM_EXAMPLES), inputs, labels)
sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(data)
target = [(trusted[:200].to(device), trusted_labels[:200].to(device))]
guard = [(trusted[200:].to(device), trusted_labels[200:].to(device))]

model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)).to(device))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)


def example_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of each example."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


with PolicyClient(
    os.environ["POLICY_SERVER"], policy=os.environ["POLICY_NAME"], num_examples=NUM_EXAMPLES, rule="ema_sign"
) as client:
    direction = TargetDirection(model, example_losses, target, guard_batches=guard)
    steps = WeightedSteps(client, GhostContributions(model, direction))
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for ids, x, y in DataLoader(data, batch_size=50, sampler=sampler):
            with steps.capture(ids) as step:
                step.loss((x.to(device), y.to(device))).backward()
            optimizer.step()
            optimizer.zero_grad()
    client.flush(60, durable=True)
    dist.barrier()
    if dist.get_rank() == 0:
        worst = torch.as_tensor(client.read_weights("score")).argsort()[: int(flipped.sum())]
        found = flipped[worst].float().mean()
        print(f"{found:.0%} of the examples with the lowest scores are mislabelled", flush=True)
dist.destroy_process_group()
