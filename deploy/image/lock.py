"""Writes what the images install, each with its hash: `requirements-*.txt`, from constraints.txt and pyproject.toml.

    python deploy/image/lock.py cpu     # with PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL, where PyTorch's CPU builds are
    python deploy/image/lock.py cuda    # without
    python deploy/image/lock.py build

To be run with Python 3.11, the images' own, on the platform that they are for: hashes are those of its files.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SERVER = (f"{ROOT}[server]", "async-timeout")  # which redis needs before Python 3.11.3: Debian's is 3.11.2
WANTED = {"cpu": SERVER, "cuda": SERVER, "build": ("hatchling",)}


def locked(wanted: tuple[str, ...]) -> list[str]:
    """Lines of the file for what pip would install into an empty environment."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        options = ["--dry-run", "--ignore-installed", "--report", report.name, "--constraint", ROOT / "constraints.txt"]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *options, *wanted], check=True)
        found = json.loads(Path(report.name).read_text(encoding="utf-8"))["install"]
    lines = []
    for each in found:
        if "archive_info" in each["download_info"]:  # else it is the project itself
            name, version = each["metadata"]["name"].lower().replace("_", "-"), each["metadata"]["version"]
            lines.append(f"{name}=={version} --hash=sha256:{each['download_info']['archive_info']['hashes']['sha256']}")
    return sorted(lines)


def main(flavour: str) -> None:
    """Writes the file of one flavour."""
    lines = [f"# Written by lock.py {flavour}.", *locked(WANTED[flavour])]
    (FOLDER / f"requirements-{flavour}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
