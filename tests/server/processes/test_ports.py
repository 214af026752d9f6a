"""Ports that several processes share, and nobody else gets."""

import socket

import pytest

from equipoise_server.processes.ports import Port
from equipoise_server.settings import SettingsError
from tests.ports import free_port


def listening(port: int) -> socket.socket:
    """As gRPC does it."""
    made = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        made.setsockopt(socket.SOL_SOCKET, option, 1)
    made.bind(("127.0.0.1", port))
    made.listen()
    return made


def test_several_listen_and_the_one_who_keeps_it_gets_no_connection() -> None:
    port = Port("127.0.0.1:0", setting="listen")
    number = int(port.address.rpartition(":")[2])
    with listening(number), listening(number):
        for _ in range(20):
            socket.create_connection(("127.0.0.1", number), timeout=60).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", number), timeout=60)
    port.close()


def test_it_stays_while_nobody_listens() -> None:
    port = Port(f"127.0.0.1:{free_port()}", setting="listen")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", int(port.address.rpartition(":")[2])))
    port.close()
    again = Port(port.address, setting="listen")
    again.close()


@pytest.mark.parametrize("shares", [False, True])
def test_a_port_where_another_server_is_is_refused(shares: bool) -> None:
    with socket.socket() as other:
        if shares:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SettingsError, match=r"listen: .* cannot be bound"):
            Port(f"127.0.0.1:{other.getsockname()[1]}", setting="listen")


def test_a_port_that_another_parent_keeps_is_refused() -> None:
    port = Port("127.0.0.1:0", setting="listen")
    with pytest.raises(SettingsError, match="is another server there"):
        Port(port.address, setting="listen")
    port.close()


def test_connections_that_a_single_server_has_just_ended_are_in_nobodys_way() -> None:
    """They wait for a minute (TIME_WAIT), and were made without SO_REUSEPORT."""
    with socket.create_server(("127.0.0.1", 0)) as before:
        number = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", number)) as client:
            before.accept()[0].close()  # the server first, as at its stop
            assert client.recv(1) == b""
    port = Port(f"127.0.0.1:{number}", setting="listen")
    with listening(number):
        socket.create_connection(("127.0.0.1", number), timeout=60).close()
    with pytest.raises(SettingsError, match="is another server there"):
        Port(port.address, setting="listen")
    port.close()


def test_an_address_of_a_name_that_this_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` in a container without IPv6; 192.0.2.1 is nobody's (RFC 5737)."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("192.0.2.1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    port = Port("localhost:0", setting="listen")
    with listening(int(port.address.rpartition(":")[2])):
        pass
    port.close()
    del found[1]
    with pytest.raises(SettingsError, match=r"listen: .* cannot be bound"):
        Port("localhost:0", setting="listen")


def test_every_interface() -> None:
    port = Port(":0", setting="listen")
    assert port.address.rpartition(":")[0] in ("[::]", "0.0.0.0")
    with listening(int(port.address.rpartition(":")[2])):
        pass
    port.close()
