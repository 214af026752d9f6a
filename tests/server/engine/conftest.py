"""Engines on a real Redis: each test has a Redis of its own, so that it may stop, flush or stall it."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from equipoise_server.engine import Device, Engine, EngineLimits, NoTelemetry, Telemetry
from equipoise_server.errors import draining
from equipoise_server.store import EmbeddedRedis, RedisStore

LIMITS = EngineLimits(
    trainer_idle_s=86_400.0,
    max_trainers=10_000,
    max_queued_steps=64,
    max_queued_bytes=1 << 24,
    log_timeout_s=60.0,  # an answer is durable, however slow the machine is
    max_backlog_bytes=1 << 28,
    max_backlogs_bytes=1 << 32,
    sweep_min_bytes=1 << 40,
    sweep_bytes_per_s=1e12,
    max_replay_s=1e9,
    load_wait_s=30.0,
)


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    embedded = EmbeddedRedis(tmp_path / "redis")
    await embedded.start()
    yield embedded
    await embedded.stop()


@dataclass(frozen=True)
class Servers:
    """Makes engines that share the test's Redis, each like a server process of its own."""

    make: Callable[..., Awaitable[Engine]]


@pytest.fixture
async def servers(redis: EmbeddedRedis) -> AsyncIterator[Servers]:
    made: list[tuple[Engine, Device, RedisStore]] = []

    async def make(
        address: str = "127.0.0.1:1",
        *,
        instance: str = "",
        spreads: bool = False,
        wall_clock: Callable[[], float] = time.time,
        store: RedisStore | None = None,
        telemetry: Telemetry | None = None,
        **limits: float,
    ) -> Engine:
        store = store or RedisStore.connect(redis.url)
        device = Device(torch.device("cpu"))
        engine = Engine(
            store,
            device,
            address=address,
            limits=replace(LIMITS, **limits),
            telemetry=telemetry or NoTelemetry(),
            instance=instance,
            spreads=spreads,
            wall_clock=wall_clock,
        )
        made.append((engine, device, store))
        return engine

    yield Servers(make)
    for engine, device, store in made:
        await engine.close(draining(), flush_timeout_s=0.0)
        device.close()
        await store.close()
