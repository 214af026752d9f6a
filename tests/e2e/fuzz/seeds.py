"""Random tests that can be repeated: each prints its seed, and takes it back."""

import os
import secrets
from typing import Any

from hypothesis import HealthCheck, settings

VARIABLE = "FUZZ_SEED"
SEED = int(os.environ.get(VARIABLE) or secrets.randbits(32))


def announce() -> None:
    """Says how to repeat what follows; pytest shows it when the test fails."""
    print(f"seed {SEED}; to repeat: {VARIABLE}={SEED} .venv/bin/pytest ...")


def effort(examples: int, **options: Any) -> settings:
    """So many examples, without deadlines and without a database: the seed alone decides."""
    unhurried: list[HealthCheck] = [
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ]
    return settings(
        max_examples=examples, deadline=None, database=None, print_blob=True, suppress_health_check=unhurried, **options
    )
