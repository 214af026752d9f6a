"""Rule `learnability` through a server: outcomes, draws, what can be read, and deaths on the way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise import PolicyClient
from equipoise.errors import StepRefusedError
from equipoise_server.rules import Rule, TableState, aggregate, build
from tests.servers import ServerProcess, serve

N, ROWS = 300, 40
SETTINGS = {"decay": 0.7, "exploration": 0.2}


def steps(count: int) -> Iterator[dict[str, Any]]:
    """Rows repeat ids, and some are not scored; prompts of higher ids are easier."""
    random = np.random.default_rng(4)
    for _ in range(count):
        ids = random.integers(0, N, ROWS)
        attempts = random.integers(1, 9, ROWS)
        scored = random.random(ROWS) < 0.9
        successes = random.binomial(attempts, ids / N)
        yield {"ids": ids, "successes": successes, "attempts": np.where(scored, attempts, 0), "scored": scored}


def client_of(server: ServerProcess, name: str) -> PolicyClient:
    return PolicyClient(
        server.address, policy=name, num_examples=N, rule="learnability", settings=SETTINGS, when_lost="wait"
    )


def own(count: int) -> tuple[Rule, TableState]:
    rule = build("learnability", SETTINGS)
    state = rule.init(N, device=torch.device("cpu"))
    for step in steps(count):
        state = rule.update(state, aggregate(**step))
    return rule, state


def test_what_is_served_is_the_rule_s_own(server: ServerProcess) -> None:
    with client_of(server, "learnability") as client:
        served = [client.step(**step) for step in steps(30)][-1]
        tables = client.read_weights("weight"), client.read_weights("score")
        status = client.status()
        drawn = client.sample_examples(100_000, seed=1)
        batch = client.sample_examples(N // 2, with_replacement=False, seed=2)
    rule, state = own(30)
    last = list(steps(30))[-1]["ids"]
    np.testing.assert_array_equal(served.weights, rule.weights(state, last))
    np.testing.assert_array_equal(tables, [rule.weights(state, None), rule.scores(state, None)])
    assert (status.version, status.scored_examples) == (30, state.scored)
    assert status.effective_examples == rule.effective_examples(state)
    np.testing.assert_allclose(np.bincount(drawn.astype(int), minlength=N) * N / 1e5, tables[0], atol=0.3)
    assert len(set(batch.tolist())) == N // 2


def test_it_comes_back_from_the_log_to_the_last_bit() -> None:
    told = list(steps(60))
    with serve() as server, client_of(server, "killed") as client:
        for step in told[:35]:
            client.step(**step)
        assert client.flush(durable=True)
        server.kill()
        server.start()
        for step in told[35:]:
            client.step(**step)
        tables = client.read_weights("weight"), client.read_weights("score")
    rule, state = own(60)
    np.testing.assert_array_equal(tables, [rule.weights(state, None), rule.scores(state, None)])


def test_a_fork_and_an_import_go_on_alike(server: ServerProcess, tmp_path: Path) -> None:
    last = {"ids": [1, 2], "successes": [1, 0], "attempts": [8, 8], "weights_for": np.arange(N)}
    with client_of(server, "forked") as client:
        for step in steps(20):
            client.step(**step)
        client.admin.fork("forked", "fork")
        client.admin.export_policy("forked", tmp_path / "forked.npz")
        client.admin.import_policy(tmp_path / "forked.npz", "imported")
        weights = client.step(**last).weights
    for name in ("fork", "imported"):
        with client_of(server, name) as copy:
            np.testing.assert_array_equal(copy.step(**last).weights, weights)


def test_what_the_rule_cannot_use_is_refused(server: ServerProcess) -> None:
    with client_of(server, "refuses") as client:
        with pytest.raises(StepRefusedError, match="successes is absent: rule learnability"):
            client.step([1], losses=[1.0])
        assert client.step([1], successes=[1], attempts=[2]).version == 2
    with (
        PolicyClient(server.address, policy="other-rule", num_examples=N, rule="ema_sign", when_lost="wait") as other,
        pytest.raises(StepRefusedError, match="successes: rule ema_sign does not use them"),
    ):
        other.step([1], contributions=[1.0], successes=[1], attempts=[2])
