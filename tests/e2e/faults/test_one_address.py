"""Two servers that advertise the same address on one Redis: both say so, and nobody runs in circles."""

from collections.abc import Iterator
from time import monotonic

import pytest

from equipoise import PolicyClient, Source
from equipoise.admin import PolicyAdmin
from tests.e2e.faults.gauges import gauges, refusals
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import FaultProxy, until
from tests.e2e.faults.zygote import ForkedServer

WITHIN_S = 60.0
WARNING = "another server advertises the same address"


@pytest.fixture
def shared() -> Iterator[FaultProxy]:
    """What both servers say they are reached at."""
    with FaultProxy(("127.0.0.1", 1)) as proxy:
        yield proxy


def leads_to(proxy: FaultProxy, server: ForkedServer) -> None:
    proxy.target = ("127.0.0.1", int(server.address.rpartition(":")[2]))


def is_told(server: ForkedServer) -> bool:
    return gauges(server)["address_shared"] == 1


def test_both_say_so_once_and_until_it_is_over(house: House, shared: FaultProxy) -> None:
    first, _ = house.serve(advertise=shared.address)
    second, _ = house.serve(advertise=shared.address)
    until(lambda: is_told(first) and is_told(second), within_s=WITHIN_S, what="both know of each other")
    assert not is_told(house.server)
    second.kill()
    until(lambda: not is_told(first), within_s=WITHIN_S, what="it is over")
    for server in (first, second):
        assert server.log.count(WARNING) == 1
        assert shared.address in server.log
    assert WARNING not in house.server.log


def test_a_server_that_was_killed_and_is_back_is_no_other(house: House) -> None:
    with PolicyClient(house.server.address, policy="p", num_examples=4, when_lost="wait") as client:
        client.step([0, 1], contributions=[1.0, -1.0])
        for _ in range(3):
            house.server.kill()
            house.server.start()
            client.step([0, 1], contributions=[1.0, -1.0])
    assert WARNING not in house.server.log


def test_neither_takes_policies_from_the_other_and_the_trainer_that_is_sent_back_does_not_loop(
    house: House, shared: FaultProxy
) -> None:
    """The address leads to the server that is not the owner: as one that is not reached, and no worse."""
    owner, _ = house.serve(advertise=shared.address)
    asked, _ = house.serve(advertise=shared.address)
    leads_to(shared, asked)
    until(lambda: is_told(owner) and is_told(asked), within_s=WITHIN_S, what="both know of each other")
    with PolicyClient(owner.address, policy="p", num_examples=4, when_lost="wait") as client:
        epoch = client.step([0, 1], contributions=[1.0, -1.0]).epoch
        with PolicyClient(asked.address, policy="p", num_examples=4, trainer_id="sent") as sent:
            began = monotonic()
            assert sent.step([0, 1], contributions=[1.0, -1.0]).source is Source.UNIFORM
            until(lambda: refused(asked) >= 6, within_s=WITHIN_S, what="it has asked again and again")
            pause_s = (monotonic() - began) / refused(asked)
            assert client.step([0, 1], contributions=[1.0, -1.0]).epoch == epoch, "nobody took it"
            owner.terminate()
            until(
                lambda: sent.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED,
                within_s=WITHIN_S,
                what="the policy is where it is asked for",
            )
        assert pause_s > 0.01, "it waits between two attempts"


def test_a_trainer_before_an_address_of_several_servers_finds_the_owner(house: House, shared: FaultProxy) -> None:
    """A load balancer's address that all advertise: each new connection may lead to another server."""
    servers = [house.serve(advertise=shared.address)[0] for _ in range(2)]
    until(lambda: all(map(is_told, servers)), within_s=WITHIN_S, what="both know of each other")
    with PolicyClient(servers[1].address, policy="p", num_examples=4, when_lost="wait") as client:
        epoch = client.step([0, 1], contributions=[1.0, -1.0]).epoch
    leads_to(shared, servers[0])
    with PolicyClient(shared.address, policy="p", num_examples=4) as trainer:
        trainer.submit([0, 1], contributions=[1.0, -1.0])
        until(lambda: refused(servers[0]) >= 2, within_s=WITHIN_S, what="the wrong one was asked")
        leads_to(shared, servers[1])
        until(
            lambda: trainer.step([0, 1], contributions=[1.0, -1.0]).source is Source.SERVED,
            within_s=WITHIN_S,
            what="the owner was found behind the same address",
        )
    with PolicyAdmin(servers[1].address) as admin:
        assert admin.get("p").epoch == epoch, "nobody took it"


def refused(server: ForkedServer) -> int:
    return refusals(server, "NOT_OWNER")
