"""What becomes of Redis, and that training does not stop for it: no step is lost, and one waits a moment longer."""

import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import numpy as np
import pytest

from equipoise import PolicyClient, Timeout
from tests.e2e.faults.aftermath import assert_all_is_well
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.house import House
from tests.e2e.faults.training import Training

ADDED_S = 0.3
"""Most that an outage of Redis adds to one step."""
LASTS_S = 3.0
"""An outage: a step that waited for its end is seen, however busy the machine is."""
CALM_S = 1.5
PATIENT = Timeout(step=10.0)
"""A step that the server does not answer for so long because Redis is away is a fault, on every machine."""


def refuse(house: House) -> None:
    house.to_redis.refuse()
    house.to_redis.reset()


def stall(house: House) -> None:
    os.kill(house.redis.pid, signal.SIGSTOP)


def wake(house: House) -> None:
    os.kill(house.redis.pid, signal.SIGCONT)


def roll_back(house: House) -> None:
    """Ends Redis and takes the last tenth of its file away, as a lost disk cache does."""
    house.redis.kill()
    file = house.redis.append_only_file
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size * 9 // 10)


def configure(*words: str | int) -> Callable[[House], None]:
    return lambda house: house.redis.command(*words)


FAULTS: dict[str, tuple[Callable[[House], None], Callable[[House], None]]] = {
    "Redis refuses connections": (refuse, lambda house: house.to_redis.accept()),
    "Redis is stalled (SIGSTOP)": (stall, wake),
    "Redis is half-open (black hole)": (lambda house: house.to_redis.hold(), lambda house: house.to_redis.release()),
    "Redis is killed and restarted": (lambda house: house.redis.kill(), lambda house: house.redis.start()),
    "Redis is out of memory (noeviction)": (
        configure("CONFIG", "SET", "maxmemory", "1mb"), configure("CONFIG", "SET", "maxmemory", 0),
    ),
    "Redis is read-only": (configure("REPLICAOF", "127.0.0.1", 1), configure("REPLICAOF", "NO", "ONE")),
    "Redis is flushed": (configure("FLUSHALL"), lambda house: None),
    "Redis is rolled back": (roll_back, lambda house: house.redis.start()),
}  # fmt: skip


QUICK = ("Redis is stalled (SIGSTOP)", "Redis is rolled back")


@pytest.mark.parametrize(
    "fault", [fault if fault in QUICK else pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS]
)
def test_training_goes_on_without_redis(house: House, tmp_path: Path, fault: str) -> None:
    begin, end = FAULTS[fault]
    with Training(house.address, timeout=PATIENT) as training:
        training.wait_until_durable()
        calm_from = monotonic()
        sleep(CALM_S)
        began = monotonic()
        begin(house)
        sleep(LASTS_S)
        ended = monotonic()
        end(house)
        recovered = training.wait_until_durable()
        calm, seen = training.until(calm_from, began), training.since(began)
        noticed = training.first_not_durable(began)
    assert seen.unserved == 0
    assert seen.longest_step_s < LASTS_S / 2 + calm.longest_step_s
    assert_waits_seldom(training, calm_from, began, ended)
    assert_all_is_well(training, house.address, tmp_path)
    assert_redis_has_it_all(house, training.client.policy)
    record(
        fault,
        promise=f"training goes on; at most {ADDED_S} s more for one step, once; nothing is lost",
        noticed=seconds(noticed),
        recovered=seconds(recovered),
        trainer=f"{seen}; without: {calm.longest_step_s:.2f} s",
    )


def assert_waits_seldom(training: Training, calm_from: float, began: float, ended: float) -> None:
    """One step waits for the log in vain, and those after it do not: all but those that a busy machine holds up."""

    def waited(since: float, until: float) -> list[bool]:
        return [made.seconds > 0.2 for made in training.made if since < made.at + made.seconds and made.at < until]

    calm, during = waited(calm_from, began), waited(began, ended)
    assert sum(during) <= max(2, len(during) * (0.05 + 2 * np.mean(calm)))


def assert_redis_has_it_all(house: House, policy: str) -> None:
    """What a new server finds in Redis is what the old one had."""
    with PolicyClient(house.server.address, policy=policy, when_lost="wait") as client:
        assert client.flush(30, durable=True)
        before, version = client.read_weights(), client.status().version
        house.server.kill()
        house.server.start()
        client.read([0])  # waits until the server is found again
        np.testing.assert_array_equal(client.read_weights(), before)
        assert client.status().version == version


@pytest.mark.slow
def test_a_stalled_redis_does_not_hold_up_the_event_loop(house: House) -> None:
    with Training(house.address) as training:
        training.wait_until_durable()
        calm = lag_during(house, lambda: sleep(4))
        stall(house)
        try:
            stalled = lag_during(house, lambda: sleep(4))
        finally:
            wake(house)
    assert stalled.p90 < max(0.25, 2 * calm.p90)  # the timeout of a command, which nothing may wait out there
    record(
        "event loop while Redis is stalled",
        promise="no blocking: p99 of its lag as in a control run",
        noticed="",
        recovered="",
        trainer=f"p99 of the lag ≤ {seconds(stalled.p99)}, control ≤ {seconds(calm.p99)} (bounds of histogram buckets)",
    )


class Lag(NamedTuple):
    """Of the event loop: quantiles as the upper bounds of their buckets, seconds."""

    p90: float
    p99: float


def lag_during(house: House, wait: Callable[[], None]) -> Lag:
    """The event loop's lag meanwhile."""
    before = lag_buckets(house)
    wait()
    counts = {bound: count - before[bound] for bound, count in lag_buckets(house).items()}
    total = max(counts.values())
    assert total > 10
    return Lag(*(min(bound for bound, count in counts.items() if count >= share * total) for share in (0.9, 0.99)))


def lag_buckets(house: House) -> dict[float, float]:
    with urllib.request.urlopen(f"http://{house.server.metrics_address}/metrics", timeout=60) as page:
        text = page.read().decode()
    found = re.findall(r'event_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', text)
    return {float(bound): float(count) for bound, count in found}


@pytest.mark.slow
def test_a_full_disk_under_redis(tmp_path: Path, house: House) -> None:
    """Redis cannot write its file: it refuses writes until there is room, and nothing is lost."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=4m none {disk} 2>/dev/null"):
        pytest.skip("a small file system can be mounted by root alone")
    try:
        server, before = house.serve(own_redis=True, data_dir=disk / "data")
        with Training(before.address, timeout=PATIENT) as training:
            training.wait_until_durable()
            began = monotonic()
            fill(disk)
            sleep(LASTS_S)
            noticed = training.first_not_durable(began)
            (disk / "filler").unlink()
            recovered = training.wait_until_durable()
            seen = training.since(began)
        assert noticed is not None, "the disk was not full"
        assert_all_is_well(training, before.address, tmp_path)
        server.kill()
    finally:
        os.system(f"umount -l {disk}")
        shutil.rmtree(disk, ignore_errors=True)
    record(
        "disk full under the server's own Redis",
        promise="as read-only: training goes on, nothing is lost",
        noticed=seconds(noticed),
        recovered=seconds(recovered),
        trainer=str(seen),
    )


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"x" * 4096)
        except OSError:
            return
