"""The TypeScript client before a guarded server: TLS, client certificates, tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.security.authority import Authority, Files
from tests.e2e.security.conftest import Tokens
from tests.servers import serve
from tests.typescript.node import Json, float32s, play

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Door:
    """A guarded server, and the keys to it."""

    address: str
    authority: Authority
    certificate: Files
    token: str

    @property
    def keys(self) -> Json:
        """The option `security` of a client that may enter."""
        return {
            "rootCertificates": str(self.authority.file),
            "clientCertificate": str(self.certificate.certificate),
            "clientKey": str(self.certificate.key),
            "token": self.token,
        }


@pytest.fixture(scope="module")
def door(client: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("guarded")
    authority = Authority(folder)
    server = authority.issue("server")
    tokens = Tokens(folder / "tokens.toml")
    token = tokens.add("red")
    guards = {"tls_certificate": server.certificate, "tls_key": server.key, "tls_client_ca": authority.file}
    with serve(**guards, tokens_file=tokens.file) as process:
        yield Door(process.address, authority, authority.issue("client"), token)


def entered(door: Door, tmp_path: Path, security: Json, *, policy: str = "red-ts", wait_ms: int = 10_000) -> Json:
    """What a client with these keys hears."""
    options = {"policy": policy, "numExamples": 3, "security": security, "timeouts": {"waitMs": wait_ms}}
    [played] = play(
        tmp_path,
        door.address,
        [{"options": options, "steps": [{"ids": [0], "fields": {"contributions": [1.0]}}]}],
    )
    return played


def test_who_has_the_keys_trains(door: Door, tmp_path: Path) -> None:
    played = entered(door, tmp_path, door.keys)
    assert played["answers"][0]["source"] == "served"
    assert len(float32s(played["final"]["weights"])) == 3


def test_a_token_in_a_file(door: Door, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(door.token + "\n")
    keys = {name: key for name, key in door.keys.items() if name != "token"}
    assert entered(door, tmp_path, {**keys, "tokenFile": str(tmp_path / "token")})["answers"][0]["source"] == "served"


def test_keys_from_the_environment(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in door.keys.items():
        variable = "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in name)
        monkeypatch.setenv(f"EQUIPOISE_{variable}", key)
    options = {"policy": "red-ts", "numExamples": 3}
    [played] = play(tmp_path, door.address, [{"options": options, "steps": []}])
    assert played["durable"]


def test_who_lacks_a_key_is_told_why(door: Door, tmp_path: Path) -> None:
    keys = door.keys
    wrong = {**keys, "token": door.token[:-4] + "AAAA"}
    assert entered(door, tmp_path, wrong)["error"]["code"] == 16  # UNAUTHENTICATED
    assert entered(door, tmp_path, {**keys, "token": None})["error"]["code"] == 16
    stranger = entered(door, tmp_path, keys, policy="blue-ts")["error"]
    assert (stranger["code"], stranger["name"]) == (7, "EquipoiseError")  # PERMISSION_DENIED
    assert stranger["reason"]
    without = {**keys, "clientCertificate": None, "clientKey": None}
    assert entered(door, tmp_path, without, wait_ms=500)["error"]["name"] == "UnavailableError"
