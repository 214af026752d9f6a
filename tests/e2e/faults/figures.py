"""What the fault suite measures, as the table of its README.

    python -m tests.e2e.faults.figures

runs the suite, slow tests included, and writes the table into `tests/e2e/faults/README.md`. Arguments are pytest's:
`-k "not kills"` leaves the kill run out, which has no row.
"""

import json
import os
import platform
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import pytest

VARIABLE = "FAULTS_FIGURES"
"""Names the file to which figures are appended, one JSON object a line; unset: none are kept."""

HERE = Path(__file__).parent
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"


def record(fault: str, *, noticed: str = "", recovered: str = "", trainer: str = "", promise: str = "") -> None:
    """Keeps the figures of one row of the table; each in words, with units."""
    row = {"fault": fault, "promise": promise, "noticed": noticed, "recovered": recovered, "trainer": trainer}
    print(row)
    if file := os.environ.get(VARIABLE):
        with open(file, "a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "not at all"
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def table(rows: list[dict[str, str]]) -> str:
    """The rows as a Markdown table, the last one of each fault."""
    latest = {row["fault"]: row for row in rows}
    columns = {"fault": "fault", "promise": "promise", "noticed": "noticed after", "recovered": "recovered after",
               "trainer": "what the trainer saw"}  # fmt: skip
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    lines += [" | ".join(row[column] for column in columns) for row in latest.values()]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    machine += f", load average {os.getloadavg()[1]:.0f}"
    return f"Measured {date.today()} on {machine}.\n\n" + "".join(f"| {line} |\n" for line in lines)


def main() -> int:
    """Runs the suite and writes the table; its exit status."""
    file = Path(os.environ.setdefault(VARIABLE, "/tmp/equipoise-fault-figures.jsonl"))
    file.unlink(missing_ok=True)
    status = int(pytest.main([str(HERE), "-q", "-m", "slow or not slow", *sys.argv[1:]]))
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        found["rows"].append(json.loads(line))
    readme = HERE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(before + BEGIN + table(found["rows"]) + END + after, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
