"""The client of Equipoise, a learning-policy service: how much should each training example count now?

`PolicyClient` serves synchronous training loops, `equipoise.aio.PolicyClient` asyncio ones; errors are in
`equipoise.errors`, and `equipoise.testing.serve` starts a real server for tests.
"""

from equipoise import errors
from equipoise.admin import PolicyAdmin
from equipoise.client import PolicyClient
from equipoise.config import Backoff, Limits, Timeout
from equipoise.errors import EquipoiseError
from equipoise.hashing import hash_ids
from equipoise.policies import ListedPolicy, PolicySpec, PolicyStatus, ServerInfo
from equipoise.results import Outcome, Source, StepResult
from equipoise.security import Security
from equipoise.stats import Stats

__all__ = [
    "Backoff",
    "EquipoiseError",
    "Limits",
    "ListedPolicy",
    "Outcome",
    "PolicyAdmin",
    "PolicyClient",
    "PolicySpec",
    "PolicyStatus",
    "Security",
    "ServerInfo",
    "Source",
    "Stats",
    "StepResult",
    "Timeout",
    "errors",
    "hash_ids",
]
