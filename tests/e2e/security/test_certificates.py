"""Certificates are replaced under a running server and running clients; half-written ones do no harm."""

import asyncio
import shutil
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from time import monotonic, time

import pytest

from equipoise import PolicyAdmin, PolicyClient, Security, Source, Timeout, aio
from equipoise.errors import AccessDeniedError, UnavailableError
from tests.e2e.security.authority import Authority, Files
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve

EXPIRY = "equipoise_server_certificate_expiry_timestamp_seconds"


def shown_certificate(server: ServerProcess, authority: Authority) -> str:
    """Name in the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=str(authority.file))
    context.set_alpn_protocols(["h2"])
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host) as tls:
        certificate = tls.getpeercert()
    assert certificate is not None
    return str(certificate["subject"][0][0][1])  # type: ignore[index]


def expiry(server: ServerProcess) -> float:
    """When the server says that its certificate ends."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as page:
        (line,) = (line for line in page.read().decode().splitlines() if line.startswith(EXPIRY))
    return float(line.split()[1])


def put(files: Files, *, over: Files) -> None:
    """Replaces files as careful programs do, each at once."""
    for source, target in ((files.certificate, over.certificate), (files.key, over.key)):
        fresh = target.with_suffix(".new")
        shutil.copy(source, fresh)
        fresh.replace(target)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def live(authority: Authority) -> Files:
    """The files that the server reads."""
    return authority.issue("first")


@pytest.fixture(scope="module")
def server(live: Files, authority: Authority) -> Iterator[ServerProcess]:
    with serve(tls_certificate=live.certificate, tls_key=live.key) as process:
        yield process


def test_a_new_certificate_is_shown_without_restart_and_a_broken_one_is_not(
    server: ServerProcess, live: Files, authority: Authority
) -> None:
    security = Security(root_certificates=authority.file)
    with PolicyClient(server.address, policy="p", num_examples=3, security=security, timeout=PATIENT) as client:
        assert client.step([0], contributions=[1.0]).source is Source.SERVED
        assert shown_certificate(server, authority) == "first"
        put(authority.issue("second", ends=timedelta(days=10)), over=live)
        assert shown_certificate(server, authority) == "second"
        assert expiry(server) == pytest.approx(time() + 10 * 86400, abs=600)

        shutil.copy(authority.issue("third").certificate, live.certificate)  # not the key's
        assert shown_certificate(server, authority) == "second"
        live.key.write_text("half a k")
        assert shown_certificate(server, authority) == "second"
        assert "the certificates cannot be used; those known before still hold" in server.log
        put(authority.issue("fourth"), over=live)
        assert shown_certificate(server, authority) == "fourth"

        assert client.step([0], contributions=[1.0]).source is Source.SERVED  # the open connection went on
        assert client.stats.reconnects == 0


def test_a_client_that_trusts_another_authority_or_expects_another_host_gets_no_connection(
    server: ServerProcess, live: Files, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "stranger")
    for security in (Security(root_certificates=other.file), Security(tls=True), Security()):
        with PolicyAdmin(server.address, timeout=10, security=security) as admin, pytest.raises(UnavailableError):
            admin.server_info()
    trusting = Security(root_certificates=authority.file)
    with PolicyAdmin(server.address, timeout=10, security=trusting) as admin:
        admin.server_info()
    put(authority.issue("wrong-host", host="elsewhere.example"), over=live)
    with PolicyAdmin(server.address, timeout=10, security=trusting) as admin, pytest.raises(UnavailableError):
        admin.server_info()


def test_clients_of_both_kinds_show_the_certificate_that_is_there_when_they_reconnect(authority: Authority) -> None:
    live, mine = authority.issue("server"), authority.issue("mine")
    flags = {"tls_certificate": live.certificate, "tls_key": live.key, "tls_client_ca": authority.file}
    security = Security(root_certificates=authority.file, client_certificate=mine.certificate, client_key=mine.key)

    async def reconnect(server: ServerProcess) -> None:
        async with aio.PolicyClient(server.address, policy="p", security=security, timeout=PATIENT) as client:
            await client.step([0], contributions=[1.0])
            put(authority.issue("expired", ends=timedelta(hours=-1)), over=mine)
            await asyncio.to_thread(server.restart)
            # An expired certificate opens nothing; the one that takes its place does.
            assert (await client.step([0], contributions=[1.0])).source is not Source.SERVED
            put(authority.issue("renewed"), over=mine)
            end = monotonic() + 180
            while (await client.step([0], contributions=[1.0])).source is not Source.SERVED:
                assert monotonic() < end

    with serve(**flags) as server:
        timeout = Timeout(wait=180)
        with PolicyClient(server.address, policy="p", num_examples=3, security=security, when_lost="wait",
                          timeout=timeout) as client:  # fmt: skip
            client.step([0], contributions=[1.0])
            asyncio.run(reconnect(server))
            assert client.step([0], contributions=[1.0]).source is Source.SERVED


def test_admins_of_both_kinds_show_the_certificate_that_is_there_now(authority: Authority) -> None:
    live, mine = authority.issue("server"), authority.issue("mine")
    security = Security(root_certificates=authority.file, client_certificate=mine.certificate, client_key=mine.key)

    async def ask(server: ServerProcess, admin: PolicyAdmin) -> None:
        async with aio.PolicyAdmin(server.address, security=security) as other:
            admin.server_info()
            await other.server_info()
            put(authority.issue("expired", ends=timedelta(hours=-1)), over=mine)
            with pytest.raises(UnavailableError):
                admin.server_info()
            with pytest.raises(UnavailableError):
                await other.server_info()
            put(authority.issue("renewed"), over=mine)
            admin.server_info()
            await other.server_info()

    flags = {"tls_certificate": live.certificate, "tls_key": live.key, "tls_client_ca": authority.file}
    with serve(**flags) as server, PolicyAdmin(server.address, security=security) as admin:
        asyncio.run(ask(server, admin))


def test_a_certificate_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    client = PolicyClient("localhost:1", policy="p", security=Security(root_certificates=tmp_path / "absent.pem"))
    with client, pytest.raises(AccessDeniedError, match=r"root_certificates: .*absent\.pem: No such file"):
        client.step([0], contributions=[1.0])


@pytest.mark.slow
def test_a_server_without_usable_certificates_does_not_start(authority: Authority, tmp_path: Path) -> None:
    files, other = authority.issue("one"), authority.issue("other")
    with (
        pytest.raises(UnavailableError, match=r"tls_certificate, tls_key or tls_client_ca: .*KEY_VALUES_MISMATCH"),
        serve(tls_certificate=files.certificate, tls_key=other.key),
    ):
        pass
