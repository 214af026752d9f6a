"""The client of Equipoise, a learning-policy service: how much should each training example count now?

`PolicyClient` serves synchronous training loops, `equipoise.aio.PolicyClient` asyncio ones; errors are in
`equipoise.errors`, and `equipoise.testing.serve` starts a real server for tests.
"""

from equipoise import forks as forks  # before gRPC is imported

# isort: split
from equipoise import errors
from equipoise.admin import PolicyAdmin
from equipoise.client import PolicyClient
from equipoise.errors import EquipoiseError
from equipoise.hashing import hash_ids
from equipoise.keys import ExampleKeys
from equipoise.options import Backoff, Limits, Timeout
from equipoise.policies import ListedPolicy, PolicySpec, PolicyStatus, ServerInfo, Stratum
from equipoise.results import Outcome, Source, Stats, StepResult
from equipoise.security import Security

__all__ = [
    "Backoff",
    "EquipoiseError",
    "ExampleKeys",
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
    "Stratum",
    "Timeout",
    "errors",
    "hash_ids",
]
