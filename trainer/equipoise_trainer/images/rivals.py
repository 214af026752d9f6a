"""What one would do about wrong labels without a policy, each after its paper.

Each gives the network it ends with and a score per training label, low where it takes the label for wrong.

Shape legend: N training images, B of a batch, C classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from numpy.typing import NDArray
from torch import Tensor

from equipoise_trainer.images.data import CLASSES, Images, ImageTask, order
from equipoise_trainer.images.network import Losses, Schedule, Trained, build, probabilities, score, train

FOLDS: Final = 5
TRUSTED_TIMES: Final = 3
RAMP_EPOCHS: Final = 10
"""Epochs over which small-loss selection comes to its full rate, at most half of the run: T_k of co-teaching."""
AUM_QUANTILE: Final = 0.99

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a rival ends with.

    Attributes:
        trained: its network.
        scores: of the training labels, [N]; low: wrong.
    """

    trained: Trained
    scores: Scores


def uniform(task: ImageTask, schedule: Schedule, share: float) -> Outcome:
    """All labels as they are; their mean losses over the run are a score that costs nothing."""
    trained = train(task.train, schedule, test=task.test)
    return Outcome(trained=trained, scores=-trained.losses.mean)


def oracle(task: ImageTask, schedule: Schedule, share: float) -> Outcome:
    """Without the labels that are wrong."""
    trained = train(task.train.take(np.flatnonzero(~task.wrong)), schedule, test=task.test)
    return Outcome(trained=trained, scores=(~task.wrong).astype(np.float64))


def trusted(task: ImageTask, schedule: Schedule, share: float) -> Outcome:
    """The trusted images of target A are trained on too, three times an epoch."""
    trained = train(task.train.joined(task.target, times=TRUSTED_TIMES), schedule, test=task.test)
    return Outcome(trained=trained, scores=-trained.losses.mean[: len(task.train)])


