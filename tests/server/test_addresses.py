"""Addresses: what others are told to reach a server by."""

import socket

import pytest

from equipoise_server.addresses import IN_KUBERNETES, POD_IP, joined, reachable

EVERYWHERE = ("0.0.0.0:7", "[::]:7", ":7")
IN_A_POD = {IN_KUBERNETES: "10.96.0.1"}


@pytest.mark.parametrize("address", ["127.0.0.1:7", "[::1]:7", "server-1.example.org:7"])
def test_an_address_of_one_host_is_what_it_is(address: str) -> None:
    assert reachable(address, {POD_IP: "10.0.0.9"}) == address


@pytest.mark.parametrize("address", EVERYWHERE)
@pytest.mark.parametrize("environment", [{}, {POD_IP: ""}, {POD_IP: "not an address"}])
def test_every_interface_is_this_machine_by_its_name(address: str, environment: dict[str, str]) -> None:
    assert reachable(address, environment) == f"{socket.gethostname()}:7"


@pytest.mark.parametrize("address", EVERYWHERE)
def test_a_pod_is_reached_by_its_address_not_by_its_name(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reachable(address, {POD_IP: "10.0.0.9"}) == "10.0.0.9:7"
    assert reachable(address, {POD_IP: "fd00::9", **IN_A_POD}) == "[fd00::9]:7"
    monkeypatch.setattr(socket, "gethostbyname", {socket.gethostname(): "10.0.0.8"}.__getitem__)
    assert reachable(address, IN_A_POD) == "10.0.0.8:7"


def test_a_name_that_leads_to_this_machine_alone_is_nobodys_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert reachable(":7", IN_A_POD) == f"{socket.gethostname()}:7"

    def unknown(name: str) -> str:
        raise socket.gaierror(name)

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert reachable(":7", IN_A_POD) == f"{socket.gethostname()}:7"


@pytest.mark.parametrize(("host", "address"), [("a", "a:1"), ("10.0.0.1", "10.0.0.1:1"), ("::1", "[::1]:1")])
def test_only_hosts_of_ipv6_stand_in_brackets(host: str, address: str) -> None:
    assert joined(host, 1) == address
