"""A guarded server: TLS, client certificates, tokens of two tenants and of an operator."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from equipoise import Security
from equipoise_server.security import Scope, entry, new_token
from tests.e2e.security.authority import Authority, Files
from tests.servers import ServerProcess, serve

TENANTS = """
[tenants.red]
prefix = "red-"
[tenants.blue]
prefix = "blue-"
[tenants.operator]
prefix = ""
[tenants.small]
prefix = "small-"
max_policies = 2
max_examples = 100
max_streams = 2
"""


class Tokens:
    """A tokens file that grows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text(TENANTS)

    def add(self, tenant: str, *scopes: Scope) -> str:
        """A new token, listed in the file."""
        token, kept = new_token(tenant=tenant, scopes=scopes or tuple(Scope))
        with self.file.open("a") as lines:
            lines.write(entry(kept))
        return token


@dataclass(frozen=True, slots=True)
class Guarded:
    """A guarded server, and what is needed to get in."""

    process: ServerProcess
    authority: Authority
    certificate: Files
    tokens: dict[str, str]

    def security(self, token: str | None = None) -> Security:
        """A client's, with the token of this name."""
        return Security(
            root_certificates=self.authority.file,
            client_certificate=self.certificate.certificate,
            client_key=self.certificate.key,
            token=self.tokens[token] if token else None,
        )

    def with_certificate(self, files: Files, token: str) -> Security:
        """A client's that shows another certificate."""
        return replace(self.security(token), client_certificate=files.certificate, client_key=files.key)


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    authority = Authority(folder)
    server, client = authority.issue("server"), authority.issue("client")
    listed = Tokens(folder / "tokens.toml")
    tokens = {
        "red": listed.add("red"),
        "red read": listed.add("red", Scope.READ),
        "red train": listed.add("red", Scope.TRAIN),
        "red admin": listed.add("red", Scope.ADMIN),
        "blue": listed.add("blue"),
        "operator": listed.add("operator"),
        "small": listed.add("small"),
    }
    with serve(
        tls_certificate=server.certificate,
        tls_key=server.key,
        tls_client_ca=authority.file,
        tokens_file=listed.file,
    ) as process:
        yield Guarded(process, authority, client, tokens)
