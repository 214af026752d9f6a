"""How old and how small may the target direction be? Rank correlation of contributions with those of the best one.

    python -m tests.benchmarks.direction [--seeds 3] [--threads 1]

A small GPT (width 64, 2 layers, length 32, vocabulary 500) is trained by AdamW on three sources: the target's Markov
chain, another chain, and the target's chain with a third of its tokens replaced. At several times of the training,
contributions of 256 training sequences are computed with directions from m target sequences, as they were k steps ago,
and compared by Spearman's rank correlation with those of a fresh direction from 1,024 sequences that the smaller ones
do not share. The cost is that of refreshing, as a part of a plain step of 64 sequences.
"""

import argparse
import copy
import json
from collections import defaultdict
from statistics import mean

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from equipoise.torch import GhostContributions, TargetDirection, causal_lm_losses
from equipoise.torch.vectors import named_vectors
from tests.benchmarks import torch_cost

VOCABULARY, LENGTH, BATCH, WIDTH = 500, 32, 64, 64
TIMES = (100, 200, 300)
AGES = (0, 1, 5, 10, 20, 50)
SIZES = (4, 16, 64, 256)
PROBES, BEST = 256, 1024
DEFAULT = (10, 64)
"""Age and size that TargetDirection recommends."""


class Chain:
    """A random Markov chain in which three tokens follow each one."""

    def __init__(self, generator: torch.Generator) -> None:
        self._following = torch.randint(VOCABULARY, (VOCABULARY, 3), generator=generator)
        self._generator = generator

    def sequences(self, count: int) -> Tensor:
        """Sequences: integers [count, LENGTH]."""
        tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=self._generator)
        for position in range(1, LENGTH):
            choice = torch.randint(3, (count,), generator=self._generator)
            tokens[:, position] = self._following[tokens[:, position - 1], choice]
        return tokens


def losses_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of each sequence."""
    return causal_lm_losses(model(tokens), tokens)


def contributions(model: nn.Module, direction: TargetDirection, probes: Tensor) -> Tensor:
    """Contributions of the probes, the gradients left alone."""
    ghost = GhostContributions(model, direction, shared=["positions"])
    with ghost.capture(range(len(probes))) as capture:
        torch.autograd.grad(capture.losses(probes).sum(), list(model.parameters()))
    return capture.contributions


def fixed(model: nn.Module, old: nn.Module, batch: Tensor) -> TargetDirection:
    """A direction for a model, as it was for an older state of it."""
    source = TargetDirection(old, losses_of, list(batch.split(BATCH)))
    source.refresh()
    direction = TargetDirection(model, losses_of, [batch], refresh_every=10**9)
    direction.load_state_dict(
        {
            "batches_taken": 0,
            "age": source.age,
            "target_loss": source.target_loss,
            "guard_loss": source.guard_loss,
            "vectors": named_vectors(source.model, source.vectors),
        }
    )
    return direction


def correlations(seed: int) -> dict[tuple[int, int], list[float]]:
    """Rank correlations by age and size, one for each time."""
    generator = torch.Generator().manual_seed(seed)
    target, other = Chain(generator), Chain(generator)
    torch.manual_seed(seed)
    model = torch_cost.SmallGPT(width=WIDTH, length=LENGTH, vocabulary=VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    best, small = target.sequences(BEST), target.sequences(max(SIZES))

    def training(count: int) -> Tensor:
        noisy = target.sequences(count // 3)
        noise = torch.rand(noisy.shape, generator=generator) < 1 / 3
        noisy[noise] = torch.randint(VOCABULARY, (int(noise.sum()),), generator=generator)
        return torch.cat([target.sequences(count - 2 * (count // 3)), other.sequences(count // 3), noisy])

    past: list[nn.Module] = []
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for step in range(max(TIMES) + 1):
        past = [*past[-max(AGES) :], copy.deepcopy(model)]
        if step in TIMES:
            probes = training(PROBES)
            expected = contributions(model, fixed(model, model, best), probes)
            for age in AGES:
                for size in SIZES:
                    direction = fixed(model, past[-1 - age], small[:size])
                    correlation = spearmanr(contributions(model, direction, probes), expected).statistic
                    found[age, size].append(float(correlation))
        optimizer.zero_grad()
        losses_of(model, training(BATCH)).mean().backward()
        optimizer.step()
    return found


def cost(age: int, size: int) -> float:
    """Refreshing every `age` steps, in plain steps of a batch each step."""
    return size / BATCH / max(1, age)


def main() -> None:
    """Prints the table, and the whole as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = [correlations(seed) for seed in range(options.seeds)]
    print(f"mean (least) rank correlation of {options.seeds} seeds at steps {TIMES}; cost in plain steps")
    print("age, steps  " + "".join(f"{f'{size} sequences':>30}" for size in SIZES))
    table = {}
    for age in AGES:
        cells = []
        for size in SIZES:
            values = [value for run in runs for value in run[age, size]]
            table[f"{age},{size}"] = {"mean": round(mean(values), 3), "least": round(min(values), 3)}
            mark = "*" if (age, size) == DEFAULT else " "
            cells.append(f"{mean(values):.3f} ({min(values):.3f}) at {cost(age, size):5.2f}{mark}")
        print(f"{age:10}  " + "".join(f"{cell:>30}" for cell in cells))
    print(json.dumps(table))


if __name__ == "__main__":
    main()
