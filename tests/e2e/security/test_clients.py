"""Every client gets in: both kinds in code, the command line by flags, and all of them by the environment."""

from pathlib import Path

import pytest

from equipoise import PolicyAdmin, PolicyClient, Source, aio, cli
from equipoise_trainer.commands import train
from tests.e2e.security.conftest import Guarded
from tests.patience import PATIENT


@pytest.fixture
def environment(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a training job on a guarded server has in its environment."""
    security = guarded.security("red")
    monkeypatch.setenv("EQUIPOISE_ROOT_CERTIFICATES", str(security.root_certificates))
    monkeypatch.setenv("EQUIPOISE_CLIENT_CERTIFICATE", str(security.client_certificate))
    monkeypatch.setenv("EQUIPOISE_CLIENT_KEY", str(security.client_key))
    monkeypatch.setenv("EQUIPOISE_TOKEN", guarded.tokens["red"])


@pytest.mark.usefixtures("environment")
async def test_clients_in_code_need_no_change(guarded: Guarded, tmp_path: Path) -> None:
    with PolicyClient(guarded.process.address, policy="red-c", num_examples=3, timeout=PATIENT) as client:
        assert client.step([0], contributions=[1.0]).source is Source.SERVED
        assert client.status().version == 1
        client.admin.export_policy("red-c", tmp_path / "c.npz")
    async with aio.PolicyClient(guarded.process.address, policy="red-c", timeout=PATIENT) as asynchronous:
        assert (await asynchronous.step([0], contributions=[1.0])).source is Source.SERVED
        assert (await asynchronous.status()).version == 2
        await asynchronous.admin.import_policy(tmp_path / "c.npz", "red-imported")
    with PolicyAdmin(guarded.process.address) as admin:
        admin.delete("red-imported")
        admin.delete("red-c")


@pytest.mark.usefixtures("environment")
def test_a_reference_training_job_needs_no_change(guarded: Guarded, tmp_path: Path) -> None:
    # Its policies' names begin with `perceptron-`: the operator's token.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUIPOISE_TOKEN", guarded.tokens["operator"])
        flags = ["--server", guarded.process.address, "--steps", "5", "--seeds", "1", "--methods", "served"]
        assert train.main(["perceptron", *flags, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "report.json").exists()


def test_the_command_line_takes_flags(guarded: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    security = guarded.security("blue")
    token = tmp_path / "token"
    token.write_text(guarded.tokens["blue"])
    flags = ["--server", guarded.process.address, "--root-certificates", str(security.root_certificates)]
    mutual = ["--client-certificate", str(security.client_certificate), "--client-key", str(security.client_key)]
    with PolicyAdmin(guarded.process.address, security=security) as admin:
        known = {policy.spec.name for policy in admin.list_policies()}
    assert cli.main(["policy", "list", *flags, *mutual, "--token-file", str(token)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in known)
    assert cli.main(["policy", "list", *flags, *mutual]) == 1
    assert "no token" in capsys.readouterr().err
    assert cli.main(["policy", "list", *flags, "--token-file", str(token)]) == 4  # no connection without certificate
    assert cli.main(["policy", "list", *flags, "--client-key", "x"]) == 1
    assert "client_certificate: needs client_key" in capsys.readouterr().err
