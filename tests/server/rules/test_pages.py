"""Served weights page by page: what exports, forks and samples read while steps go on."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from equipoise_server.rules import PAGE_EXAMPLES, Rule, Statistics, TableState

Start = Callable[[Rule, int], TableState]
MakeStep = Callable[..., Statistics]

N = 2 * PAGE_EXAMPLES + 700


@pytest.mark.parametrize("guard_strength", [0.0, 0.25])
def test_weights_of_a_page_follow_from_its_rows_and_the_sums(
    rule: Rule, guard_strength: float, start: Start, make_step: MakeStep
) -> None:
    rng = np.random.default_rng(70)
    state = start(rule, N)
    for _ in range(3):
        state = rule.update(state, make_step(rule, rng, N, N // 3))
    state.guard_strength = guard_strength
    expected = rule.weights(state, None)
    assert len(np.unique(expected)) > 1 or rule.name in ("uniform", "boltzmann", "loss_linear_upper", "exp3")
    for begin in range(0, N, PAGE_EXAMPLES):
        end = min(begin + PAGE_EXAMPLES, N)
        view = replace(state, columns={name: column[begin:end] for name, column in state.columns.items()})
        assert rule.weights(view, np.arange(end - begin)).tobytes() == expected[begin:end].tobytes()
