"""Frameworks are needed for the packages named after them, and for nothing else."""

import subprocess
import sys
from types import ModuleType

import pytest

import equipoise.lightning
import equipoise.torch
import equipoise.transformers

WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import equipoise, equipoise.aio
try:
    import equipoise.{package}
except ImportError as error:
    print(error)
"""
ALONE = """
import sys
import equipoise.torch
print(sorted({"transformers", "lightning", "accelerate"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("package", "name"), [("torch", "PyTorch"), ("transformers", "transformers"), ("lightning", "Lightning")]
)
def test_without_its_framework_it_says_what_to_install(package: str, name: str) -> None:
    assert _output(WITHOUT.format(package=package)) == (
        f"equipoise.{package} needs {name}: pip install 'equipoise[{package}]'"
    )


def test_frameworks_are_imported_by_their_own_packages_alone() -> None:
    assert _output(ALONE) == "[]"


@pytest.mark.parametrize("module", [equipoise.torch, equipoise.transformers, equipoise.lightning])
def test_all_names_are_there_and_sorted(module: ModuleType) -> None:
    assert all(hasattr(module, name) for name in module.__all__)
    assert list(module.__all__) == sorted(module.__all__, key=lambda name: (name.islower(), name))


def _output(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
