"""Prometheus for tests: Debian's programs, and one that runs."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port

NOT_TO_BE_HAD = 3
PATIENCE_S = 60.0


@cache
def _fetched() -> tuple[Path | None, str]:
    script = Path(__file__).with_name("fetch-prometheus")
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    if done.returncode == NOT_TO_BE_HAD:
        return None, done.stderr[-200:]
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()), ""


def programs() -> Path:
    """Folder of prometheus and promtool; skips the test where they cannot be had."""
    folder, why = _fetched()
    if folder is None:
        pytest.skip(f"Debian's prometheus cannot be had here: {why}")
    return folder


@contextmanager
def running(config: Path, folder: Path) -> Iterator[str]:
    """URL of a Prometheus with this configuration, which keeps its files in a folder."""
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([programs() / "prometheus", *flags], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def until(condition: Callable[[], Any], what: str, *, patience_s: float = PATIENCE_S) -> Any:
    """Asks until the answer is true, and returns it."""
    deadline = time.monotonic() + patience_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not in {patience_s:.0f} s: {what}"
        time.sleep(0.1)
    return answer


def queried(url: str, query: str) -> list[dict[str, Any]]:
    """The series that a query gives now; none while Prometheus starts."""
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}") as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
    except OSError:
        return []


def value(url: str, query: str) -> float:
    """The value of a query's only series."""
    [series] = until(lambda: queried(url, query), query)
    return float(series["value"][1])
