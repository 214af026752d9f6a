"""Generates the stubs in client/equipoise/v1 from the contract; `--check` only tells whether they are current.

Run by `make proto` and `make check` with the Python of `.venv-proto`, whose generator is pinned low on purpose: stubs
run with its own grpcio and protobuf and every newer one, and trainers pin old ones.
"""

import argparse
import filecmp
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROTO_DIR = Path(__file__).parent
STUB_DIR = PROTO_DIR.parent / "client" / "equipoise" / "v1"
CONTRACT = "equipoise/v1/policy.proto"


def googleapis_dir() -> Path:
    """Folder that holds google/rpc/*.proto, from googleapis-common-protos."""
    spec = importlib.util.find_spec("google.rpc")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).parents[1]


def protoc(*arguments: str) -> None:
    """Runs protoc on the contract."""
    bin_dir = Path(sys.executable).parent
    plugins = [f"--plugin={name}={bin_dir / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    includes = [f"-I{PROTO_DIR}", f"-I{googleapis_dir()}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *includes, *plugins, *arguments, CONTRACT], check=True)


def generate(target: Path) -> list[Path]:
    """Writes the stubs under `target` and returns them."""
    protoc(f"--python_out={target}", f"--grpc_python_out={target}", f"--mypy_out={target}", f"--mypy_grpc_out={target}")
    return sorted((target / "equipoise" / "v1").iterdir())


def lint() -> None:
    """Runs buf lint on the contract as protoc understood it, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder) / "contract.binpb")
        protoc(f"--descriptor_set_out={image}", "--include_imports", "--include_source_info")
        buf = Path(sys.executable).parent / "buf"
        subprocess.run([buf, "lint", image, "--config", PROTO_DIR / "buf.yaml", "--path", CONTRACT], check=True)


def main() -> int:
    """Generates or checks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the stubs are not current")
    check: bool = parser.parse_args().check
    lint()
    with tempfile.TemporaryDirectory() as folder:
        stale = []
        for stub in generate(Path(folder)):
            committed = STUB_DIR / stub.name
            if committed.exists() and filecmp.cmp(stub, committed, shallow=False):
                continue
            stale.append(committed)
            if not check:
                shutil.copyfile(stub, committed)
    for path in stale:
        print(f"{'stale, run make proto' if check else 'written'}: {path}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
