"""What a part of the benchmark has found: a table for the terminal, and a JSON file that is written as it goes."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from equipoise.commands.tables import table

PACKAGES = ("equipoise", "grpcio", "protobuf", "redis", "torch", "numpy")


class Report:
    """Collects results.

    Attributes:
        facts: of machine, load and versions.
        results: what was found, as it goes into the file.
        not_run: why something was not, by its name.
        notes: lines below the table.
    """

    def __init__(self, part: str, output: Path) -> None:
        self.facts: dict[str, Any] = {
            "part": part,
            "time": datetime.now(UTC).isoformat(timespec="minutes"),
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "load_before": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        }
        self.results: list[Mapping[str, Any]] = []
        self.not_run: dict[str, str] = {}
        self.notes: list[str] = []
        self._output = output
        self._lines: list[Mapping[str, object]] = []

    def add(self, found: Mapping[str, Any], line: Mapping[str, object]) -> None:
        """Takes a result, and its cells by their heads; all lines have the same heads."""
        self.results.append(found)
        self._lines.append(line)

    def write(self) -> None:
        """Writes the file anew: a run that is stopped keeps what it has."""
        self.facts["load_after"] = round(os.getloadavg()[0], 2)
        found = {"facts": self.facts, "not_run": self.not_run, "notes": self.notes, "results": self.results}
        self._output.write_text(json.dumps(found, indent=1) + "\n")

    def show(self) -> None:
        """Prints the table; what is the same in all lines stands above it."""
        if self._lines:
            heads = list(self._lines[0])
            same = [head for head in heads if len(self._lines) > 1 and len({line[head] for line in self._lines}) == 1]
            if same:
                print("in all lines: " + ", ".join(f"{head} {self._lines[0][head]}" for head in same))
            told = [head for head in heads if head not in same]
            print(table(told, ([line[head] for head in told] for line in self._lines)))
        for name, why in self.not_run.items():
            print(f"{name} did not run: {why}")
        for note in self.notes:
            print(note)
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.facts.items()))
        print(f"written: {self._output}")


def progress(text: str) -> None:
    """Says on the terminal what is done."""
    print(text, file=sys.stderr, flush=True)


def quartiles(median: float, low: float, high: float) -> str:
    """A ratio, with its quartiles where it has some."""
    if low == high:
        return f"{median:.3g}"
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def digits(value: float | None) -> str | None:
    """Three of them; None stays what it is."""
    return None if value is None else f"{value:.3g}"


def texts(values: Sequence[object]) -> str:
    """Values one after another."""
    return ", ".join(map(str, values))
