"""What all tests share."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests import servers

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")  # others use the machine, too


@pytest.fixture(scope="session", autouse=True)
def forks() -> Iterator[None]:
    """The process that servers are forked from ends behind them."""
    yield
    servers.close()
