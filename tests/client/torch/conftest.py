"""A server for the tests of each file; small models on one thread, of which several would only wait for each other."""

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.servers import ServerProcess, serve

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Accelerate collects garbage for each trainer: not among all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as running:
        yield running
