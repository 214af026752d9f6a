"""The rules that we ship, read: what they record, what they alert of, and what they ask for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yaml"))
RECORDING = DEPLOY / "prometheus" / "rules" / "recording.yaml"
RUNBOOKS = DEPLOY / "runbooks"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A recording rule or an alert; of the former `severity` and `runbook` are empty."""

    name: str
    expression: str
    is_alert: bool
    severity: str = ""
    runbook: str = ""
    annotations: tuple[str, ...] = ()


@cache
def rules(*files: Path) -> tuple[Rule, ...]:
    """Those of some files; of all where none is given."""
    return tuple(_read(files or FILES))


def alerts() -> tuple[Rule, ...]:
    """Those that are alerts; one name may have several, of different severity."""
    return tuple(rule for rule in rules() if rule.is_alert)


def recorded() -> frozenset[str]:
    """Names of the series that rules record."""
    return frozenset(rule.name for rule in rules() if not rule.is_alert)


def _read(files: Iterable[Path]) -> Iterator[Rule]:
    for file in files:
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]:
            for each in group["rules"]:
                yield _rule(each)


def _rule(each: dict[str, Any]) -> Rule:
    notes = each.get("annotations", {})
    return Rule(
        name=each.get("alert") or each["record"],
        expression=each["expr"],
        is_alert="alert" in each,
        severity=each.get("labels", {}).get("severity", ""),
        runbook=notes.get("runbook_url", ""),
        annotations=tuple(sorted(notes)),
    )
