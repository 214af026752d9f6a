"""What numbers were taken on and with, and how they become JSON."""

import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("equipoise", "numpy", "torch", "tokenizers", "scikit-learn", "grpcio", "redis", "matplotlib")


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """Versions of what takes part; None: not installed here."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def finite(value: Any) -> Any:
    """The value with None for all that is not finite, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
