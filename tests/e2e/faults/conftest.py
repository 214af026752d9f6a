"""Processes under faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.e2e.faults.house import House
from tests.e2e.faults.zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Zygote:
    return servers.zygote()


@pytest.fixture
def house(tmp_path: Path, zygote: Zygote) -> Iterator[House]:
    built = House(tmp_path, zygote)
    yield built
    built.close()
