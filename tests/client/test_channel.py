"""Channels that are closed while they are used: the caller hears that the client was closed, whenever it happened."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from equipoise import aio, errors
from equipoise.admin import PolicyAdmin
from equipoise.channel import AioChannels, Channels, Server
from equipoise.policies import PolicyStatus
from equipoise.security import Security
from equipoise.v1 import policy_pb2 as pb
from tests.client.test_client import until


@pytest.fixture
def mute() -> Iterator[str]:
    """Address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def server_at(address: str) -> Server:
    return Server.at(address, Security())


async def asked(address: str) -> tuple[aio.PolicyAdmin, asyncio.Task[PolicyStatus]]:
    """A client, and its call that is under way."""
    admin = aio.PolicyAdmin(address, timeout=60)
    asking = asyncio.create_task(admin.get("run-7"))
    async with asyncio.timeout(60):
        while sum(admin._channels._users.values()) != 1:
            await asyncio.sleep(0.001)
    return admin, asking


def test_a_call_that_begins_as_the_channel_closes(mute: str) -> None:
    """Another thread may close the client between the choice of the channel and the call."""
    channels = Channels()

    def ask() -> None:
        with channels.stub(server_at(mute)) as stub:
            channels.close()
            stub.GetPolicy(pb.GetPolicyRequest(policy="run-7"))

    with pytest.raises(errors.ClientClosedError):
        ask()


async def test_a_call_that_begins_as_the_channel_closes_in_asyncio(mute: str) -> None:
    channels = AioChannels()

    async def ask() -> None:
        async with channels.stub(server_at(mute)) as stub:
            await channels.close()
            await stub.GetPolicy(pb.GetPolicyRequest(policy="run-7"))

    with pytest.raises(errors.ClientClosedError):
        await ask()


def test_a_call_under_way(mute: str) -> None:
    admin = PolicyAdmin(mute, timeout=60)
    caught: list[Exception] = []

    def ask() -> None:
        try:
            admin.get("run-7")
        except Exception as error:
            caught.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: sum(admin._channels._users.values()) == 1)
    admin.close()
    asking.join(60)
    assert [type(error) for error in caught] == [errors.ClientClosedError]


async def test_a_call_under_way_in_asyncio(mute: str) -> None:
    admin, asking = await asked(mute)
    await admin.close()
    with pytest.raises(errors.ClientClosedError):
        await asking


async def test_a_task_that_is_cancelled_stays_cancelled(mute: str) -> None:
    admin, asking = await asked(mute)
    asking.cancel()
    await admin.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


def test_no_channel_is_opened_once_closed(mute: str) -> None:
    """Nobody would close it."""
    admin = PolicyAdmin(mute)
    admin.close()
    with pytest.raises(errors.ClientClosedError, match="the client was closed"):
        admin.get("run-7")
    assert not admin._channels._channels


async def test_no_channel_is_opened_once_closed_in_asyncio(mute: str) -> None:
    admin = aio.PolicyAdmin(mute)
    await admin.close()
    with pytest.raises(errors.ClientClosedError, match="the client was closed"):
        await admin.get("run-7")
    assert not admin._channels._channels
