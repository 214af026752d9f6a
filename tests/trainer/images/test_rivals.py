"""The rivals do what their papers say."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from equipoise_trainer.analysis import detection_auroc
from equipoise_trainer.images import rivals
from equipoise_trainer.images.data import CLASSES, Images, ImageTask, make_task, order
from equipoise_trainer.images.network import Schedule, Trained, build, train
from equipoise_trainer.images.rivals import RIVALS

SCHEDULE = Schedule(epochs=2, batch=32, learning_rate=1e-3, seed=0)
SHARE = 0.3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> ImageTask:
    return make_task(noise="random", share=SHARE, seed=0)


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", ["confused", "random"])
def test_labels_are_wrong_as_they_should_be(noise: str) -> None:
    noisy, clean = make_task(noise=noise, share=SHARE, seed=3), make_task(noise=noise, share=0.0, seed=3)
    given, true = noisy.train.labels.numpy(), clean.train.labels.numpy()
    assert ((given != true) == noisy.wrong).all()
    assert abs(noisy.wrong.mean() - SHARE) < 0.06
    pairs = {(int(a), int(b)) for a, b in zip(true[noisy.wrong], given[noisy.wrong], strict=True)}
    if noise == "confused":
        assert pairs == {(label, label + 1 if label % 2 == 0 else label - 1) for label in range(CLASSES)}
    else:
        assert len(pairs) > 60
    sets = [noisy.train, noisy.target, noisy.guard, noisy.test]
    assert [len(images) for images in sets] == [1100, 100, 100, 497]
    rows = {images.pixels[i].numpy().tobytes() for images in sets for i in range(len(images))}
    assert len(rows) == 1797  # all digits differ, and none is in two sets


def test_the_share_that_is_left_out_grows_to_the_rate() -> None:
    shares = [rivals.forgotten(epoch, epochs=40, share=0.4) for epoch in (0, 5, 10, 39)]
    assert shares == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert [rivals.forgotten(epoch, epochs=4, share=0.4) for epoch in range(4)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert rivals.forgotten(0, epochs=1, share=0.4) == 0.0


def test_small_losses_are_the_mean_over_what_is_kept(task: ImageTask) -> None:
    """Each step of an own loop takes the mean over the rows with the smallest losses."""
    network = build(SCHEDULE.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=SCHEDULE.learning_rate)
    for epoch in range(SCHEDULE.epochs):
        for rows in order(len(task.train), batch=32, seed=0, epoch=epoch):
            losses = F.cross_entropy(network(task.train.pixels[rows]), task.train.labels[rows], reduction="none")
            kept = round(32 * (1 - SHARE * epoch))
            optimizer.zero_grad()
            losses.sort().values[:kept].mean().backward()
            optimizer.step()
    same(RIVALS["small-loss"](task, SCHEDULE, SHARE).trained.network, network)


def test_co_teaching_exchanges_what_has_small_losses(task: ImageTask) -> None:
    first, second = build(0), build(1000)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3) for network in (first, second)]
    for epoch in range(SCHEDULE.epochs):
        for rows in order(len(task.train), batch=32, seed=0, epoch=epoch):
            x, y = task.train.pixels[rows], task.train.labels[rows]
            kept = round(32 * (1 - SHARE * epoch))
            chosen = [
                F.cross_entropy(n(x), y, reduction="none").topk(kept, largest=False).indices for n in (first, second)
            ]
            for network, optimizer, taken in ((first, optimizers[0], chosen[1]), (second, optimizers[1], chosen[0])):
                optimizer.zero_grad()
                F.cross_entropy(network(x[taken]), y[taken]).backward()
                optimizer.step()
    same(RIVALS["co-teaching"](task, SCHEDULE, SHARE).trained.network, first)


def test_margins_are_against_the_largest_other_logit() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(7, (50,), generator=torch.Generator().manual_seed(1))
    expected = [
        row[y] - max(v for i, v in enumerate(row) if i != y)
        for row, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(rivals.margins(logits, labels), torch.tensor(expected))


def test_areas_are_mean_margins_and_who_pretends_is_of_a_class_of_its_own(task: ImageTask) -> None:
    pretended = torch.arange(0, 1100, 11)
    labels = task.train.labels.clone()
    labels[pretended] = CLASSES
    seen: dict[int, list[float]] = {}

    def watch(rows: torch.Tensor, logits: torch.Tensor) -> None:
        assert logits.shape[1] == CLASSES + 1
        for row, values in zip(rows.tolist(), logits.tolist(), strict=True):
            own = values.pop(int(labels[row]))
            seen.setdefault(row, []).append(own - max(values))

    train(Images(task.train.pixels, labels), SCHEDULE, classes=CLASSES + 1, watch=watch)
    areas = rivals.area_under_margin(task.train, pretended, SCHEDULE)
    for row in range(len(areas)):
        assert areas[row] == pytest.approx(np.mean(seen.get(row, [np.nan])), rel=1e-5, nan_ok=True)


def test_the_lower_mode_is_what_bayes_rule_gives_it() -> None:
    random = np.random.default_rng(0)
    losses = np.concatenate([random.normal(0.3, 0.1, 700), random.normal(2.0, 0.4, 300)])
    densities = [s * np.exp(-(((losses - m) / d) ** 2) / 2) / d for s, m, d in ((0.7, 0.3, 0.1), (0.3, 2.0, 0.4))]
    assert (rivals.lower_mode(losses, 0) == (densities[0] > densities[1])).mean() > 0.99


def test_the_oracle_sees_no_wrong_label_and_trusted_images_are_seen_three_times(
    task: ImageTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Images] = []

    def noted(images: Images, *arguments: object, **options: object) -> Trained:
        taken.append(images)
        return train(images, *arguments, **options)

    monkeypatch.setattr(rivals, "train", noted)
    for name in ("oracle", "trusted", "aum"):
        RIVALS[name](task, replace(SCHEDULE, epochs=1), SHARE)
    truth = make_task(noise="random", share=0.0, seed=0).train.labels[torch.from_numpy(~task.wrong)]
    assert torch.equal(taken[0].labels, truth)
    assert torch.equal(taken[1].labels[1100:], torch.cat([task.target.labels] * 3))
    pretending = [images.labels == CLASSES for images in taken[2:4]]
    assert [int(each.sum()) for each in pretending] == [100, 100]
    assert not (pretending[0] & pretending[1]).any()


@pytest.mark.parametrize("name", RIVALS)
def test_wrong_labels_are_found(name: str, task: ImageTask) -> None:
    """By every rival's own scores, on random labels, where this is not hard; the task stays as it is."""
    if name == "cleanlab":
        pytest.importorskip("cleanlab")
    before = copy.deepcopy(task.train)
    outcome = RIVALS[name](task, replace(SCHEDULE, epochs=6), SHARE)
    assert detection_auroc(outcome.scores, task.wrong) > 0.8
    assert len(outcome.trained.curve) == 6
    assert torch.equal(before.labels, task.train.labels)
