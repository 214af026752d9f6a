"""The server's certificate, its key, and the authority of clients' certificates, read again when the files change."""

import math
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from equipoise_server.security.expiry import expires
from equipoise_server.security.files import Reloads, stamp

log = structlog.get_logger("equipoise.tls")


class CertificateError(ValueError):
    """Certificate files that cannot be used; the message names the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFiles:
    """Where the certificates are, in PEM.

    Attributes:
        certificate: the server's, followed by those that lead to its authority.
        key: the private key to it.
        client_ca: authorities of which every client needs a certificate; None: clients need none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Content:
    """What the files hold, in PEM."""

    key: bytes
    chain: bytes
    authorities: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """For one handshake of one port: gRPC takes what is in it away."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.authorities)


class Certificates:
    """The certificates for new connections; open connections keep theirs.

    gRPC asks at each handshake, in threads of its own; a look at the files' times is all that costs.

    Attributes:
        expires: when the certificate in use ends, seconds since the epoch.
        reloads: of the files.
    """

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self.expires = math.inf
        self.reloads = Reloads()
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._content = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials of one port, which follow the files: another port needs others."""
        shown = self._content

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            with self._lock:
                self._refresh()
                if shown is self._content:
                    return None
                shown = self._content
                return shown.configuration()

        mutual = self._files.client_ca is not None
        # Their types do not know that None keeps what there is.
        return grpc.dynamic_ssl_server_credentials(shown.configuration(), changed, mutual)  # type: ignore[arg-type]

    def _refresh(self) -> None:
        """Reads the files if they have changed; if the new ones cannot be used, the old ones stay."""
        now = self._look()
        if now == self._stamp:
            return
        self._stamp = now
        try:
            self._content = self._read()
        except CertificateError as error:
            self.reloads.failed += 1
            log.error("the certificates cannot be used; those known before still hold", error=str(error))
        else:
            self.reloads.ok += 1
            log.info("certificates loaded", certificate=str(self._files.certificate))

    def _look(self) -> object:
        return stamp([self._files.certificate, self._files.key, self._files.client_ca])

    def _read(self) -> _Content:
        files = self._files
        key, chain = _bytes(files.key), _bytes(files.certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(files.certificate, files.key, password=_no_password)
        except (ssl.SSLError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise CertificateError(
                f"{files.certificate} and {files.key}: no certificate and its key: {reason}"
            ) from error
        try:
            self.expires = expires(chain.decode("ascii", "replace"))
        except ValueError as error:
            raise CertificateError(f"{files.certificate}: {error}") from error
        if files.client_ca is None:
            return _Content(key, chain, None)
        authorities = _bytes(files.client_ca)
        try:
            context.load_verify_locations(cadata=authorities.decode("ascii", "replace"))
        except ssl.SSLError as error:
            raise CertificateError(f"{files.client_ca}: no certificates of authorities: {error.reason}") from error
        return _Content(key, chain, authorities)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}") from error


def _no_password() -> str:
    raise CertificateError("the key is encrypted; the server has nobody to ask for its password")
