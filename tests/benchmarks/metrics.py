"""What a scrape of `/metrics` costs: series, time to the answer, and time of the processor, by number of policies.

    python -m tests.benchmarks.metrics

The processor's time is that of the whole server, so it counts the answer and nothing that other programs do meanwhile.
"""

import statistics
import time
import urllib.request

import psutil
from rich.console import Console
from rich.table import Table

from equipoise import PolicyAdmin, PolicySpec
from equipoise.channel import Server
from equipoise.security import Security
from equipoise.testing import ServerProcess, serve
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub

POLICIES = (0, 9, 200, 1000)
SCRAPES = 40
NUM_EXAMPLES = 64


def filled(server: ServerProcess, count: int, *, there: int) -> None:
    """Makes policies number `there` to `count`, each with a step that tells all that a policy can show."""
    with PolicyAdmin(server.address) as admin, Server(server.address, Security()).channel() as channel:
        stub = PolicyServiceStub(channel)
        for number in range(there, count):
            name = f"policy-{number:04d}"
            admin.create(PolicySpec(name=name, num_examples=NUM_EXAMPLES, reference_nats=2.0))
            step = pb.StepRequest(
                all_examples=True, contributions=b"\0\0\x80\x3f" * NUM_EXAMPLES, target_loss=1.0, guard_loss=1.0
            )
            stub.UpdateWeights(pb.UpdateWeightsRequest(policy=name, step=step), timeout=30)


def scraped(server: ServerProcess) -> str:
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as page:
        text: str = page.read().decode()
    return text


def processor_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Prints the table."""
    table = Table("policies", "series", "answer, ms", "processor, ms", "idle processor, ms")
    with serve(policy_idle_s=3600) as server:
        assert server._process is not None
        process = psutil.Process(server._process.pid)
        there = 0
        for count in POLICIES:
            filled(server, count, there=there)
            there = count
            scraped(server)
            time.sleep(1.0)  # what the creation has left behind
            waits, before, started = [], processor_s(process), time.perf_counter()
            for _ in range(SCRAPES):
                begun = time.perf_counter()
                text = scraped(server)
                waits.append(time.perf_counter() - begun)
            used, seconds = processor_s(process) - before, time.perf_counter() - started
            before = processor_s(process)
            time.sleep(seconds)
            idle = processor_s(process) - before
            series = sum(not line.startswith("#") for line in text.splitlines())
            cost = (1000 * value / SCRAPES for value in (used - idle, idle))
            table.add_row(
                str(count), str(series), f"{1000 * statistics.median(waits):.1f}", *(f"{each:.1f}" for each in cost)
            )
    Console().print(table)


if __name__ == "__main__":
    main()
