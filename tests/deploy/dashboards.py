"""What the dashboards and rules ask for, and which metrics there are."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from deploy.grafana.boards import boards
from tests.deploy.metrics_page import rows
from tests.deploy.rules import recorded, rules

_RECORDED = r"\b(?:job|instance|policy):\w+:\w+"
_EXPORTED = r"\b(?:equipoise_(?:server|client)_\w+|grpc_server_\w+|process_\w+|python_gc_\w+)"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A query of ours, as Prometheus gets it.

    Attributes:
        where: board and panel, or rule.
        expression: PromQL; choices at the top of a dashboard are "All".
    """

    where: str
    expression: str


def of_panels(*, rate: str = "1m") -> list[Question]:
    """Every query of every panel."""
    return [
        Question(where=f"{board.name} / {panel.title} / {query.legend}", expression=chosen(query.resolved, rate=rate))
        for board in boards()
        for panel in board.panels
        for query in panel.queries
    ]


def of_rules() -> list[Question]:
    """What every rule and alert asks for. An alert that is silent gives nothing: its operands are asked for."""
    return [Question(where=rule.name, expression=rule.expression) for rule in rules()]


def chosen(expression: str, *, rate: str = "1m") -> str:
    """A panel's query as Grafana sends it when everything is chosen."""
    return re.sub(r"\$\{?(?!__)\w+\}?", ".*", expression.replace("$__rate_interval", rate))


def recorded_in(expression: str) -> set[str]:
    """Recorded series that an expression asks for."""
    return set(re.findall(_RECORDED, expression))


def metrics_in(expression: str) -> set[str]:
    """Exported metrics that an expression asks for; parts of a histogram are the histogram."""
    names = set(re.findall(_EXPORTED, re.sub(_RECORDED, "", expression)))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def selectors_in(expression: str) -> set[str]:
    """Each series that an expression asks for, with the labels that it asks for."""
    found = re.findall(rf"((?:{_RECORDED}|{_EXPORTED}|\bup\b)(?:\{{[^}}]*\}})?)", expression)
    return {each for each in found if not each.startswith("up_")}


def reached_from(expressions: Iterable[str]) -> set[str]:
    """Exported metrics that expressions ask for, also by way of recorded series."""
    by_name = {rule.name: rule.expression for rule in rules() if not rule.is_alert}
    found: set[str] = set()
    waiting, seen = list(expressions), set[str]()
    while waiting:
        expression = waiting.pop()
        found |= metrics_in(expression)
        for name in recorded_in(expression) - seen:
            seen.add(name)
            waiting.append(by_name[name])
    return found


def exported() -> set[str]:
    """Metrics that servers and clients export."""
    return {row.split("`")[1] for _, row in rows()}


__all__ = [
    "Question",
    "chosen",
    "exported",
    "metrics_in",
    "of_panels",
    "of_rules",
    "reached_from",
    "recorded",
    "selectors_in",
]
