"""Bounds of the engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of the engine and of each policy in service.

    Attributes:
        trainer_idle_s: a trainer idle for longer is forgotten.
        max_trainers: most trainers known of one policy.
        max_queued_steps: most steps that wait for one policy.
        max_queued_bytes: most bytes of them.
        log_timeout_s: how long an answer waits for the log.
        max_backlog_bytes: memory for log entries of one policy.
        max_backlogs_bytes: memory for log entries of all policies.
        sweep_min_bytes: a log smaller than this is not swept for its size.
        sweep_bytes_per_s: pages are written no faster than this, so that appends go first.
        max_replay_s: a log whose replay would take longer is swept.
        load_wait_s: how long a caller waits for a policy that is being loaded.
    """

    trainer_idle_s: float
    max_trainers: int
    max_queued_steps: int
    max_queued_bytes: int
    log_timeout_s: float
    max_backlog_bytes: int
    max_backlogs_bytes: int
    sweep_min_bytes: int
    sweep_bytes_per_s: float
    max_replay_s: float = 2.5
    load_wait_s: float = 3.0
