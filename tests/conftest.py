"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests import servers

os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in all processes: several would only wait for each other

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")  # others use the machine, too


@pytest.fixture(scope="session", autouse=True)
def forks() -> Iterator[None]:
    """The process that servers are forked from ends behind them."""
    yield
    servers.close()
