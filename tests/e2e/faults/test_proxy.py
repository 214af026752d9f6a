"""The proxy does what it says: else the faults would not be those that the tests speak of."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from tests.e2e.faults.proxy import At, FaultProxy, Way, until


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(4096):
            self.request.sendall(data)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Resets are what the tests are about."""


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    with Server(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with FaultProxy(("127.0.0.1", server.server_address[1])) as before:
            yield before
        server.shutdown()


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as connected:
        yield connected


def is_silent(client: socket.socket) -> bool:
    client.settimeout(0.1)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(60)
    return False


def test_it_passes_everything_on(proxy: FaultProxy, client: socket.socket) -> None:
    client.sendall(b"x" * 100_000)
    got = b""
    while len(got) < 100_000:
        got += client.recv(100_000)
    assert proxy.passed == {Way.UP: 100_000, Way.DOWN: 100_000}


@pytest.mark.parametrize("way", list(Way))
def test_what_is_held_is_taken_and_comes_later(proxy: FaultProxy, client: socket.socket, way: Way) -> None:
    proxy.hold(way)
    client.sendall(b"hello")
    until(lambda: proxy.taken[way] == 5)
    assert is_silent(client)
    assert proxy.passed[way] == 0
    proxy.release()
    assert client.recv(10) == b"hello"


def test_reset(proxy: FaultProxy, client: socket.socket) -> None:
    client.sendall(b"hello")
    assert client.recv(10) == b"hello"
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(10)
    assert proxy.connections == 0


def test_refuse_and_accept(proxy: FaultProxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port))
    proxy.accept()
    socket.create_connection(("127.0.0.1", proxy.port)).close()


def test_a_cut_comes_right_behind_its_byte(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.cut_after(7, Way.DOWN)
    client.sendall(b"hello")
    assert client.recv(10) == b"hello"
    client.sendall(b"hello")
    with pytest.raises(ConnectionResetError):  # a reset may overtake the last bytes
        [client.recv(1) for _ in range(3)]
    assert proxy.passed[Way.DOWN] == 5


def test_a_trap_holds_the_request_before_the_server_has_it(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.trap(b"secret", At.REQUEST) as trap:
        client.sendall(b"harmless")
        assert client.recv(10) == b"harmless"
        client.sendall(b"..sec")
        assert client.recv(10) == b"..sec"
        client.sendall(b"ret..")
        assert trap.caught.wait(60)
        assert is_silent(client)
        assert proxy.passed[Way.UP] == 13
    assert client.recv(10) == b"ret.."


def test_a_trap_holds_the_reply_and_may_drop_it(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.trap(b"secret", At.REPLY) as trap:
        client.sendall(b"secret")
        assert trap.caught.wait(60)
        assert (proxy.passed[Way.UP], proxy.passed[Way.DOWN]) == (6, 0)
        proxy.free(trap, drop=True)
        with pytest.raises(ConnectionResetError):
            client.recv(10)


def test_delay_and_bandwidth(proxy: FaultProxy, client: socket.socket) -> None:
    proxy.delay_s = 0.05
    proxy.bytes_per_s = 1000.0
    started = monotonic()
    client.sendall(b"x" * 50)
    assert len(client.recv(100)) == 50
    assert monotonic() - started >= 2 * (0.05 + 0.05)


def test_delay_is_no_bandwidth(proxy: FaultProxy, client: socket.socket) -> None:
    """What is on its way does not keep others from setting out: one piece after another would take twenty seconds."""
    proxy.delay_s = 0.5
    sending = threading.Thread(target=client.sendall, args=(b"x" * (40 << 16),))
    started = monotonic()
    sending.start()
    got = 0
    while got < 40 << 16:
        got += len(client.recv(1 << 20))
    sending.join()
    assert 1.0 <= monotonic() - started < 18.0
