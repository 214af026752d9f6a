"""The TypeScript client, built, and programs in Node.js that use it."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "client" / "typescript"
BUILT = HERE.parents[1] / ".cache" / "typescript"
"""Locked while the client is built; names the run of the tests that it was built for."""
OLDEST_NODE = 20
INSTALL_SECONDS = 300
PLAY_SECONDS = 60

Json: TypeAlias = dict[str, Any]


class MissingError(Exception):
    """What the TypeScript client needs is not on this machine, and why."""


def build() -> None:
    """Builds the client, once for all workers of a run. Raises MissingError where what it needs cannot be had here."""
    this_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", "")
    BUILT.parent.mkdir(exist_ok=True)
    with BUILT.open("a+") as built:
        fcntl.flock(built, fcntl.LOCK_EX)
        built.seek(0)
        if this_run and built.read() == this_run:
            return
        install_and_compile()
        built.truncate(0)
        built.write(this_run)


def install_and_compile() -> None:
    """Raises MissingError where what the client needs cannot be had here."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise MissingError(f"there is no {program} on this machine")
    version = run("node", "--version", timeout=30).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < OLDEST_NODE:
        raise MissingError(f"node is {version}, and the client needs {OLDEST_NODE} or newer")
    installed = PACKAGE / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (PACKAGE / "package-lock.json").stat().st_mtime:
        try:
            install = run("npm", "ci", "--prefer-offline", cwd=PACKAGE, timeout=INSTALL_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise MissingError(f"npm ci took more than {INSTALL_SECONDS} s") from error
        if install.returncode:
            raise MissingError(f"npm ci failed: {install.stderr[-1000:]}")
    compiled = run("npm", "run", "build", cwd=PACKAGE, timeout=INSTALL_SECONDS)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr


def run(*command: str | Path, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


def play(folder: Path, address: str, cases: Sequence[Json]) -> list[Json]:
    """Plays cases, see player.mjs; what each gave."""
    script = folder / "script.json"
    script.write_text(json.dumps({"address": address, "cases": list(cases)}), encoding="utf-8")
    played = run("node", HERE / "player.mjs", PACKAGE, script, timeout=PLAY_SECONDS)
    assert played.returncode == 0, played.stderr
    return [json.loads(line) for line in played.stdout.splitlines()]


def float32s(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), "<f4")


def uint64s(text: str) -> NDArray[np.uint64]:
    return np.frombuffer(base64.b64decode(text), "<u8")


class Trainer:
    """A process that trains until it is stopped, see trainer.mjs.

    Attributes:
        steps: what it has made so far, and was answered, in the order of the answers.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.steps: list[Json] = []
        self._served = 0
        self._end: Json = {}
        path = folder / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        self._log = folder / "trainer.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["node", HERE / "trainer.mjs", PACKAGE, path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def served(self) -> int:
        """Steps that were answered by the server while their caller waited. Raises when the trainer has ended."""
        assert self._process.poll() is None, self.log
        return self._served

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return self._log.read_text(errors="replace")[-3000:]

    def stop(self, within_s: float) -> Json:
        """Has it end in order; whether every step is `durable`, and `stats`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.wait(within_s)
        self._thread.join(10)
        assert status == 0, self.log
        return self._end

    def kill(self) -> None:
        """Ends it at once, if it runs."""
        self._process.kill()
        self._process.wait()
        self._thread.join(10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.endswith("\n"):  # killed in the middle of it
                return
            told = json.loads(line)
            if "step" in told:
                self.steps.append(told)
                self._served += told.get("source") == "served"
            else:
                self._end = told
