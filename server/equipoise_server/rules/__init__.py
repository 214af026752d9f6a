"""Rules: pure functions from statistics to the next policy; no I/O, no clock, no randomness."""

from equipoise_server.rules.aggregate import aggregate
from equipoise_server.rules.base import (
    PAGE_EXAMPLES,
    LoggedStatistics,
    RuleError,
    Scalars,
    SettingValues,
    Statistics,
    StrataReport,
    Stratum,
    TableState,
)
from equipoise_server.rules.evidence import Evidence, evidence
from equipoise_server.rules.guard import Guard
from equipoise_server.rules.projection import project
from equipoise_server.rules.registry import build, names
from equipoise_server.rules.rule import Rule
from equipoise_server.rules.simplex import project_simplex
from equipoise_server.rules.sketch import sketched_contributions
from equipoise_server.rules.slices import Slices, exhaust

__all__ = [
    "PAGE_EXAMPLES",
    "Evidence",
    "Guard",
    "LoggedStatistics",
    "Rule",
    "RuleError",
    "Scalars",
    "SettingValues",
    "Slices",
    "Statistics",
    "StrataReport",
    "Stratum",
    "TableState",
    "aggregate",
    "build",
    "evidence",
    "exhaust",
    "names",
    "project",
    "project_simplex",
    "sketched_contributions",
]
