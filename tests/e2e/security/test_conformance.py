"""The conformance kit reaches a guarded server as the other commands do, and checks what it says to strangers."""

import json
from pathlib import Path

import pytest

from equipoise.commands.conformance import main
from tests.e2e.security.conftest import Guarded


def test_a_tenant_checks_a_guarded_server(guarded: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    token.write_text(guarded.tokens["red"])
    arguments = {
        "root-certificates": guarded.authority.file,
        "client-certificate": guarded.certificate.certificate,
        "client-key": guarded.certificate.key,
        "token-file": token,
        "prefix": "red-conformance-",
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    groups = ("server", "policies", "stream", "copies")
    status = main(
        [guarded.process.address, "--json", *flags, *(part for group in groups for part in ("--only", group))]
    )
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert [check for check in checks.values() if check["verdict"] != "ok"] == []
    assert status == 0
    assert {"server/token missing", "server/token wrong", "copies/fork"} <= set(checks)
