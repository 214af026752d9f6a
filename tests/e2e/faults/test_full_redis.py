"""Redis runs full while a sweep is due: what is called durable afterwards is what the next owner finds."""

from pathlib import Path
from time import sleep

import numpy as np
import pytest

from equipoise import PolicyAdmin, PolicySpec
from equipoise.archive import PolicyArchive
from equipoise_server.store import scripts
from tests.e2e.faults.flow import Flow, steps_of
from tests.e2e.faults.gauges import MIB, log_start
from tests.e2e.faults.house import House
from tests.e2e.faults.proxy import At, until
from tests.e2e.faults.zygote import ForkedServer

NUM_EXAMPLES = 2_000_000
"""31 pages of half a MiB, so that a sweep takes its time."""
ROWS = 8192
SWEEP_AFTER_STEPS = 250
"""Steps of 96 KiB whose log is longer than the tables of 15 MiB."""
SWEEPING = scripts.STAGE.sha.encode()


def durable(admin: PolicyAdmin) -> bool:
    status = admin.get("p")
    return status.durable_version == status.version


def exported(server: ForkedServer, path: Path) -> PolicyArchive:
    with PolicyAdmin(server.address) as admin:
        admin.export_policy("p", path)
    return PolicyArchive.load(path)


@pytest.mark.slow
def test_redis_full_during_a_sweep_leaves_nothing_out_of_later_sweeps(house: House, tmp_path: Path) -> None:
    """Data is visited in order, as by a curriculum: what a sweep wrote in vain, no later step touches again."""
    server, _ = house.serve(sweep_min_bytes=MIB, sweep_bytes_per_s=4 * MIB, max_backlog_bytes=4 * MIB)
    with PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name="p", num_examples=NUM_EXAMPLES, durability="behind"))
        with Flow(server.address, steps_of(ROWS, high=NUM_EXAMPLES)) as flow:
            with house.to_redis.trap(SWEEPING, At.REQUEST) as trap:
                flow.run()
                assert trap.caught.wait(120), "no sweep came"
                house.redis.command("CONFIG", "SET", "maxmemory", "1mb")
            sleep(2.0)  # the sweep tries again, and more steps come than the memory for the log holds
            flow.pause()
            house.redis.command("CONFIG", "SET", "maxmemory", 0)
            until(lambda: durable(admin), within_s=60, what=lambda: f"every step is durable; {server.log[-2000:]}")
            flow.steps = steps_of(ROWS, low=NUM_EXAMPLES // 2, high=NUM_EXAMPLES, seed=1)
            flow.make(20)
            flow.steps = steps_of(ROWS, high=NUM_EXAMPLES // 4, seed=2)
            began = flow.sent
            flow.make(SWEEP_AFTER_STEPS)
            until(lambda: log_start(house.redis, "p") > began, within_s=120, what="another sweep")
        until(lambda: durable(admin), within_s=60, what="every step is durable")
    before = exported(server, tmp_path / "p.npz")
    server.kill()
    server.start()
    after = exported(server, tmp_path / "p.npz")
    assert after.version == before.version == flow.sent
    assert after.scalars == before.scalars
    for name, column in before.columns.items():
        np.testing.assert_array_equal(after.columns[name], column, err_msg=name)
