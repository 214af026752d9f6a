"""The loop: what moves the parameters, and what does not."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from equipoise_trainer.datasets import DatasetConfig, load
from equipoise_trainer.methods import training_set
from equipoise_trainer.perceptron import Array
from equipoise_trainer.tasks import Examples, Task
from equipoise_trainer.training import Observation, Plan, logged_steps, train


@pytest.fixture(scope="module")
def task() -> Task:
    return load(DatasetConfig(name="digits", seed=0, flipped=0.2))


@dataclass
class Signs:
    """The plainest rule there is: 1 for a positive contribution, else 0.1; remembers what it was told."""

    num_examples: int
    weights: Array = field(init=False)
    told: list[Observation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = np.ones(self.num_examples)

    def weigh(self, observation: Observation) -> Array:
        self.told.append(observation)
        rows = slice(None) if observation.ids is None else observation.ids
        self.weights[rows] = np.where(observation.contributions > 0, 1.0, 0.1)
        return self.weights.copy() if observation.wants_all else self.weights[rows]


def other_labels(examples: Examples) -> Examples:
    return replace(examples, labels=np.random.default_rng(9).permutation(examples.labels))


def test_uniform_full_batch_is_gradient_descent_as_torch_does_it(task: Task) -> None:
    trained = train(task, task.train, Plan(learning_rate=0.5, steps=30))
    layer = torch.nn.Linear(65, 10, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(30):
        optimiser.zero_grad()
        logits = layer(torch.from_numpy(task.train.features))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(task.train.labels)).backward()
        optimiser.step()
    np.testing.assert_allclose(trained.parameters, layer.weight.detach().numpy().T, rtol=1e-9, atol=1e-12)


def test_weights_answer_the_statistics_of_their_own_step(task: Task) -> None:
    weigher = Signs(len(task.train))
    trained = train(task, task.train, Plan(learning_rate=0.5, steps=1), weigher=weigher)
    (seen,) = weigher.told
    weights = np.where(seen.contributions > 0, 1.0, 0.1)
    residuals = np.full((1000, 10), 0.1) - np.eye(10)[task.train.labels]
    gradient = task.train.features.T @ (weights[:, None] * residuals) / 1000
    np.testing.assert_allclose(trained.parameters, -0.5 * gradient, rtol=1e-12, atol=1e-15)
    assert seen.target_loss == pytest.approx(np.log(10))
    np.testing.assert_array_equal(trained.weights, weights)


@pytest.mark.parametrize("batch_size", [None, 64])
def test_test_labels_influence_nothing(task: Task, batch_size: int | None) -> None:
    plan = Plan(learning_rate=0.5, steps=25, batch_size=batch_size)
    runs = [
        train(each, each.train, plan, weigher=Signs(len(each.train)))
        for each in (task, replace(task, test=other_labels(task.test)))
    ]
    np.testing.assert_array_equal(runs[0].parameters, runs[1].parameters)
    np.testing.assert_array_equal(runs[0].weights, runs[1].weights)
    assert not np.array_equal(runs[0].curve.test_loss, runs[1].curve.test_loss)


def test_guard_labels_and_the_planted_flips_influence_no_parameters(task: Task) -> None:
    plan = Plan(learning_rate=0.5, steps=25)
    changed = replace(task, guard=other_labels(task.guard), flipped=np.roll(task.flipped, 7))
    first, second = (train(each, each.train, plan, weigher=Signs(len(each.train))) for each in (task, changed))
    np.testing.assert_array_equal(first.parameters, second.parameters)
    assert not np.array_equal(first.curve.guard_loss, second.curve.guard_loss)


def test_target_labels_do_influence(task: Task) -> None:
    plan = Plan(learning_rate=0.5, steps=25)
    changed = replace(task, target=other_labels(task.target))
    first, second = (train(each, each.train, plan, weigher=Signs(len(each.train))) for each in (task, changed))
    assert not np.array_equal(first.parameters, second.parameters)


def test_norm_matched_steps_have_exactly_the_given_norms(task: Task) -> None:
    norms = np.linspace(0.3, 0.1, 20)
    trained = train(task, task.train, Plan(learning_rate=2.0, steps=20, gradient_norms=norms))
    np.testing.assert_allclose(trained.gradient_norms, norms, rtol=1e-12)
    first = train(task, task.train, Plan(learning_rate=2.0, steps=1, gradient_norms=norms[:1]))
    assert np.linalg.norm(first.parameters) == pytest.approx(2.0 * norms[0], rel=1e-12)


def test_mini_batches_visit_every_example_once_an_epoch(task: Task) -> None:
    weigher = Signs(len(task.train))
    train(task, task.train, Plan(learning_rate=0.1, steps=32, batch_size=64), weigher=weigher)
    sizes = [0 if seen.ids is None else len(seen.ids) for seen in weigher.told]
    assert sizes == [64] * 15 + [40] + [64] * 15 + [40]
    epochs = [np.concatenate([seen.ids for seen in weigher.told[at : at + 16]]) for at in (0, 16)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1000))
    assert not np.array_equal(*epochs)


def test_the_order_depends_on_the_seed_alone(task: Task) -> None:
    plan = Plan(learning_rate=0.1, steps=20, batch_size=64, seed=1)
    first, again, other = (train(task, task.train, each).parameters for each in (plan, plan, replace(plan, seed=2)))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_oracle_never_sees_a_flipped_example_and_target_alone_never_sees_train(task: Task) -> None:
    oracle = training_set("oracle", task)
    assert len(oracle) == 800
    np.testing.assert_array_equal(oracle.features, task.train.features[~task.flipped])
    assert training_set("target", task) is task.target
    assert training_set("served", task) is task.train


@pytest.mark.parametrize("steps", [1, 99, 100, 101, 1000, 5000])
def test_first_hundred_steps_and_the_last_are_logged(steps: int) -> None:
    logged = logged_steps(steps)
    assert logged == sorted(set(logged))
    assert logged[-1] == steps
    assert set(range(min(100, steps))) <= set(logged)
    assert len(logged) <= 351


def test_curves_hold_what_the_weights_were(task: Task) -> None:
    weigher = Signs(len(task.train))
    curve = train(task, task.train, Plan(learning_rate=0.5, steps=10), weigher=weigher).curve
    last = weigher.weights
    assert curve.steps.tolist() == list(range(11))
    np.testing.assert_allclose(curve.flipped_weights[-1], np.quantile(last[task.flipped], (0.1, 0.5, 0.9)))
    assert curve.flipped_share[-1] == pytest.approx(last[task.flipped].sum() / last.sum())
    assert curve.effective_share[-1] == pytest.approx(last.sum() ** 2 / (last**2).sum() / 1000)
    assert np.isfinite(curve.sim[:-1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: 0.0, must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate: nan, must be a positive number"),
        ({"steps": 0}, "steps: 0, must be at least 1"),
        ({"batch_size": 0}, "batch: 0, must be at least 1, or full"),
    ],
)
def test_errors_name_field_value_and_rule(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**({"learning_rate": 0.1, "steps": 1} | changes))  # type: ignore[arg-type]
