"""What tests of the TypeScript client share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.e2e.faults.house import House
from tests.e2e.faults.zygote import ForkedServer, Zygote
from tests.servers import ServerProcess, serve
from tests.typescript.node import MissingError, build


@pytest.fixture(scope="session", autouse=True)
def client() -> None:
    """The built client; tests say that they did not run where it cannot be built."""
    try:
        build()
    except MissingError as error:
        pytest.skip(f"the TypeScript client was not tested: {error}")


@pytest.fixture(scope="session")
def server(client: None) -> Iterator[ServerProcess]:
    with serve() as process:
        yield process


@pytest.fixture(scope="session")
def zygote(client: None) -> Zygote:
    return servers.zygote()


@pytest.fixture
def forked(zygote: Zygote, tmp_path: Path) -> Iterator[ForkedServer]:
    """A server with a Redis of its own, quickly started again."""
    server = ForkedServer(zygote, tmp_path / "server")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def house(zygote: Zygote, tmp_path: Path) -> Iterator[House]:
    built = House(tmp_path, zygote)
    yield built
    built.close()
