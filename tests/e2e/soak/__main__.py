"""A long run under faults that looks for what keeps growing.

    python -m tests.e2e.soak --minutes 30

Three servers, each with trainers that stay and trainers that come and go, half of them by SIGKILL. One server is killed
and started again every 40 s or so; the others live on: the Redis of one is paused now and then, that of the other is 0,
2 or 20 ms away in turn, while one of its trainers makes large steps in bursts. Ends with a table of samples and of what
grew; the exit status is 1 when something did, or a trainer missed a step.
"""

import argparse
import random
import secrets
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep

from rich.console import Console
from rich.table import Table

from equipoise.testing import serve
from tests.e2e.faults.proxy import FaultProxy
from tests.e2e.faults.redis_server import RedisServer
from tests.e2e.soak.scene import Distant, Killed, Sample, Scene, Steady
from tests.e2e.soak.verdict import BOUNDS, Verdict, judge

WARM_UP = 0.15
"""Share of the time before the first sample: caches fill, logs reach their first sweep."""
SAMPLE_EVERY_S = 2.0
SETTINGS = {"sweep_min_bytes": 1 << 20, "trainer_idle_s": 60.0, "policy_idle_s": 20.0, "device": "cpu"}
"""What comes and goes does so within a minute: longer than a restart, after which trainers are to be known still."""


def soak(minutes: float, *, seed: int) -> tuple[dict[str, list[Sample]], list[str], dict[str, int]]:
    """Runs for so long: samples by scene, complaints, and how often what was done."""
    chance = random.Random(seed)
    taken: dict[str, list[Sample]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="equipoise-soak-")))
        shared = RedisServer(directory, appendonly="no")  # its file would hold all that was ever written
        shared.start()
        stack.callback(shared.kill)
        to_redis = stack.enter_context(FaultProxy(("127.0.0.1", shared.port)))
        steady, killed, distant = (
            stack.enter_context(serve(**SETTINGS, **more))
            for more in ({}, {}, {"redis_url": f"redis://{to_redis.address}"})
        )
        scenes: list[Scene] = [
            Steady(steady, chance=chance),
            Killed(killed, chance=chance),
            Distant(distant, redis=shared, to_redis=to_redis, chance=chance),
        ]
        start = monotonic()
        due = start + WARM_UP * minutes * 60
        while monotonic() < start + minutes * 60:
            for scene in scenes:
                scene.act()
            if monotonic() >= due:
                due = monotonic() + SAMPLE_EVERY_S
                for scene in scenes:
                    if sample := scene.sample():
                        taken.setdefault(scene.name, []).append({"minute": (monotonic() - start) / 60, **sample})
            sleep(0.1)
        for scene in scenes:
            scene.stop()
    counts = {f"{scene.name}: {what}": count for scene in scenes for what, count in scene.counts.items()}
    return taken, [complaint for scene in scenes for complaint in scene.complaints], counts


def verdicts(samples: Sequence[Sample]) -> list[Verdict]:
    """One for each series."""
    return [judge(name, [sample[name] for sample in samples], bound) for name, bound in BOUNDS.items()]


def show(name: str, samples: Sequence[Sample], judged: Sequence[Verdict], console: Console) -> None:
    """A table of a dozen samples, and the verdict under each column."""
    table = Table("minute", *BOUNDS, title=f"{name} server, {len(samples)} samples")
    for sample in samples[:: max(1, len(samples) // 12)]:
        table.add_row(f"{sample['minute']:.1f}", *(f"{sample[column]:,.0f}" for column in BOUNDS))
    table.add_section()
    for label, values in (
        ("first third", [one.first for one in judged]),
        ("last third", [one.last for one in judged]),
        ("at most", [one.most for one in judged]),
    ):
        table.add_row(label, *(f"{value:,.1f}" for value in values))
    table.add_row("", *("GROWS" if one.grows else "ok" for one in judged))
    console.print(table)


def main() -> int:
    """Runs the soak; returns the exit status."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    options = parser.parse_args()
    console = Console(width=150)
    console.print(f"seed {options.seed}; {options.minutes:g} minutes")
    taken, complaints, counts = soak(options.minutes, seed=options.seed)
    grown = []
    for name, samples in taken.items():
        judged = verdicts(samples)
        show(name, samples, judged, console)
        grown += [f"{name}: {one.name} grew from {one.first:,.1f} to {one.last:,.1f}" for one in judged if one.grows]
    console.print(", ".join(f"{what} {count}" for what, count in counts.items()))
    for problem in (*grown, *complaints):
        console.print(problem, style="red")
    return 1 if grown or complaints else 0


if __name__ == "__main__":
    sys.exit(main())
