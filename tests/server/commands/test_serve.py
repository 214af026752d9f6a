"""`equipoise serve`: refuses bad settings at once and leaves in order."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from equipoise.testing import serve


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "equipoise", "serve", *flags], capture_output=True, text=True, check=False, timeout=60
    )


def health(address: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{address}/healthz") as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_settings_that_cannot_be_used_end_with_a_sentence_and_status_2() -> None:
    ended = run("--listen", "nowhere")
    assert ended.returncode == 2
    assert ended.stderr.startswith("equipoise serve: listen: 'nowhere' is not HOST:PORT")
    assert len(ended.stderr.splitlines()) == 1


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom equipoise.cli import main\n"
        "try: main(['serve', '--help'])\nfinally: print('TORCH', 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "TORCH False" in shown


def test_a_server_is_healthy_logs_json_and_ends_in_order() -> None:
    with serve() as server:
        deadline = time.monotonic() + 60
        while health(server.metrics_address) != 200:  # ready once Redis was reached
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.stop() == 0
        events = [json.loads(line)["event"] for line in server.log.splitlines()]
    assert "serving" in events
    assert events[-1] == "stopped"


def test_a_second_server_on_the_same_address_says_so_and_fails(tmp_path: Path) -> None:
    with serve() as server:
        flags = ("--listen", server.address, "--metrics-listen", "", "--data-dir", f"{tmp_path}/data")
        ended = run(*flags)
    assert ended.returncode == 1
    assert f"listen: '{server.address}'" in ended.stderr
