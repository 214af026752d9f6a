"""A server for the tests of each file, which have policies of their own; small models on one thread, of which several would only wait for each other."""

from collections.abc import Iterator

import pytest
import torch

from tests.servers import ServerProcess, serve

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as running:
        yield running
