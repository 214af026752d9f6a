"""torch is needed for `equipoise.torch`, and for nothing else."""

import subprocess
import sys

import equipoise.torch

WITHOUT_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'torch':
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import equipoise, equipoise.aio
try:
    import equipoise.torch
except ImportError as error:
    print(error)
"""


def test_without_torch_it_says_what_to_install() -> None:
    output = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "equipoise.torch needs PyTorch: pip install 'equipoise[torch]'"


def test_all_names_are_there_and_sorted() -> None:
    assert all(hasattr(equipoise.torch, name) for name in equipoise.torch.__all__)
    assert list(equipoise.torch.__all__) == sorted(equipoise.torch.__all__, key=lambda name: (name.islower(), name))