def forgotten(epoch: int, *, epochs: int, share: float) -> float:
    """The share of a batch that small-loss selection leaves out in an epoch, from 0: τ·min(epoch/T_k, 1)."""
    return share * min(epoch / max(1, min(RAMP_EPOCHS, epochs // 2)), 1.0)


def smallest(losses: Tensor, share: float) -> Tensor:
    """Weights of a batch of which the share with the largest losses is left out, mean 1: [B]."""
    kept = max(1, round((1 - share) * len(losses)))
    weights = torch.zeros_like(losses)
    weights[losses.argsort(stable=True)[:kept]] = len(losses) / kept
    return weights


def small_loss(task: ImageTask, schedule: Schedule, share: float) -> Outcome:
    """Of each batch the smallest losses, at the true rate of wrong labels."""

    def select(epoch: int, _rows: Tensor, losses: Tensor) -> Tensor:
        return smallest(losses, forgotten(epoch, epochs=schedule.epochs, share=share))

    trained = train(task.train, schedule, select=select, test=task.test)
    return Outcome(trained=trained, scores=-trained.losses.mean)


def lower_mode(losses: Scores, seed: int) -> NDArray[np.bool_]:
    """Which losses [n], scaled to [0, 1], belong to the lower of two Gaussians: see DivideMix (arXiv 2002.07394)."""
    from sklearn.mixture import GaussianMixture  # takes a second to import

    scaled = ((losses - losses.min()) / max(float(np.ptp(losses)), 1e-12))[:, None]
    model = GaussianMixture(2, tol=1e-2, reg_covar=5e-4, max_iter=10, random_state=seed).fit(scaled)
    lower: NDArray[np.bool_] = model.predict_proba(scaled)[:, model.means_[:, 0].argmin()] > 0.5
    return lower


def mixture(task: ImageTask, schedule: Schedule, share: float) -> Outcome:
    """Of all examples those whose smoothed loss belongs to the lower of two Gaussians: the rate is not known.

    Fitted once an epoch after a fifth of the run.
    """
    warm_up, seen = max(1, schedule.epochs // 5), Losses.of(len(task.train))
    clean, fitted = torch.ones(len(task.train)), -1

    def select(epoch: int, rows: Tensor, losses: Tensor) -> Tensor:
        nonlocal fitted
        if epoch >= warm_up and epoch != fitted:
            fitted = epoch
            known = ~np.isnan(seen.smoothed)
            clean[torch.from_numpy(known)] = torch.from_numpy(lower_mode(seen.smoothed[known], schedule.seed)).float()
        seen.note(rows, losses)
        weights = clean[rows]
        return weights / weights.mean() if weights.any() else weights

    trained = train(task.train, schedule, select=select, test=task.test)
    return Outcome(trained=trained, scores=-trained.losses.mean)


def co_teaching(task: ImageTask, schedule: Schedule, share: float) -> Outcome:
    """Two networks, each trained on what has the smallest losses under the other (arXiv 1804.06872); rate known."""
    images = task.train
    pair = [Trained(build(seed), Losses.of(len(images))) for seed in (schedule.seed, schedule.seed + 1000)]
    optimizers = [torch.optim.Adam(one.network.parameters(), lr=schedule.learning_rate) for one in pair]
    for epoch in range(schedule.epochs):
        left_out = forgotten(epoch, epochs=schedule.epochs, share=share)
        for rows in order(len(images), batch=schedule.batch, seed=schedule.seed, epoch=epoch):
            batch = images.take(rows)
            losses = [F.cross_entropy(one.network(batch.pixels), batch.labels, reduction="none") for one in pair]
            chosen = [smallest(each.detach(), left_out) for each in losses]
            for one, optimizer, each, weights in zip(pair, optimizers, losses, reversed(chosen), strict=True):
                optimizer.zero_grad()
                (weights * each).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                one.losses.note(rows, each)
        pair[0].curve.append(score(pair[0].network, task.test))
    return Outcome(trained=pair[0], scores=-(pair[0].losses.mean + pair[1].losses.mean) / 2)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of the label less the largest other one: [B]."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def area_under_margin(images: Images, pretended: Tensor, schedule: Schedule) -> Scores:
    """Mean margin of each example over a run in which some pretend to be of a class of their own: [N]; NaN: not seen.

    Args:
        images: the training images.
        pretended: the rows that get class C.
        schedule: how long.
    """
    labels = images.labels.clone()
    labels[pretended] = CLASSES
    total, visits = np.zeros(len(images)), np.zeros(len(images))

    def watch(rows: Tensor, logits: Tensor) -> None:
        total[rows.numpy()] += margins(logits, labels[rows]).double().numpy()
        visits[rows.numpy()] += 1

    train(Images(images.pixels, labels), schedule, classes=CLASSES + 1, watch=watch)
    return np.where(visits > 0, total / np.maximum(visits, 1), np.nan)


def aum(task: ImageTask, schedule: Schedule, share: float) -> Outcome:
    """Trained without what has a smaller area under the margin than 99 % of threshold examples (arXiv 2001.10528).

    Two runs of half the length, so that each example is measured as itself; then the run.
    """
    images, count = task.train, len(task.train) // (CLASSES + 1)
    order_ = torch.from_numpy(np.random.default_rng((schedule.seed, 1)).permutation(len(images)))
    half = replace(schedule, epochs=max(1, schedule.epochs // 2))
    measured, removed = [], np.zeros(len(images), bool)
    for part in (order_[:count], order_[count : 2 * count]):
        areas = area_under_margin(images, part, half)
        pretended = np.isin(np.arange(len(images)), part.numpy())
        removed |= (areas <= np.nanquantile(areas[pretended], AUM_QUANTILE)) & ~pretended
        measured.append(np.where(pretended, np.nan, areas))
    kept = np.flatnonzero(~removed)
    trained = train(images.take(kept if len(kept) else np.arange(len(images))), schedule, test=task.test)
    first, second = measured
    scores = np.where(np.isnan(first), second, np.where(np.isnan(second), first, (first + second) / 2))
    return Outcome(trained=trained, scores=scores)


def cleanlab(task: ImageTask, schedule: Schedule, share: float) -> Outcome:
    """Trained without what `cleanlab.filter.find_label_issues` finds, by out-of-fold predictions of five networks."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores
    from sklearn.model_selection import StratifiedKFold

    images, labels = task.train, task.train.labels.numpy()
    predicted = np.zeros((len(images), CLASSES))
    for inside, outside in StratifiedKFold(FOLDS, shuffle=True, random_state=schedule.seed).split(labels, labels):
        trained = train(images.take(inside), schedule)
        predicted[outside] = probabilities(trained.network, images.take(outside))
    issues = find_label_issues(labels, predicted, n_jobs=1)
    trained = train(images.take(np.flatnonzero(~issues)), schedule, test=task.test)
    return Outcome(trained=trained, scores=get_label_quality_scores(labels, predicted))


def cleanlab_is_installed() -> bool:
    """Whether the package is there: `pip install cleanlab`."""
    return find_spec("cleanlab") is not None


RIVALS: Final[Mapping[str, Callable[[ImageTask, Schedule, float], Outcome]]] = {
    "uniform": uniform,
    "oracle": oracle,
    "trusted": trusted,
    "small-loss": small_loss,
    "mixture": mixture,
    "co-teaching": co_teaching,
    "aum": aum,
    "cleanlab": cleanlab,
}
"""By name: from a task, a schedule and the true share of wrong labels to what it ends with."""
