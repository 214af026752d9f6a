"""What rule `strata` is worth to a deep network with wrong labels: a CNN on scikit-learn's digits, served.

    python -m tests.benchmarks.strata [--seeds 3] [--epochs 20] [--settings '{"soft": true}'] [--uniform]

1,100 training images, 100 trusted ones for the direction, 497 of which nobody knows for the test. Some labels are
wrong: `confused`, each class with one other; `random`, with any. Each step sends losses before the backward pass and
gets its weights in the same step; norm-matched contributions, measured after it, follow without waiting. A line for
each job has, seed by seed, accuracy and loss of the test, and how well scores (z, and the smoothed loss among equals)
find the wrong labels.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import cross_entropy

from equipoise import PolicyClient
from equipoise.testing import ServerProcess, serve

BATCH = 32
LEARNING_RATE = 1e-3
MOMENTUM = 0.9
"""Of the target direction and of the training gradient that is taken out of it."""
JOBS = (("confused", 0.3), ("random", 0.3), ("clean", 0.0))

Parameters = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Images [n, 1, 8, 8] and labels [n]: to train on, with which labels are wrong; trusted; unseen."""

    train: tuple[Tensor, Tensor]
    wrong: NDArray[np.bool_]
    trusted: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run ended with; `found` is the area under the ROC curve, NaN on clean data."""

    accuracy: float
    loss: float
    found: float
    contrast: float


def make_data(seed: int, noise: str, share: float) -> Data:
    """Splits and wrong labels of a seed."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32)[:, None], digits.target.astype(np.int64)
    order = rng.permutation(len(labels))
    images, labels = images[order], labels[order]
    test, trusted, train = slice(0, 497), slice(497, 597), slice(697, None)
    noisy = labels[train].copy()
    wrong = rng.random(len(noisy)) < share
    if noise == "random":
        noisy[wrong] = (noisy[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    elif noise == "confused":
        noisy[wrong] ^= 1
    pick = lambda part: (torch.tensor(images[part]), torch.tensor(labels[part]))  # noqa: E731
    return Data(
        train=(torch.tensor(images[train]), torch.tensor(noisy)), wrong=wrong, trusted=pick(trusted), test=pick(test)
    )


def make_model(seed: int) -> nn.Module:
    """A small convolutional network."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class NormMatched:
    """Contributions ⟨V − (V·ḡ / ḡ·ḡ)·ḡ, ∇l⟩: of what a step would bring at equal length. V and ḡ are averages."""

    def __init__(self, model: nn.Module, trusted: tuple[Tensor, Tensor]) -> None:
        self._model = model
        self._parameters: Parameters = dict(model.named_parameters())
        self._trusted = trusted
        self._target: Parameters = {}
        self._gradient: Parameters = {}

    def measure(self, images: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """Contributions [B], after the backward pass of the weighted loss and before the optimiser's step."""
        loss = cross_entropy(self._model(self._trusted[0]), self._trusted[1])
        names, tensors = list(self._parameters), list(self._parameters.values())
        target = dict(zip(names, torch.autograd.grad(loss, tensors), strict=True))
        self._target = _averaged(self._target, target)
        gradient = {
            name: each.grad.detach().clone() for name, each in self._parameters.items() if each.grad is not None
        }
        self._gradient = _averaged(self._gradient, gradient)
        along = _inner(self._target, self._gradient) / _inner(self._gradient, self._gradient)
        direction = {name: self._target[name] - along * self._gradient[name] for name in names}

        def losses(parameters: Parameters) -> Tensor:
            return cross_entropy(functional_call(self._model, parameters, (images,)), labels, reduction="none")

        at = {name: each.detach() for name, each in self._parameters.items()}
        contributions: Tensor = jvp(losses, (at,), (direction,))[1]
        return contributions.numpy()


def run(
    server: ServerProcess, noise: str, share: float, *, seed: int, epochs: int, settings: dict[str, Any], uniform: bool
) -> Result:
    """Trains once under a policy of its own."""
    data, model = make_data(seed, noise, share), make_model(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    contributions = NormMatched(model, data.trusted)
    images, labels = data.train
    name = f"{noise}-{seed}"
    with PolicyClient(
        server.address, policy=name, num_examples=len(labels), rule="strata", settings=settings, when_lost="wait"
    ) as client:
        for ids in batches(len(labels), seed, epochs):
            losses = cross_entropy(model(images[ids]), labels[ids], reduction="none")
            served = client.step(ids, losses=losses.detach()).weights
            weights = torch.ones(len(ids)) if uniform else torch.from_numpy(served)
            optimizer.zero_grad()
            (weights * losses).mean().backward()
            client.submit(ids, contributions=contributions.measure(images[ids], labels[ids]), omit_weights=True)
            optimizer.step()
        client.flush()
        scores, smoothed, status = client.read_weights("score"), client.read_weights("loss"), client.status()
        client.admin.delete(name)
    seen = ~np.isnan(scores)
    ranks = np.lexsort((-smoothed[seen], scores[seen])).argsort()  # the worst first
    found = float(roc_auc_score(data.wrong[seen], -ranks)) if share else float("nan")
    with torch.no_grad():
        logits = model(data.test[0])
        accuracy = float((logits.argmax(1) == data.test[1]).float().mean())
        loss = float(cross_entropy(logits, data.test[1]))
    return Result(accuracy=accuracy, loss=loss, found=found, contrast=status.strata_contrast or 0.0)


def batches(num_examples: int, seed: int, epochs: int) -> Iterator[NDArray[np.int64]]:
    """Ids of each step, in an order that depends on the seed alone; the rest of an epoch is left out."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(num_examples)
        yield from order[: num_examples // BATCH * BATCH].reshape(-1, BATCH)


def main() -> None:
    """Runs all jobs and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="of the rule")
    parser.add_argument("--uniform", action="store_true", help="ask for weights, and train without them")
    parser.add_argument("--jobs", nargs="*", default=[noise for noise, _ in JOBS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with serve() as server:
        for noise, share in JOBS:
            if noise not in options.jobs:
                continue
            kinds = {"epochs": options.epochs, "settings": options.settings, "uniform": options.uniform}
            results = [run(server, noise, share, seed=seed, **kinds) for seed in range(options.seeds)]
            for what, digits in (("accuracy", 3), ("loss", 3), ("found", 3), ("contrast", 1)):
                values = [getattr(result, what) for result in results]
                shown = " ".join(f"{value:.{digits}f}" for value in values)
                print(f"{noise:9} {what:9} {shown}  mean {np.mean(values):.{digits}f}", flush=True)


def _averaged(old: Parameters, new: Parameters) -> Parameters:
    return {name: MOMENTUM * old[name] + (1 - MOMENTUM) * new[name] for name in new} if old else new


def _inner(left: Parameters, right: Parameters) -> float:
    return float(sum((left[name] * right[name]).sum() for name in left))


if __name__ == "__main__":
    main()
