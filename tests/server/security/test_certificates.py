"""Certificates of a server that listens at several ports."""

import os
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from equipoise_server.security import CertificateFiles, Certificates
from tests.e2e.security.authority import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def certificates(authority: Authority) -> Certificates:
    files = authority.issue("live", host="localhost")
    return Certificates(CertificateFiles(certificate=files.certificate, key=files.key))


@pytest.fixture
def ports(certificates: Certificates) -> Iterator[list[int]]:
    server = grpc.server(ThreadPoolExecutor(1))
    found = [server.add_secure_port("127.0.0.1:0", certificates.credentials()) for _ in range(2)]
    server.start()
    yield found
    server.stop(None).wait()


def shown(port: int, authority: Authority) -> int:
    """Serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=str(authority.file))
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", port), timeout=60)
    with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
        certificate = tls.getpeercert()
    assert certificate is not None
    return int(str(certificate["serialNumber"]), 16)


def renew(authority: Authority, folder: Path) -> None:
    """At a later time than before also by the clock of files, which stands still for some milliseconds."""
    later = (folder / "live.key").stat().st_mtime_ns + 1_000_000_000
    files = authority.issue("live")
    for path in (files.certificate, files.key):
        os.utime(path, ns=(later, later))


def test_each_port_shows_the_certificate_of_now(
    certificates: Certificates, ports: list[int], authority: Authority, tmp_path: Path
) -> None:
    seen = []
    for renewals in range(3):
        both = {shown(port, authority) for port in (*ports, *ports)}
        assert len(both) == 1
        seen.append(both.pop())
        assert certificates.reloads.ok == renewals
        renew(authority, tmp_path)
    assert len(set(seen)) == 3


def test_no_port_takes_files_that_cannot_be_used(
    certificates: Certificates, ports: list[int], authority: Authority, tmp_path: Path
) -> None:
    before = {shown(port, authority) for port in ports}
    (tmp_path / "live.key").write_text("half a k")
    assert {shown(port, authority) for port in (*ports, *ports)} == before
    assert (certificates.reloads.ok, certificates.reloads.failed) == (0, 1)
    renew(authority, tmp_path)
    after = {shown(port, authority) for port in ports}
    assert len(after) == 1
    assert after != before
