"""The README's code runs as it stands and keeps its word."""

import re
import subprocess
import sys
from pathlib import Path

from tests.servers import serve

README = Path(__file__).parents[2] / "README.md"
SHIPPED_ADDRESS = "localhost:50051"


def code_of(heading: str) -> list[str]:
    """The Python blocks of a section."""
    _, _, behind = README.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    section, _, _ = behind.partition("\n## ")
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_the_client_code_finds_the_mislabelled_examples() -> None:
    [code] = code_of("A screen of client code")
    assert SHIPPED_ADDRESS in code
    with serve() as server:
        run = [sys.executable, "-W", "error", "-c", code.replace(SHIPPED_ADDRESS, server.address)]
        said = subprocess.run(run, check=True, capture_output=True, text=True, timeout=60).stdout
    [share] = re.findall(r"^(\d+)% of the examples with the lowest scores are mislabelled$", said, re.MULTILINE)
    assert int(share) >= 60  # 20 would be chance
