"""Servers restart one after another, behind proxies and without: no step fails, and none is lost."""

from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import pytest
import yaml

from tests.deploy.proxies import Before, envoy_before, haproxy_before, running
from tests.deploy.rendered import CHART
from tests.e2e.faults.figures import record, seconds
from tests.e2e.faults.fleet import Fleet
from tests.e2e.faults.zygote import Zygote
from tests.ports import free_port

SERVERS, TRAINERS, LOGGED_STEPS = 3, 8, 50_000
DRAIN_DELAY_S = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["settings"]["drain_delay_s"]


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, envoy_before, haproxy_before], ids=["directly", "envoy", "haproxy"])
def test_no_step_fails_or_is_lost_while_every_server_restarts(
    before: Before | None, tmp_path: Path, zygote: Zygote
) -> None:
    """Each policy has a log of 50,000 steps that was never swept; the servers are set as in the chart."""
    settings = {"spread_policies": before is None, "drain_delay_s": DRAIN_DELAY_S}
    with (
        Fleet(tmp_path, zygote, policies=TRAINERS, logged_steps=LOGGED_STEPS, **settings) as fleet,
        ExitStack() as stack,
    ):
        for _ in range(SERVERS):
            fleet.serve()
        address = ",".join(server.address for server in fleet.servers)
        if before is not None:
            listen = free_port()
            command = before(fleet.servers, tmp_path, listen)
            address = stack.enter_context(running(command, fleet.servers, tmp_path, listen))
        fleet.train(address)
        stale: list[float] = []
        for server in fleet.servers:
            began = monotonic()
            assert server.stop() == 0
            fleet.wait_until_served()  # by the others: a pod takes longer to come back than a process
            fleet.start(server)
            fleet.wait_until_served()
            stale.append(fleet.longest_stale_s(began))
        seen = fleet.finish()
    way = "directly" if before is None else f"behind {before.__name__.removesuffix('_before')}"
    record(
        f"rolling restart of {SERVERS} servers, trainers reach them {way}; {TRAINERS} policies with logs of"
        f" {LOGGED_STEPS:,} steps",
        promise="no failed step, no acknowledged one lost, stale weights for 2 s at most",
        recovered="longest time without an answer, by restart: " + ", ".join(map(seconds, stale)),
        trainer=seen,
    )
