"""A message that never arrives: the caller learns it, and the steps behind it go on."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise import Backoff, PolicyClient
from equipoise.errors import InvalidRequestError
from tests.debian import program
from tests.e2e.faults.proxy import until
from tests.e2e.faults.redis_server import free_port
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve

PROMPT = Backoff(first=0.01, longest=0.05)
LARGE = np.arange(100_000)
"""1.2 MB of ids and contributions."""

NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; grpc_read_timeout 1h; grpc_send_timeout 1h;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  server {{ listen 127.0.0.1:{port} http2; location / {{ grpc_pass grpc://{address}; }} }}
}}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve(max_message_bytes=1 << 20) as process:
        yield process


@pytest.fixture
def behind_nginx(tmp_path: Path) -> Iterator[str]:
    """The address of an nginx, as Debian brings it, before a server of its own."""
    nginx = program("nginx", package="nginx", what="what a client does behind one")
    port = free_port()
    with serve() as server:
        (tmp_path / "nginx.conf").write_text(NGINX.format(folder=tmp_path, port=port, address=server.address))
        command = [nginx.path, "-p", tmp_path, "-c", "nginx.conf", "-e", tmp_path / "error.log"]
        process = subprocess.Popen(command, env=nginx.full_environment)
        try:
            until(lambda: listens(port), what="nginx listens")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def listens(port: int) -> bool:
    with socket.socket() as bare:
        return bare.connect_ex(("127.0.0.1", port)) == 0


def large_step(client: PolicyClient, **more: Any) -> None:
    client.step(LARGE, contributions=np.ones(len(LARGE)), **more)


def told(client: PolicyClient) -> str:
    """What the client says of a step that nobody waits for, as soon as it does."""
    found: list[str] = []

    def refused() -> bool:
        try:
            client.flush(0.1)
        except InvalidRequestError as error:
            found.append(str(error))
        return bool(found)

    until(refused, what="the caller is told")
    return found[0]


def assert_goes_on(client: PolicyClient, *, version: int) -> None:
    assert client.flush(30)  # until then a stream may still be on its way, and a step be answered without one
    assert client.step([1], contributions=[1.0]).version == version
    assert client.flush(30, durable=True)
    assert client.status().version == version
    assert client.stats.lost == client.stats.dropped == 0


@pytest.mark.parametrize("when_lost", ["continue", "wait"])
def test_what_the_server_does_not_take_is_refused_and_named(server: ServerProcess, when_lost: Any) -> None:
    policy = f"p-{when_lost}"
    with PolicyClient(
        server.address, policy=policy, num_examples=len(LARGE), when_lost=when_lost, backoff=PROMPT, timeout=PATIENT
    ) as client:
        client.submit([0], contributions=[1.0])
        client.submit(LARGE, contributions=np.ones(len(LARGE)))  # before the limit is known
        client.submit([2], contributions=[1.0])

        assert "1048576 bytes (max_message_bytes of the server)" in told(client)
        with pytest.raises(InvalidRequestError, match="max_message_bytes of the server"):
            large_step(client)
        assert_goes_on(client, version=3)
        assert client.stats.reconnects == 0


@pytest.mark.parametrize("when_lost", ["continue", "wait"])
def test_what_a_proxy_does_not_take_is_refused_after_some_tries(behind_nginx: str, when_lost: Any) -> None:
    with PolicyClient(
        behind_nginx, policy="p", num_examples=len(LARGE), when_lost=when_lost, backoff=PROMPT, timeout=PATIENT
    ) as client:
        client.step([0], contributions=[1.0])
        client.submit(LARGE, contributions=np.ones(len(LARGE)))
        for number in range(10):
            client.submit([number], contributions=[1.0])

        assert "a proxy's limit" in told(client)
        assert_goes_on(client, version=12)
        assert client.stats.reconnects <= 6
