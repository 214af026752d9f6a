from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import pytest
import torch

from equipoise_server.rules import Rule, Statistics, TableState, build, names

MakeStep: TypeAlias = Callable[..., Statistics]


@pytest.fixture(params=names())
def rule(request: pytest.FixtureRequest) -> Rule:
    """Every rule in turn, with its defaults."""
    return build(request.param, {})


@pytest.fixture
def start() -> Callable[[Rule, int], TableState]:
    return lambda rule, num_examples: rule.init(num_examples, device=torch.device("cpu"))


@pytest.fixture
def make_step() -> MakeStep:
    """A step of distinct random ids whose contributions lean on the id: some examples are good, some bad."""

    def step(rng: np.random.Generator, num_examples: int, rows: int | None, scale: float = 1.0) -> Statistics:
        ids = None if rows is None else rng.choice(num_examples, rows, replace=False).astype(np.int64)
        lean = np.sin(np.arange(num_examples) if ids is None else ids)
        contributions = (scale * (lean + rng.normal(size=len(lean)))).astype(np.float32)
        return Statistics(ids=ids, contributions=contributions)

    return step


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
