"""The orderly end of a server, and what keeps two from standing in each other's way."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from equipoise import PolicyClient
from equipoise.errors import UnavailableError
from equipoise_server.store import EmbeddedRedis
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve, zygote


def test_sigterm_under_load_loses_nothing_and_no_step_fails() -> None:
    with serve() as server:
        restarted, halfway = threading.Event(), threading.Event()
        failures: list[BaseException] = []
        made = 0

        def train() -> None:
            nonlocal made
            random = np.random.default_rng(0)
            try:
                with PolicyClient(server.address, policy="p", num_examples=1000, when_lost="wait") as client:
                    rest = 100
                    while rest:
                        ids = random.integers(0, 1000, 32)
                        client.step(ids, contributions=random.standard_normal(32))
                        made += 1
                        rest -= restarted.is_set()
                        if made == 100:
                            halfway.set()
                    assert client.flush(durable=True)
            except BaseException as error:
                failures.append(error)
            finally:
                halfway.set()

        training = threading.Thread(target=train)
        training.start()
        assert halfway.wait(60)
        assert server.stop() == 0
        server.start()
        restarted.set()
        training.join(120)
        assert failures == []
        with PolicyClient(server.address, policy="p", timeout=PATIENT) as client:
            status = client.status()
        assert (status.version, status.durable_version, status.epoch) == (made, made, 2)


def test_a_read_finds_a_server_that_is_back_while_the_channel_still_waits_to_connect() -> None:
    with serve() as server, PolicyClient(server.address, policy="p", num_examples=4, when_lost="wait") as client:
        client.step([0], contributions=[1.0])
        server.kill()
        with pytest.raises(UnavailableError, match="refused"):
            client.read_weights()  # from here on the channel waits longer and longer between its attempts
        for _ in range(3):
            server.start()
            assert client.read_weights().shape == (4,)
            server.kill()


def test_an_idle_server_stops_at_once() -> None:
    with serve() as server:
        assert server.stop() == 0
        assert '"event": "stopped"' in server.log


def test_a_port_is_not_shared(server: ServerProcess, tmp_path: Path) -> None:
    second = ServerProcess(zygote(), tmp_path, listen=server.address)
    with pytest.raises(UnavailableError, match=f"listen: '{server.address}' cannot be bound"):
        second.start()


def test_a_data_directory_is_not_shared(server: ServerProcess, tmp_path: Path) -> None:
    second = ServerProcess(zygote(), tmp_path, data_dir=server.data_dir)
    with pytest.raises(UnavailableError, match="in use by another server"):
        second.start()


async def test_with_redis_by_url_another_server_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path / "redis")
    await redis.start()
    try:
        weights = await asyncio.to_thread(two_servers_one_after_the_other, redis.url)
    finally:
        await redis.stop()
    np.testing.assert_array_equal(*weights)


def two_servers_one_after_the_other(url: str) -> list[NDArray[np.float32]]:
    """The policy as the first server left it, and as the second, with a data directory of its own, has it."""
    seen = []
    for contributions in ([1.0, -1.0, 0.5], None):
        with (
            serve(redis_url=url) as server,
            PolicyClient(server.address, policy="p", num_examples=3, timeout=PATIENT) as client,
        ):
            if contributions:
                client.step([0, 1, 2], contributions=contributions)
            seen.append(client.read_weights())
            assert client.status().version == 1
    return seen
