"""Alerts driven by what they are for: real faults in a real world, whose waits ("for") are cut to a second."""

import os
import signal
from collections.abc import Callable, Iterator
from json import loads

import pytest
from psutil import Process

from equipoise import PolicyClient, Security
from equipoise.errors import AccessDeniedError
from equipoise_server.processes.child import MODULE
from tests.deploy.prometheus import queried, until
from tests.deploy.scene import Scene, scene
from tests.deploy.training import COLLAPSED

pytestmark = pytest.mark.slow

PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("faults"), hurries=True) as found:
        yield found


@pytest.fixture
def fires(world: Scene) -> Callable[..., None]:
    """Waits until an alert with these labels fires."""

    def wait(alert: str, **labels: str) -> None:
        matchers = ",".join(f'{name}="{value}"' for name, value in {"alertname": alert, **labels}.items())
        query = f'ALERTS{{alertstate="firing",{matchers}}}'
        until(lambda: queried(world.prometheus, query), query, patience_s=PATIENCE_S)

    return wait


def firing(world: Scene) -> set[str]:
    found = queried(world.prometheus, 'ALERTS{alertstate="firing"}')
    return {each["metric"]["alertname"] for each in found}


def test_what_is_wrong_from_the_start_is_all_that_fires(world: Scene, fires: Callable[..., None]) -> None:
    """A certificate that ends tomorrow, and a policy of which one row in 64 has all the weight."""
    fires("EquipoiseCertificateEnds", severity="critical", instance=world.guarded.metrics_address)
    fires("EquipoiseWeightCollapse", policy=COLLAPSED.policy, kind="batch")
    allowed = {"EquipoiseCertificateEnds", "EquipoiseWeightCollapse", "EquipoiseGuardEngaged"}
    assert firing(world) <= allowed


def test_a_job_that_sends_nan(world: Scene, fires: Callable[..., None]) -> None:
    world.misbehave()
    fires("EquipoiseNonFiniteStatistics")


def test_callers_without_a_valid_token(world: Scene, fires: Callable[..., None]) -> None:
    stranger = Security(root_certificates=world.authority.file, token="equipoise_nobody")
    with PolicyClient(world.guarded.address, policy="vision-1", security=stranger) as client:
        for _ in range(100):
            with pytest.raises(AccessDeniedError):
                client.status()
    fires("EquipoiseAuthFailures", reason="TOKEN_INVALID")


def test_a_tokens_file_that_cannot_be_read(world: Scene, fires: Callable[..., None]) -> None:
    good = world.tokens.read_text()
    world.tokens.write_text("[tenants")
    fires("EquipoiseReloadFails", file="tokens")
    world.tokens.write_text(good)


def test_the_own_redis_is_killed(world: Scene, fires: Callable[..., None]) -> None:
    lock = world.guarded.data_dir / "equipoise.lock"
    os.kill(int(loads(lock.read_text())["redis_pid"]), signal.SIGKILL)
    fires("EquipoiseOwnRedisEnds", instance=world.guarded.metrics_address)


def test_a_process_of_several_that_is_killed(world: Scene, fires: Callable[..., None]) -> None:
    process, _ = (each for each in Process(world.guarded.pid).children() if MODULE in each.cmdline())
    process.kill()
    fires("EquipoiseProcessEnds", instance=world.guarded.metrics_address)


def test_a_redis_that_is_full(world: Scene, fires: Callable[..., None]) -> None:
    world.redis.command("CONFIG", "SET", "maxmemory", 1)
    fires("EquipoiseRedisFull")
    world.redis.command("CONFIG", "SET", "maxmemory", 0)


def test_a_redis_that_stands_still(world: Scene, fires: Callable[..., None]) -> None:
    with world.redis.paused():
        fires("EquipoiseRedisDown", instance=world.servers[0].metrics_address)
        fires("EquipoiseRedisErrors", kind="timeout")
        fires("EquipoiseDurabilityLags")
    until(lambda: "EquipoiseDurabilityLags" not in firing(world), "what was missing is written", patience_s=PATIENCE_S)


def test_a_server_that_hangs(world: Scene, fires: Callable[..., None]) -> None:
    """Trainers that were served by it go on with older weights until the other one has its policies."""
    hung = world.servers[0]
    hung.pause()
    try:
        fires("EquipoiseServerDown", instance=hung.metrics_address)
        fires("EquipoiseTrainersFallBack")
    finally:
        hung.resume()


def test_a_server_whose_redis_is_not_there(world: Scene, fires: Callable[..., None]) -> None:
    world.redis.kill()
    world.servers[1].kill()
    world.servers[1].launch()
    fires("EquipoiseNotReady", instance=world.servers[1].metrics_address)
    world.redis.start()
    until(lambda: "EquipoiseNotReady" not in firing(world), "it is ready", patience_s=PATIENCE_S)


def test_prometheus_without_servers(world: Scene, fires: Callable[..., None]) -> None:
    for server in (*world.servers, world.guarded):
        server.kill()
    fires("EquipoiseServerDown", instance=world.guarded.metrics_address)
    fires("EquipoiseAbsent")
