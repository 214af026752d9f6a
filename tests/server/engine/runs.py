"""Runs of made-up trainers for engine tests."""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from equipoise_server.engine import (
    Answer,
    Durability,
    Engine,
    Header,
    Kind,
    Policy,
    PolicyRunner,
    PolicySpec,
    Step,
    tables,
)
from equipoise_server.rules import aggregate, build, exhaust
from equipoise_server.store import LogEntry

PAGE = 65_536


async def until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds. Raises TimeoutError after a minute."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def spec(
    name: str = "policy", *, num_examples: int = 2 * PAGE + 100, rule: str = "ema_sign",
    durability: Durability = Durability.LOGGED,
) -> PolicySpec:  # fmt: skip
    settings = dict(build(rule, {}).settings)
    return PolicySpec(
        name=name, num_examples=num_examples, rule=rule, settings=settings, durability=durability, reference_nats=2.0
    )


def steps(
    num_examples: int, *, rule: str = "", seed: int = 0, batch: int = 200, trainer_id: str = "trainer", first: int = 1
) -> Iterator[Step]:
    """An endless run of one trainer: random ids (some repeated), contributions, losses and reference losses.

    Guard losses come with two of three steps, up and down, so that the guard has trials to judge. For a `rule` that
    reads successes of attempts there are these, and nothing else.
    """
    of_attempts = bool(rule) and "attempts" in build(rule, {}).signals
    random, reference_random = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    for sequence in itertools.count(first):
        ids = random.integers(0, num_examples, batch)
        if of_attempts:
            tried = random.integers(1, 9, batch)
            statistics = aggregate(ids, successes=random.binomial(tried, 0.5), attempts=tried)
        else:
            statistics = aggregate(
                ids,
                contributions=(random.standard_normal(batch) + 0.3 * np.sin(ids)).astype(np.float32),
                losses=random.random(batch).astype(np.float32),
                scored=None,
                reference_losses=reference_random.random(batch).astype(np.float32),
            )
        yield Step(
            kind=Kind.STEP,
            trainer_id=trainer_id,
            sequence=sequence,
            training_step=sequence,
            statistics=statistics,
            target_loss=1.0 / sequence,
            guard_loss=2.0 + float(np.sin(sequence)) if sequence % 3 else None,
            weights_for=ids,
            num_rows=batch,
        )


async def send(runner: PolicyRunner, step: Step) -> Answer:
    return await (await runner.submit(step))


@dataclass(frozen=True)
class Whole:
    """All of a policy at one version."""

    columns: Mapping[str, bytes]
    header: Header


def whole(policy: Policy) -> Whole:
    columns = {name: tables.to_bytes(column) for name, column in policy.state.columns.items()}
    return Whole(columns, policy.header)


async def everything(runner: PolicyRunner) -> Whole:
    return await runner.read(whole)


def apply(policy: Policy, step: Step, *, now: float, with_evidence: bool = True) -> tuple[Answer, LogEntry | None]:
    taken = policy.apply(step, now=now, with_evidence=with_evidence)
    return taken.answer, taken.entry


def replay(policy: Policy, *entries: LogEntry) -> None:
    exhaust(policy.replay(entries))


def restore(policy: Policy, header: Header, versions: Mapping[int, int]) -> None:
    exhaust(policy.load(header, versions))


async def fork(engine: Engine, source: PolicyRunner, of: PolicySpec) -> None:
    """Makes a policy with the tables of another one."""
    async with source.snapshot() as snapshot:
        await engine.create_from(of, snapshot.header, source.pages(snapshot, version=0))
