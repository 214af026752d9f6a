"""A password given in a file stays there, whatever goes wrong."""

import urllib.error
import urllib.request
from pathlib import Path
from time import monotonic, sleep

import pytest

from equipoise import PolicyAdmin, PolicySpec
from equipoise.errors import EquipoiseError
from tests.servers import serve

PASSWORD = "hunter2hunter2"


SLOW = [pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("rediss", "redis+sentinel")]


@pytest.mark.parametrize("scheme", ["redis", *SLOW])
def test_the_password_of_redis_is_neither_logged_nor_answered_nor_listed(scheme: str, tmp_path: Path) -> None:
    secret = tmp_path / "url"
    path = "/main/0" if scheme == "redis+sentinel" else "/0"
    secret.write_text(f"{scheme}://user:{PASSWORD}@127.0.0.1:1{path}\n")  # nobody is there
    with serve(redis_url_file=secret, log_level="debug") as server:
        with PolicyAdmin(server.address, timeout=5) as admin, pytest.raises(EquipoiseError) as caught:
            admin.create(PolicySpec(name="p", num_examples=1))
        end = monotonic() + 30
        while "redis cannot be used" not in server.log:
            assert monotonic() < end
            sleep(0.05)
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as page:
            metrics = page.read().decode()
        with pytest.raises(urllib.error.HTTPError) as unready:
            urllib.request.urlopen(f"http://{server.metrics_address}/healthz")
        arguments = Path(f"/proc/{server.pid}/cmdline").read_text()
        health = unready.value.read().decode()
        for shown in (server.log, str(caught.value), str(caught.value.metadata), metrics, health, arguments):
            assert PASSWORD not in shown


def test_a_secret_that_every_user_can_read_is_told_once(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("")
    for mode, told in ((0o644, 1), (0o640, 0)):
        tokens.chmod(mode)
        with serve(tokens_file=tokens) as server:
            lines = [line for line in server.log.splitlines() if "can read a secret" in line]
            assert len(lines) == told
            assert all("tokens_file" in line and str(tokens) in line for line in lines)
