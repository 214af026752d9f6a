"""The private folder of several processes, also those that killed servers leave."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from equipoise_server.processes.directory import LONGEST, PREFIX, PrivateDirectory


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files are, under a short name."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)


def test_it_is_private_and_goes(place: Path) -> None:
    directory = PrivateDirectory()
    path = Path(directory.path)
    assert path.parent == place
    assert path.stat().st_mode & 0o777 == 0o700
    (path / "0.json").write_text("{}")
    directory.remove()
    directory.remove()
    assert not list(place.iterdir())


def test_what_killed_servers_left_is_removed_and_no_more(place: Path) -> None:
    code = "import os; from equipoise_server.processes.directory import PrivateDirectory as P; p = P(); "
    code += "open(f'{p.path}/0.json', 'w').close(); os.kill(os.getpid(), 9)"
    command = f"import tempfile; tempfile.tempdir = {str(place)!r}; {code}"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == -9
    left = set(place.iterdir())
    assert len(left) == 1
    other = place / "equipoise-of-somebody"
    other.mkdir()
    first, second = PrivateDirectory(), PrivateDirectory()
    assert set(place.iterdir()) == {other, Path(first.path), Path(second.path)}
    for directory in (first, second):
        directory.remove()


def test_one_that_is_taken_for_left_before_it_is_locked_is_made_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.mkdtemp
    gone: list[str] = []

    def raced(*, prefix: str, dir: str | None) -> str:
        path = made(prefix=prefix, dir=dir)
        if not gone:
            Path(path).rmdir()
            gone.append(path)
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", raced)
    directory = PrivateDirectory()
    assert gone
    assert Path(directory.path).is_dir()
    directory.remove()


def test_a_path_that_is_too_long_for_a_socket_is_not_taken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = place / ("d" * LONGEST)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    directory = PrivateDirectory()
    assert Path(directory.path).parent == Path("/tmp")
    assert Path(directory.path).name.startswith(PREFIX)
    assert not list(deep.iterdir())
    directory.remove()
