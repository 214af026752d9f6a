"""What the package promises to everyone who imports it."""

import subprocess
import sys
from types import ModuleType

import equipoise
from equipoise import aio

FORBIDDEN = ("torch", "redis", "prometheus_client", "typer", "pydantic", "rich", "structlog", "sklearn", "matplotlib")


def test_all_names_are_the_public_names() -> None:
    public = {
        name
        for name, value in vars(equipoise).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(equipoise.__all__) == public | {"errors"}
    assert list(equipoise.__all__) == sorted(equipoise.__all__, key=lambda name: (name.islower(), name))


def test_importing_is_quick_and_light() -> None:
    code = (
        "import sys, time; start = time.process_time(); import equipoise, equipoise.aio; "
        f"print(time.process_time() - start, [m for m in {FORBIDDEN!r} if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, loaded = output.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 1.5  # 0.3 s of a core; a heavy import would take several


def test_the_asyncio_client_has_the_same_methods() -> None:
    for sync, asynchronous in ((equipoise.PolicyClient, aio.PolicyClient), (equipoise.PolicyAdmin, aio.PolicyAdmin)):
        assert {n for n in dir(sync) if not n.startswith("_")} == {
            n for n in dir(asynchronous) if not n.startswith("_")
        }
