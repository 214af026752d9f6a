"""Show where the contract's files are, or copy them: .proto, documentation, golden vectors."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from equipoise import contract

FAILED = 1
PARTS = ("equipoise", "google", "docs", "vectors")
"""What a copy holds: the .proto, those of google/rpc that it imports, the pages and the vectors."""


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise contract ...` and returns its exit status."""
    parser = argparse.ArgumentParser(prog="equipoise contract", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="copy the files here; without it, print where they are")
    target: Path | None = parser.parse_args(arguments).folder
    source = contract.folder()
    if target is None:
        print(source)
        return 0
    try:
        target.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            shutil.copytree(source / part, target / part)
    except OSError as error:
        print(f"equipoise contract: {error.filename or target}: {error.strerror}", file=sys.stderr)
        return FAILED
    print(f"the contract is in {target}; start with {target / 'docs' / 'README.md'}")
    return 0
