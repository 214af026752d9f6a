"""The faults of a kill run, and in which order they come."""

from enum import Enum

import numpy as np


class Fault(Enum):
    """What a round does."""

    BEFORE_APPEND = "server killed before its append reaches Redis"
    BEFORE_REPLY = "server killed after its append, before Redis's reply"
    BEFORE_ACKNOWLEDGEMENT = "server killed after Redis's reply, before the trainer's answer"
    IN_SWEEP = "server killed in a sweep"
    IN_RESTORE = "server killed in a restore"
    ANY_TIME = "server killed at any time"
    PAUSE = "server paused"
    PAUSE_AND_KILL = "server paused, then killed"
    REDIS_PAUSED = "Redis paused"
    REDIS_KILLED = "Redis killed"
    BOTH_KILLED = "server and Redis killed together"
    TRAINERS_CUT = "connections of trainers reset"
    REDIS_CUT = "connections to Redis reset"
    REDIS_HALF_OPEN = "connections to Redis black-holed"
    TRAINER_RESTARTED = "a trainer starts again from its checkpoint"
    REDIS_SLOW = "Redis 20 ms away for a while"
    REDIS_FULL = "Redis full while a sweep is due"
    STOPPED = "server stopped in order (SIGTERM) and started again"
    STOPPED_ALONE = "server stopped in order while no stream is open"


KILLS_AND_PAUSES = (*list(Fault)[:11],)
FORCED = (*list(Fault)[:5],)
"""Failpoints: each is forced a given number of times."""
REGULAR = (Fault.REDIS_SLOW, Fault.REDIS_FULL, Fault.STOPPED, Fault.STOPPED_ALONE)
"""These take their time, or come without a kill: each comes a given number of times, and is not drawn beyond that."""


def draw_schedule(seed: int, *, forced: int, regular: int, kills: int) -> list[Fault]:
    """Rounds in random order: so many of each failpoint and regular fault, `kills` kills and pauses, and others."""
    random = np.random.default_rng(seed)
    schedule = [fault for fault in FORCED for _ in range(forced)] + [fault for fault in REGULAR for _ in range(regular)]
    others = [fault for fault in Fault if fault not in (*FORCED, *REGULAR)]
    while sum(fault in KILLS_AND_PAUSES for fault in schedule) < kills:
        schedule.append(others[random.integers(len(others))])
    random.shuffle(schedule)  # type: ignore[arg-type]  # a list is shuffled in place too
    return schedule
