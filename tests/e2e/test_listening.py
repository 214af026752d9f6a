"""An address without a host is every interface: over IPv4 and IPv6, or over what the machine has."""

import json
import platform
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest

from equipoise import PolicyAdmin, PolicySpec
from tests.e2e.faults.proxy import until
from tests.ports import free_port
from tests.servers import serve

SOCKET_CALL = {"x86_64": 41, "aarch64": 198}

WITHOUT_IPV6 = """
import ctypes, errno, socket, struct, sys

LOAD, JUMP_IF_EQUAL, RETURN, ALLOW = 0x20, 0x15, 0x06, 0x7FFF0000
filter = [
    (LOAD, 0, 0, 0),  # number of the system call
    (JUMP_IF_EQUAL, 0, 3, int(sys.argv[1])),
    (LOAD, 0, 0, 16),  # its first argument
    (JUMP_IF_EQUAL, 0, 1, int(socket.AF_INET6)),
    (RETURN, 0, 0, 0x00050000 | errno.EAFNOSUPPORT),
    (RETURN, 0, 0, ALLOW),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in filter))
class Program(ctypes.Structure):
    _fields_ = [("size", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(len(filter), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "no new privileges"
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, "seccomp"
try:
    socket.socket(socket.AF_INET6)
    raise SystemExit("there is IPv6 still")
except OSError as error:
    assert error.errno == errno.EAFNOSUPPORT
from equipoise.cli import main
sys.exit(main(sys.argv[2:]))
"""
"""A program that runs `equipoise` where the kernel knows no IPv6: a filter refuses such sockets."""


def answers(host: str, port: str) -> bool:
    with PolicyAdmin(f"{host}:{port}") as admin:
        return admin.server_info().device != ""


def ready(host: str, port: str) -> bool:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics") as answer:
        return bool(answer.status == 200)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here: that both are served did not run")
def test_no_host_is_both_families() -> None:
    with serve(listen=":0", metrics_listen=":0", allow_insecure=True) as server:
        port, metrics_port = (address.rpartition(":")[2] for address in (server.address, server.metrics_address))
        for host in ("127.0.0.1", "[::1]"):
            assert answers(host, port)
            assert ready(host, metrics_port)
    # A port that the system has handed out may be another's after a kill.
    with serve(listen=f":{free_port()}", metrics_listen=f":{free_port()}", allow_insecure=True) as server:
        server.restart()  # on the address that it told
        assert answers("127.0.0.1", server.address.rpartition(":")[2])


def test_no_host_is_ipv4_on_a_machine_without_ipv6(tmp_path: Path) -> None:
    if sys.platform != "linux" or platform.machine() not in SOCKET_CALL:
        pytest.skip("the kernel's filter is written for Linux on x86-64 and ARM: no IPv6 did not run")
    flags = ("serve", "--listen", ":0", "--metrics-listen", ":0", "--allow-insecure", "true", "--device", "cpu")
    files = ("--ready-file", str(tmp_path / "ready"), "--data-dir", str(tmp_path / "data"))
    call = str(SOCKET_CALL[platform.machine()])
    process = subprocess.Popen([sys.executable, "-c", WITHOUT_IPV6, call, *flags, *files])
    try:
        until(lambda: (tmp_path / "ready").exists() or process.poll() is not None, what="it serves", within_s=60)
        told = json.loads((tmp_path / "ready").read_text())
        assert told["address"].startswith("0.0.0.0:")
        with PolicyAdmin(f"127.0.0.1:{told['address'].rpartition(':')[2]}") as admin:
            admin.create(PolicySpec(name="p", num_examples=4))
        assert ready("127.0.0.1", told["metrics_address"].rpartition(":")[2])
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_a_name_of_a_host_that_is_no_number_works() -> None:
    with serve(listen="localhost:0") as server, grpc.insecure_channel(server.address) as channel:
        grpc.channel_ready_future(channel).result(60)
