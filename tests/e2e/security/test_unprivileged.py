"""The server needs no privileges and writes nothing but its state."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest

from equipoise import PolicyClient, Source
from tests.patience import PATIENT

NOBODY = 65534
SEALED = """
mount --bind "$1" "$1" && mount -o remount,bind,ro / && shift || exit 1
exec setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs \\
  --bounding-set=-all,+dac_read_search --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search -- "$@"
"""
"""Runs a command as nobody; all but a folder is read-only. It may read all: this interpreter may lie anywhere."""


def sealed(folder: Path) -> list[str]:
    """What precedes a command to run it as above; nothing for a user who is not root, and so unprivileged."""
    if os.geteuid() != 0:
        return []
    prefix = ["unshare", "--mount", "sh", "-c", SEALED, "sh", str(folder)]
    try:
        subprocess.run([*prefix, "touch", str(folder / "probe")], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"root cannot give up its privileges here: {error}")
    return prefix


@contextmanager
def unprivileged(folder: Path) -> Iterator[tuple[str, int]]:
    """A server of an account that may write nowhere but in `folder`: its address and process."""
    ready = folder / "ready.json"
    flags = {"listen": "127.0.0.1:0", "metrics-listen": "127.0.0.1:0", "data-dir": folder / "data", "ready-file": ready}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "TMPDIR": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [*sealed(folder), sys.executable, "-m", "equipoise", "serve", *arguments]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd="/", env=environment, stdout=log, stderr=log)
    try:
        end = monotonic() + 60
        while not ready.exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert monotonic() < end, (folder / "log").read_text()
            sleep(0.02)
        yield json.loads(ready.read_text())["address"], process.pid
    finally:
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that `nobody` owns, in one that everybody may cross."""
    with tempfile.TemporaryDirectory(prefix="equipoise-") as name:
        if os.geteuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)


def test_it_serves_without_a_home_and_without_a_folder_to_write_in_but_its_own(folder: Path) -> None:
    with unprivileged(folder) as (address, pid):
        with PolicyClient(address, policy="p", num_examples=10, timeout=PATIENT) as client:
            assert client.step([1], contributions=[1.0]).source is Source.SERVED
            assert client.flush(durable=True)
        assert "\nUid:\t0\t" not in Path(f"/proc/{pid}/status").read_text()
        written = _files_open_for_writing(pid)
        assert {path for path in written if not path.startswith((str(folder), "/dev/", "/memfd:"))} == set()
        data = folder / "data"
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        for path in data.rglob("*"):
            assert not path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP), path


def _files_open_for_writing(pid: int) -> set[str]:
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(entry.path)
            facts = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
        except FileNotFoundError:  # closed meanwhile
            continue
        flags = next(line for line in facts.splitlines() if line.startswith("flags"))
        if target.startswith("/") and int(flags.split()[1], 8) & (os.O_WRONLY | os.O_RDWR):
            found.add(target)
    return found
