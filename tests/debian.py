"""Programs of others that tests need: those of this machine, or else Debian's packages, unpacked beside the tests.

Nothing is installed, and nobody has to be root: packages that are not there are downloaded once, into `.cache/debian`.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".cache" / "debian"
_BINARIES = ("usr/bin", "usr/sbin")
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Program:
    """A program that can be run.

    Attributes:
        path: of its file.
        environment: variables that it needs beside those there are.
    """

    path: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def full_environment(self) -> dict[str, str]:
        """All variables for `subprocess`."""
        return {**os.environ, **self.environment}

    def put_on_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Everything that a test starts by the program's name is this one."""
        monkeypatch.setenv("PATH", f"{self.path.parent}:{os.environ['PATH']}")
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)


def program(name: str, *, package: str, what: str, is_usable: Callable[[Path], bool] = lambda path: True) -> Program:
    """A program by its name; skips the test, and says why, where there is none.

    Args:
        name: of its file.
        package: of Debian that holds it.
        what: does not run without it.
        is_usable: whether one that is found on this machine can do what the test needs.
    """
    here = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if here is not None and is_usable(Path(here)):
        return Program(Path(here))
    try:
        folder = _unpacked(package)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"there is no {name} for it on this machine, nor Debian's ({said.strip()}): {what} did not run")
    libraries = [str(path) for path in (*folder.glob("usr/lib/*-linux-*"), *folder.glob("lib/*-linux-*"))]
    path = next(folder / place / name for place in _BINARIES if (folder / place / name).exists())
    found = Program(path, {"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {})
    subprocess.run([path, "-v"], env=found.full_environment, capture_output=True, timeout=_TIMEOUT_S, check=True)
    return found


def redis_with_tls(*, what: str) -> Program:
    """A Redis that was built with TLS."""
    return program(
        "redis-server", package="redis-server", what=what, is_usable=lambda path: b"tls-cert-file" in path.read_bytes()
    )


def _unpacked(package: str) -> Path:
    """A folder with a package and what it depends on and is not installed."""
    folder = CACHE / package
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        work, result = Path(place), Path(place) / "unpacked"
        listed = _run(work, "apt-get", "install", "--simulate", "--no-install-recommends", "-qq", package)
        names = [line.split()[1] for line in listed.splitlines() if line.startswith("Inst ")]
        _run(work, "apt-get", "download", "-qq", *(names or [package]))
        for file in work.glob("*.deb"):
            _run(work, "dpkg-deb", "--extract", str(file), str(result))
        try:
            result.rename(folder)
        except OSError:
            if not folder.exists():  # another run was faster
                raise
    return folder


def _run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, cwd=folder, env=environment, timeout=_TIMEOUT_S, check=True, capture_output=True, text=True
    ).stdout
