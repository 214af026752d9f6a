"""What the package promises to everyone who imports it."""

import subprocess
import sys
from types import ModuleType

import equipoise
from equipoise import aio

LIGHT = {"equipoise", "google", "grpc", "grpc_health", "grpc_reflection", "numpy", "typing_extensions"}
"""What is loaded beside the standard library, and what compiled modules say of themselves."""


def test_all_names_are_the_public_names() -> None:
    public = {
        name
        for name, value in vars(equipoise).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(equipoise.__all__) == public | {"errors"}
    assert list(equipoise.__all__) == sorted(equipoise.__all__, key=lambda name: (name.islower(), name))


def test_importing_is_light() -> None:
    """And so it is quick: some 0.3 s of a core, nearly all of it for gRPC and numpy."""
    code = (
        "import sys; before = set(sys.modules); import equipoise, equipoise.aio; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before - sys.stdlib_module_names})"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name for name in output.split() if "cython" not in name}
    assert loaded - sys.stdlib_module_names <= LIGHT


def test_the_asyncio_client_has_the_same_methods() -> None:
    for sync, asynchronous in ((equipoise.PolicyClient, aio.PolicyClient), (equipoise.PolicyAdmin, aio.PolicyAdmin)):
        assert {n for n in dir(sync) if not n.startswith("_")} == {
            n for n in dir(asynchronous) if not n.startswith("_")
        }
