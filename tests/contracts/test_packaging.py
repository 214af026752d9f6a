"""What `pip install .` brings: three packages, a light client, and one version everywhere."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "redis", "prometheus_client", "pydantic", "structlog", "typer", "rich", "sklearn", "matplotlib"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "equipoise",
        "equipoise_server",
        "equipoise_trainer",
    }


def test_the_wheel_holds_the_stubs_and_says_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {"equipoise/v1/policy_pb2.py", "equipoise/v1/policy_pb2_grpc.pyi"} <= names
    assert {f"{package}/py.typed" for package in ("equipoise", "equipoise_server", "equipoise_trainer")} <= names


def test_the_wheel_holds_the_contract(wheel: zipfile.ZipFile) -> None:
    """Everything that another language needs: the .proto, those it imports, the pages, the vectors; no generators."""
    folder = "equipoise/proto/"
    held = {name.removeprefix(folder) for name in wheel.namelist() if name.startswith(folder)}
    parts = ("equipoise", "google", "docs", "vectors")
    there = {
        path.relative_to(ROOT / "proto").as_posix() for part in parts for path in (ROOT / "proto" / part).rglob("*")
    }
    assert held == {path for path in there if "." in path.rpartition("/")[2]}
    assert {"equipoise/v1/policy.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"} < held
    assert {path.rpartition(".")[2] for path in held} == {"proto", "md", "json"}


def test_a_plain_install_requires_what_the_client_needs_alone(wheel: zipfile.ZipFile) -> None:
    [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    required = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", wheel.read(metadata).decode(), re.MULTILINE)
    plain = {name for name, rest in required if "extra ==" not in rest}
    assert plain == {"grpcio", "protobuf", "googleapis-common-protos", "numpy"}


def test_the_client_from_the_wheel_runs_without_any_extra(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """A light install: whatever the extras bring cannot be imported, and nothing asks for it."""
    wheel.extractall(tmp_path)
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f'no module {{name}}', name=name)
sys.meta_path.insert(0, Absent())
import equipoise, equipoise.aio, equipoise.cli, equipoise.commands.policy
assert equipoise.__file__.startswith({str(tmp_path)!r}), equipoise.__file__
assert not {HEAVY!r} & set(sys.modules)
equipoise.PolicyClient
import equipoise.commands.conformance, equipoise.commands.contract
assert equipoise.commands.conformance.main(["--list", "--only", "rules/ema_sign"]) == 0
assert equipoise.commands.contract.main([]) == equipoise.commands.contract.main(["copy"]) == 0
assert equipoise.commands.contract.main(["copy"]) == 1
assert not {HEAVY!r} & set(sys.modules)
"""
    run = [sys.executable, "-c", code]
    said = subprocess.run(
        run, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True, capture_output=True, text=True
    )
    *checks, folder, copied = said.stdout.splitlines()
    assert "rules/ema_sign/defaults" in checks
    assert (folder, copied) == (
        str(tmp_path / "equipoise/proto"),
        "the contract is in copy; start with copy/docs/README.md",
    )
    for path in ("equipoise/v1/policy.proto", "docs/README.md", "vectors/ema_sign.json"):
        assert (tmp_path / "copy" / path).read_bytes() == (ROOT / "proto" / path).read_bytes()


def test_the_newest_release_in_the_changelog_is_this_version() -> None:
    released = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert released[0] == project["version"] == version("equipoise")


def test_everything_that_is_required_is_pinned() -> None:
    """A pin that is missing would make two installs differ."""
    names = {
        re.split(r"[=<>\[; ]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    lists += pyproject["dependency-groups"].values()
    missing = {re.split(r"[=<>\[; ]", need)[0].lower().replace("_", "-") for needs in lists for need in needs} - names
    assert missing == set()
