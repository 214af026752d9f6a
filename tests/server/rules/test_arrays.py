"""One formula on two array namespaces: what torch computes, as on a GPU, is what numpy computes, to the last bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from equipoise_server.rules import (
    PAGE_EXAMPLES,
    Evidence,
    LoggedStatistics,
    Rule,
    SettingValues,
    Statistics,
    TableState,
    arrays,
    build,
    evidence,
)

N = PAGE_EXAMPLES + 500

CASES: list[tuple[str, dict[str, float]]] = [
    ("ema_relu", {"saturation": 0.37}),
    ("ema_sign", {}),
    ("ema_sign", {"loss_penalty": 0.7, "floor": 0.0}),
    ("exponentiated_gradient", {}),
    ("exponentiated_gradient", {"unit": 0.5, "floor": 1e-4}),
    ("excess_loss", {"learning_rate": 0.3}),
    ("exp3", {}),
    ("group_dro", {"adjustment": 3.0}),
    ("group_softmax", {"temperature": 0.3}),
    ("learnability", {"decay": 0.3}),
    ("projected_gradient", {"step_size": 0.5}),
    ("rho", {"threshold": -0.2, "saturation": 0.3}),
    ("strata", {"min_count": 10.0, "memory": 50.0}),
    ("uniform", {}),
]


@contextmanager
def torch_alone() -> Iterator[None]:
    """Tables on the CPU are worked on as those of a GPU are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "NUMPY_ON_CPU", False)
        yield


def steps(rng: np.random.Generator) -> Iterator[Statistics]:
    """Few rows, many, none, all; examples that come back, signals that nearly vanish."""
    for rows in (1, 64, 5000, 0, 3, None, 700, 64):
        ids = None if rows is None else rng.choice(N, rows, replace=False)
        values = rng.normal(size=(3, N if rows is None else rows)) * np.exp(rng.normal(scale=4.0))
        contributions, losses, references = values.astype(np.float32)
        attempts = rng.integers(1, 2**20, len(losses))
        yield Statistics(
            ids=ids,
            contributions=contributions,
            losses=losses,
            reference_losses=references,
            successes=rng.integers(0, attempts + 1),
            attempts=attempts,
        )


def run(rule: Rule) -> tuple[TableState, list[LoggedStatistics], list[Any]]:
    """A policy after all steps, its log, and what was read after each of them, as bytes."""
    rng = np.random.default_rng(90)
    state = rule.init(N, device=torch.device("cpu"))
    log: list[LoggedStatistics] = []
    seen: list[Any] = []
    for number, step in enumerate(steps(rng)):
        scalars = rule.prepare(state, step)
        shown: Evidence | None = evidence(rule, state, step, scalars)
        pages = np.array([number % 3 > 0, True])
        state = rule.apply(state, step, scalars, pages=pages)
        state.guard_strength = 0.25 * (number % 2)
        log.append(LoggedStatistics(statistics=step, scalars=scalars, pages=pages))
        answer = rule.answer(state, step, step.ids).tobytes()
        seen.append((shown, scalars, answer, state.scored, state.raw_sum, state.raw_square_sum))
    for ids in (None, rng.integers(0, N, 1000)):
        seen += [read(state, ids).tobytes() for read in (rule.weights, rule.scores, rule.above_floor)]
    return state, log, seen


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_torch_and_numpy_give_the_same_bits(name: str, settings: SettingValues) -> None:
    rule = build(name, settings)
    state, log, seen = run(rule)
    with torch_alone():
        other, _, seen_by_torch = run(rule)
        replayed = rule.replay(rule.init(N, device=torch.device("cpu")), log)
    assert seen_by_torch == seen
    for column, values in state.columns.items():
        assert other.columns[column].equal(values)
        assert replayed.columns[column].equal(values)


def test_tables_on_the_cpu_are_seen_by_numpy_without_a_copy() -> None:
    column = torch.zeros(3)
    view = arrays.table(column)
    view[1] = 7.0
    assert column.tolist() == [0.0, 7.0, 0.0]
    with torch_alone():
        assert arrays.table(column) is column


@pytest.mark.parametrize("bad", [-1, N, -(1 << 63), 1 << 62])
@pytest.mark.parametrize("context", [torch_alone, pytest.MonkeyPatch.context])
@pytest.mark.parametrize("name", ["ema_sign", "uniform"])
def test_an_id_that_is_not_there_is_never_looked_up(name: str, bad: int, context: Callable[[], Any]) -> None:
    """On a GPU it would end the process's work there; in numpy -1 is the last example."""
    rule = build(name, {})
    state, ids = rule.init(N, device=torch.device("cpu")), np.array([3, bad])
    step = Statistics(ids=ids, contributions=np.ones(2, np.float32))
    with context():
        for call in (
            lambda: rule.update(state, step),
            lambda: rule.weights(state, ids),
            lambda: rule.scores(state, ids),
            lambda: rule.above_floor(state, ids),
        ):
            with pytest.raises(IndexError, match=r"ids must be in \[0, 66036\)"):
                call()
    assert (rule.weights(state, None) == 1.0).all()
