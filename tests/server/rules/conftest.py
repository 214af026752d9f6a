from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from equipoise_server.rules import Rule, Statistics, TableState, build, names

MakeStep: TypeAlias = Callable[..., Statistics]

ONLINE = [name for name in names() if name not in ("learnability", "trajectory")]
"""The rules whose steps may have any rows with any numbers; `learnability` and `trajectory` have tests of their own."""


def told(rule: Rule, ids: NDArray[np.int64] | None, values: NDArray[np.float32]) -> Statistics:
    """A step whose signal is `values` [B], whichever statistics the rule reads."""
    zeros = np.zeros_like(values)
    given = {name: zeros if name == "reference_losses" else values for name in rule.signals}
    return Statistics(ids=ids, **given)


@pytest.fixture(params=ONLINE)
def rule(request: pytest.FixtureRequest) -> Rule:
    """Every online rule in turn, with its defaults."""
    return build(request.param, {})


@pytest.fixture(params=[name for name in ONLINE if "raw" in build(name, {}).columns])
def table_rule(request: pytest.FixtureRequest) -> Rule:
    """Every online rule that keeps a raw weight per example in turn, with its defaults."""
    return build(request.param, {})


@pytest.fixture(params=[name for name in ONLINE if "rms_decay" in build(name, {}).settings])
def scaling_rule(request: pytest.FixtureRequest) -> Rule:
    """Every rule that divides its signal by a running RMS in turn, with its defaults."""
    return build(request.param, {})


@pytest.fixture
def start() -> Callable[[Rule, int], TableState]:
    return lambda rule, num_examples: rule.init(num_examples, device=torch.device("cpu"))


@pytest.fixture
def make_step() -> MakeStep:
    """A step of distinct random ids whose signal leans on the id: some examples are good, some bad."""

    def step(
        rule: Rule, rng: np.random.Generator, num_examples: int, rows: int | None, scale: float = 1.0
    ) -> Statistics:
        ids = None if rows is None else rng.choice(num_examples, rows, replace=False).astype(np.int64)
        lean = np.sin(np.arange(num_examples) if ids is None else ids)
        return told(rule, ids, (scale * (lean + rng.normal(size=len(lean)))).astype(np.float32))

    return step


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
