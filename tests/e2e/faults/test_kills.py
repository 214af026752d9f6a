"""The kill run: no durable step is lost or applied twice, whatever is killed, and wherever.

A failure prints the seed; `FAULTS_SEED=n` runs the schedule of seed n again.
"""

import os
import secrets
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.faults.kills import RULES, KillRun
from tests.e2e.faults.schedule import FORCED, KILLS_AND_PAUSES, REGULAR, draw_schedule
from tests.e2e.faults.zygote import Zygote


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("FAULTS_SEED") or secrets.randbits(31))


def run(directory: Path, zygote: Zygote, *, seed: int, forced: int, regular: int, kills: int, durability: str) -> None:
    schedule = draw_schedule(seed, forced=forced, regular=regular, kills=kills)
    print(f"FAULTS_SEED={seed}: {len(schedule)} rounds, durability {durability}")
    killing = KillRun(directory, zygote, seed=seed, durability=durability)
    try:
        killing.run(schedule)
        findings, report = killing.check(), killing.report
        told = "\n".join(violation[:500] for violation in findings.violations[:5])
        assert not findings.violations, f"FAULTS_SEED={seed}, {len(findings.violations)} violations:\n{told}"
        assert sum(report.landed[fault] for fault in KILLS_AND_PAUSES) >= kills
        assert all(report.landed[fault] >= forced for fault in FORCED)
        assert all(report.landed[fault] >= regular for fault in REGULAR)
        assert len(report.in_flight) >= kills
        assert min(report.in_flight) >= 1
        assert findings.compared > 1000
        after, calm = killing.uninterrupted()
        assert after.scalars == calm.scalars
        for name, column in after.columns.items():
            np.testing.assert_array_equal(column, calm.columns[name])
        print(f"{findings.model.version} versions, {findings.compared} weights compared, recovery: {report.recovery}")
    finally:
        killing.close()


def test_twenty_kills(tmp_path: Path, zygote: Zygote, seed: int) -> None:
    durability = ("logged", "behind")[seed // len(RULES) % 2]  # the rule is drawn from the seed, too
    run(tmp_path, zygote, seed=seed, forced=2, regular=1, kills=20, durability=durability)


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["logged", "behind"])
def test_two_hundred_kills(tmp_path: Path, zygote: Zygote, seed: int, durability: str) -> None:
    run(tmp_path, zygote, seed=seed, forced=15, regular=5, kills=200, durability=durability)
