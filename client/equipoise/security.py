"""How a client proves who it is, and makes sure whom it talks to.

Everything may come from the environment, so that a training job needs no change to reach a guarded server.
"""

import ipaddress
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import grpc

from equipoise.errors import AccessDeniedError, InvalidRequestError

VARIABLES = {
    "EQUIPOISE_TLS": "tls",
    "EQUIPOISE_ROOT_CERTIFICATES": "root_certificates",
    "EQUIPOISE_CLIENT_CERTIFICATE": "client_certificate",
    "EQUIPOISE_CLIENT_KEY": "client_key",
    "EQUIPOISE_TOKEN": "token",
    "EQUIPOISE_TOKEN_FILE": "token_file",
}
"""Names in the environment, and the fields of `Security` that they give."""

_FLAGS = {"1": True, "true": True, "0": False, "false": False, "": False}


Stamp: TypeAlias = tuple[tuple[int, int, int] | None, ...]
"""What changes when files do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """The TLS and the token of a client.

    Certificates are read again for each new connection and a token file for each call, so both may be replaced while
    the client runs.

    Example:
        >>> Security(root_certificates="ca.pem", token_file="token")
        Security(tls=True, root_certificates='ca.pem', client_certificate=None, client_key=None, token_file='token')

    Attributes:
        tls: whether to encrypt. A certificate in one of the next three implies it.
        root_certificates: PEM file with the authorities to trust. None: the usual ones, which gRPC brings.
        client_certificate: PEM file with the certificate to show to servers that ask for one.
        client_key: PEM file with the private key of that certificate.
        token: the token to send, printable ASCII. `repr` does not show it.
        token_file: file that holds the token, instead of `token`.
        allow_plaintext_token: whether to send the token without TLS to another machine, where everybody on the way can
            read it.

    Raises:
        InvalidRequestError: fields contradict each other, or the token is no printable ASCII.
    """

    tls: bool = False
    root_certificates: str | Path | None = None
    client_certificate: str | Path | None = None
    client_key: str | Path | None = None
    token: str | None = field(default=None, repr=False)
    token_file: str | Path | None = None
    allow_plaintext_token: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise InvalidRequestError(field="client_certificate", rule="needs client_key, and the other way round")
        if self.token is not None and self.token_file is not None:
            raise InvalidRequestError(field="token", rule="must not be given together with token_file")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise InvalidRequestError(field="token", rule="must be printable ASCII characters")
        if self.root_certificates is not None or self.client_certificate is not None:
            object.__setattr__(self, "tls", True)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Security":
        """Returns what the environment says; None: `os.environ` of now, which other packages put a copy in place of.

        `EQUIPOISE_TLS`, `EQUIPOISE_ROOT_CERTIFICATES`, `EQUIPOISE_CLIENT_CERTIFICATE`, `EQUIPOISE_CLIENT_KEY`,
        `EQUIPOISE_TOKEN` and `EQUIPOISE_TOKEN_FILE` give the fields of these names.

        Raises:
            InvalidRequestError: they contradict each other.
        """
        environment = os.environ if environment is None else environment
        given = {name: environment[variable] for variable, name in VARIABLES.items() if environment.get(variable)}
        flag = given.pop("tls", "").lower()
        if flag not in _FLAGS:
            raise InvalidRequestError(field="EQUIPOISE_TLS", value=flag, rule="must be true or false")
        return cls(tls=_FLAGS[flag], **given)  # type: ignore[arg-type]  # texts all, but for tls

    def check_address(self, address: str) -> None:
        """Raises InvalidRequestError where the token would travel unencrypted to another machine."""
        guarded = self.token is None and self.token_file is None
        if not (guarded or self.tls or self.allow_plaintext_token or _is_loopback(address)):
            raise InvalidRequestError(
                field="token", rule=f"would reach {address} unencrypted; use TLS (root_certificates, or tls=True)"
            )

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Metadata that carries the token, if there is one.

        Raises:
            AccessDeniedError: the token's file cannot be read.
        """
        token = self.token
        if self.token_file is not None:
            token = _read(self.token_file, field="token_file").decode("utf-8", "replace").strip()
            if not (token and token.isascii() and token.isprintable()):
                raise AccessDeniedError(f"token_file: {self.token_file} holds no token")
        return (("authorization", f"Bearer {token}"),) if token else ()

    def stamp(self) -> Stamp:
        """What changes when one of the certificates' files does: inode, time of change in ns and size of each."""
        return tuple(
            _stamp(path) for path in (self.root_certificates, self.client_certificate, self.client_key) if path
        )

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Credentials of a channel; None without TLS.

        Raises:
            AccessDeniedError: a file cannot be read.
        """
        if not self.tls:
            return None
        names = ("root_certificates", "client_key", "client_certificate")
        paths = ((name, getattr(self, name)) for name in names)
        return grpc.ssl_channel_credentials(*(path and _read(path, field=name) for name, path in paths))


def _read(path: str | Path, *, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise AccessDeniedError(f"{field}: {path}: {error.strerror}") from error


def _stamp(path: str | Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def _is_loopback(address: str) -> bool:
    target = address.rpartition("///")[2]  # dns:///host:port
    if target.startswith("unix:"):
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
