"""Policies with long logs, written into Redis by the engine's and the store's own code: no server was asked."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from equipoise_server.engine import Durability, Kind, Policy, PolicySpec, Step
from equipoise_server.engine.trainers import Trainers
from equipoise_server.rules import build
from equipoise_server.store import LogEntry, RedisStore, StoredPolicy, checksum, seal
from tests.e2e.faults.history import Sent

EARLIER = "earlier"
"""The trainer that has made the steps."""
ROWS = 2
PATIENCE_S = 60.0
"""With Redis: many appends in a row wait for a slow disk."""


def small_steps(count: int, *, num_examples: int, seed: int = 0) -> list[Sent]:
    """So many steps of few rows."""
    random = np.random.default_rng(seed)
    return [
        Sent(
            ids=random.integers(0, num_examples, ROWS),
            contributions=random.standard_normal(ROWS).astype(np.float32),
            losses=random.random(ROWS).astype(np.float32),
        )
        for _ in range(count)
    ]


def write_policies(url: str, names: Sequence[str], *, rule: str, num_examples: int, steps: Sequence[Sent]) -> None:
    """Creates policies that no server owns, each with the same log of steps that no sweep has shortened."""
    spec = PolicySpec(
        name="",
        num_examples=num_examples,
        rule=rule,
        settings=build(rule, {}).settings,
        durability=Durability.LOGGED,
        reference_nats=None,
    )
    asyncio.run(_write(url, names, spec, _logged(spec, steps)))


def _logged(spec: PolicySpec, steps: Sequence[Sent]) -> list[LogEntry]:
    """The entries that a server writes of steps."""
    rule = build(spec.rule, spec.settings)
    state = rule.init(spec.num_examples, device=torch.device("cpu"))
    policy = Policy(spec, "", rule=rule, state=state, trainers=Trainers(idle_s=1e9, max_known=1))
    entries: list[LogEntry] = []
    for sequence, sent in enumerate(steps, start=1):
        step = Step(
            kind=Kind.STEP, trainer_id=EARLIER, sequence=sequence, statistics=sent.statistics, wants_weights=False
        )
        entry = policy.apply(step, now=time.time()).entry
        assert entry is not None
        entries.append(seal(entry, after=checksum(entries[-1]) if entries else 0))
    return entries


async def _write(url: str, names: Sequence[str], spec: PolicySpec, entries: Sequence[LogEntry]) -> None:
    store = RedisStore.connect(url, command_timeout_s=PATIENCE_S)
    for name in names:
        text = replace(spec, name=name).to_json()
        stored = StoredPolicy(name=name, uid=secrets.token_hex(16), create_time=time.time(), spec=text)
        await store.create(stored)
        owner = await store.acquire(name, address="127.0.0.1:1")
        await store.append(owner, entries)
        await store.release(owner)
    await store.close()
