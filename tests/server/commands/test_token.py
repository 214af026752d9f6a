"""`equipoise token create`: what it prints and writes is what a server takes."""

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from equipoise_server.commands.token import main
from equipoise_server.security import Access, Scope, TokenFile
from equipoise_server.security.tokens import find

TENANT = '[tenants.red]\nprefix = "red-"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "tokens.toml"
    found.write_text(TENANT.rstrip())  # without an end of line
    return found


def test_what_it_prints_makes_a_tokens_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "--tenant", "red"]) == 0
    token, _, lines = capsys.readouterr().out.partition("\n")
    (kept,) = TokenFile.parse(TENANT + lines).tokens
    assert find({kept.id: kept}, token) == kept
    assert (kept.scopes, kept.expires) == ({Scope.READ, Scope.TRAIN}, None)


def test_it_appends_the_entry_and_hides_the_token(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret"
    flags = ["--tokens-file", str(file), "--output", str(secret), "--scopes", "admin", "--days", "2"]
    assert main(["create", "--tenant", "red", *flags]) == 0
    assert capsys.readouterr().out == ""
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    access = Access(file)
    access.load()
    metadata = (("authorization", f"Bearer {secret.read_text().strip()}"),)
    caller = access.admit("/equipoise.v1.PolicyService/DeletePolicy", metadata)
    assert caller.token is not None
    assert caller.token.expires is not None
    assert 1.9 < (caller.token.expires - datetime.now(UTC)).total_seconds() / 86400 <= 2


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--tenant", "blue"], 1, "there is no table [tenants.blue]"),
        (["--tenant", "red", "--days", "0"], 2, "--days: 0, must be at least 1"),
        (["--tenant", "red", "--output", "/absent/token"], 1, "/absent/token: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    file: Path, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, said: str
) -> None:
    before = file.read_text()
    assert main(["create", "--tokens-file", str(file), *flags]) == status
    assert said in capsys.readouterr().err
    assert file.read_text() == before


def test_an_unknown_scope_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["create", "--tenant", "red", "--scopes", "read,write"])
    assert caught.value.code == 2
    assert "'read,write': must be of read, train, admin" in capsys.readouterr().err


def test_a_file_that_is_there_is_not_overwritten(file: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    assert main(["create", "--tenant", "red", "--tokens-file", str(file), "--output", str(secret)]) == 1
    assert secret.read_text() == "mine"
    assert "[[tokens]]" not in file.read_text()
