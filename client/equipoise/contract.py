"""The contract's files: the .proto with those it imports, the documentation and the golden vectors."""

from pathlib import Path


def folder() -> Path:
    """Where they are: in an installed package beside this module, in a checkout in `proto/`."""
    installed = Path(__file__).parent / "proto"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "proto"
