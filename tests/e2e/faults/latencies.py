"""How long one policy waits for what its server does for another, and how long a start and a stop take.

    python -m tests.e2e.faults.latencies

prints Markdown tables, in a few minutes. `--examples` and `--entries` make it shorter, `--repeats` more certain.
Whatever could slow a measurement down on the client's side runs in a process of its own.
"""

import argparse
import multiprocessing
import os
import platform
import queue
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

import grpc
import numpy as np

from equipoise import PolicyAdmin, PolicySpec
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.faults.calls import OWN_CONNECTION, patiently
from tests.e2e.faults.flow import Flow, steps_of
from tests.e2e.faults.gauges import calls_begun
from tests.e2e.faults.proxy import until
from tests.e2e.faults.zygote import ForkedServer, Zygote

ROWS = 64
PAUSE_S = 0.002
"""Between an answer and the next step."""
CALM_S = 2.0
LARGE_ROWS = 262_144
STREAMS = (0, 1, 200)
UNARY_CALLS = 150
SLOW = PolicySpec(name="slow", num_examples=1_000_000, rule="projected_gradient")
"""A policy whose steps cost the server some 40 ms."""

Operation = Callable[[PolicyServiceStub, int, int], None]
"""What is done to the large policies: the server, how many examples they have, and how often it was done before."""


class Stepper:
    """A trainer of a small policy, with one step in flight. Use as a context manager."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._messages: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        self._steps = steps_of(ROWS, high=1000)
        for step in self._steps:
            step.omit_weights = False
        self._sequence = 0

    def step(self) -> float:
        """Makes a step: seconds until its answer."""
        self._sequence += 1
        message = pb.ExchangeRequest(step=self._steps[self._sequence % len(self._steps)])
        message.step.sequence = self._sequence
        began = monotonic()
        self._messages.put(message)
        answer = next(self._answers).step
        took = monotonic() - began
        assert answer.outcome == pb.OUTCOME_APPLIED, answer
        return took

    def __enter__(self) -> "Stepper":
        self._channel = grpc.insecure_channel(self._address, options=OWN_CONNECTION)
        stub = PolicyServiceStub(self._channel)
        stub.CreatePolicy(pb.CreatePolicyRequest(policy=pb.PolicySpec(name="small", num_examples=1000)))
        opening = pb.OpenRequest(policy="small", trainer_id=f"stepper-{monotonic()}")
        self._messages.put(pb.ExchangeRequest(open=opening))
        self._answers: Any = stub.Exchange(iter(self._messages.get, None))
        assert next(self._answers).HasField("opened")
        return self

    def __exit__(self, *_: object) -> None:
        self._messages.put(None)
        for _ in self._answers:
            pass
        self._channel.close()


# What is done to the large policies.


def create(stub: PolicyServiceStub, examples: int, number: int) -> None:
    spec = pb.PolicySpec(name=f"large-{number}", num_examples=examples)
    patiently(lambda: stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec)))


def score(stub: PolicyServiceStub, examples: int, number: int) -> None:
    random = np.random.default_rng(number)
    step = pb.StepRequest(
        example_ids=random.integers(0, examples, LARGE_ROWS).astype("<u8").tobytes(),
        contributions=random.standard_normal(LARGE_ROWS).astype("<f4").tobytes(),
        omit_weights=True,
    )
    patiently(lambda: stub.UpdateWeights(pb.UpdateWeightsRequest(policy="large-0", step=step)))


def sample_with_replacement(stub: PolicyServiceStub, examples: int, number: int) -> None:
    del examples, number
    stub.SampleExamples(pb.SampleExamplesRequest(policy="large-0", count=ROWS, with_replacement=True))


def sample_without_replacement(stub: PolicyServiceStub, examples: int, number: int) -> None:
    del examples, number
    stub.SampleExamples(pb.SampleExamplesRequest(policy="large-0", count=ROWS, with_replacement=False))


def read(stub: PolicyServiceStub, examples: int, number: int) -> None:
    del examples, number
    drain(stub.ReadWeights(pb.ReadWeightsRequest(policy="large-0")))


def export(stub: PolicyServiceStub, examples: int, number: int) -> None:
    del examples, number
    drain(stub.ExportPolicy(pb.ExportPolicyRequest(policy="large-0")))


def fork(stub: PolicyServiceStub, examples: int, number: int) -> None:
    del examples
    request = pb.CreatePolicyRequest(policy=pb.PolicySpec(name=f"fork-{number}"), **{"from": "large-0"})
    patiently(lambda: stub.CreatePolicy(request))


def restore(stub: PolicyServiceStub, examples: int, number: int) -> None:
    del examples
    patiently(lambda: stub.GetPolicy(pb.GetPolicyRequest(policy=f"fork-{number}")))


def delete(stub: PolicyServiceStub, examples: int, number: int) -> None:
    del examples
    stub.DeletePolicy(pb.DeletePolicyRequest(policy=f"fork-{number}"))


def drain(messages: Iterator[object]) -> None:
    for _ in messages:
        pass


def carry_out(operation: Operation, address: str, examples: int, number: int) -> float:
    """Does something to a large policy, in another process than the steps are made in: seconds it took."""
    options = (("grpc.max_receive_message_length", -1),)
    with grpc.insecure_channel(address, options=options) as channel:
        began = monotonic()
        operation(PolicyServiceStub(channel), examples, number)
        return monotonic() - began


class Beside:
    """Measures the steps of a small policy while something is done to large ones.

    Args:
        stepper: makes the steps.
        others: where the rest is done.
        address: of the server.
        examples: of a large policy.
        repeats: how often each thing is done.
    """

    def __init__(
        self, stepper: Stepper, others: ProcessPoolExecutor, *, address: str, examples: int, repeats: int
    ) -> None:
        self._stepper = stepper
        self._others = others
        self._address = address
        self._examples = examples
        self._repeats = repeats

    def calm(self) -> list[str]:
        """A row of the table: nothing is done."""
        end = monotonic() + CALM_S
        return self._row("nothing", [(CALM_S, self._steps_while(lambda: monotonic() < end))])

    def measure(self, name: str, operation: Operation) -> list[str]:
        """A row of the table."""
        measured = []
        for number in range(self._repeats):
            doing = self._others.submit(carry_out, operation, self._address, self._examples, number)
            taken = self._steps_while(lambda: not doing.done())  # noqa: B023
            measured.append((doing.result(), taken))
        return self._row(name, measured)

    def _steps_while(self, goes_on: Callable[[], bool]) -> list[float]:
        taken = [self._stepper.step()]
        while goes_on():
            sleep(PAUSE_S)
            taken.append(self._stepper.step())
        return taken

    def _row(self, name: str, measured: list[tuple[float, list[float]]]) -> list[str]:
        worst = [max(taken) for _, taken in measured]
        every = [one for _, taken in measured for one in taken]
        lasted = median(seconds for seconds, _ in measured)
        return [name, ms(median(worst)), ms(max(worst)), ms(median(every)), str(len(every)), f"{lasted:.2f} s"]


def beside_large_policies(zygote: Zygote, directory: Path, *, examples: int, repeats: int) -> None:
    """Prints the table of a small policy's steps."""
    server = ForkedServer(zygote, directory)
    server.start()
    rows = []
    context = multiprocessing.get_context("spawn")  # a fork would take gRPC's threads for its own
    with ExitStack() as stack:
        stack.callback(server.kill)
        others = stack.enter_context(ProcessPoolExecutor(1, mp_context=context))
        others.submit(sleep, 0).result()  # its start is none of the measured
        facts: dict[str, Any] = {"address": server.address, "examples": examples, "repeats": repeats}
        with Stepper(server.address) as stepper:
            beside = Beside(stepper, others, **facts)
            rows.append(beside.calm())
            for name, operation in (
                ("created", create),
                (f"updated ({LARGE_ROWS} rows, some twice)", score),
                (f"sampled ({ROWS} with replacement)", sample_with_replacement),
                (f"sampled ({ROWS} without)", sample_without_replacement),
                ("read", read),
                ("exported", export),
                ("forked", fork),
            ):
                rows.append(beside.measure(name, operation))
        assert server.stop() == 0
        server.start()
        with Stepper(server.address) as stepper:
            beside = Beside(stepper, others, **facts)
            rows.append(beside.measure("restored from its pages", restore))
            rows.append(beside.measure("deleted", delete))
    show(
        f"Steps of another policy ({ROWS} rows, one in flight) while one of {examples / 1e6:g} M examples is …",
        ["what", f"worst step, median of {repeats}", "worst of all", "median step", "steps", "it took"],
        rows,
    )


def restarts(zygote: Zygote, directory: Path, *, entries: int, repeats: int) -> None:
    """Prints how long a killed server takes until a policy with a long log answers."""
    server = ForkedServer(zygote, directory)
    server.start()
    with ExitStack() as stack:
        stack.callback(server.kill)
        with PolicyAdmin(server.address) as admin:
            admin.create(PolicySpec(name="p", num_examples=1_000_000, durability="behind"))
            with Flow(server.address, steps_of(ROWS, high=1_000_000), in_flight=256) as flow:
                began = monotonic()
                flow.make(entries, within_s=600)
                rate = entries / (monotonic() - began)
            until(lambda: admin.get("p").durable_version == entries, within_s=300, what="every step is durable")
        serving, answering = [], []
        for _ in range(repeats):
            server.kill()
            began = monotonic()
            server.start()
            serving.append(monotonic() - began)
            with grpc.insecure_channel(server.address) as channel:
                get = PolicyServiceStub(channel).GetPolicy
                patiently(lambda: get(pb.GetPolicyRequest(policy="p")))  # noqa: B023
                answering.append(monotonic() - began)
                assert get(pb.GetPolicyRequest(policy="p")).status.version == entries
    show(
        f"Server and its Redis killed after {entries} steps of {ROWS} rows ({rate:.0f} a second), and started again",
        ["", f"median of {repeats}", "longest"],
        [
            ["the server serves after", f"{median(serving):.2f} s", f"{max(serving):.2f} s"],
            ["the policy answers after", f"{median(answering):.2f} s", f"{max(answering):.2f} s"],
        ],
    )


def stops(zygote: Zygote, directory: Path, *, repeats: int) -> None:
    """Prints how long a server takes from SIGTERM to its end."""
    rows = []
    for name, run in (
        *(
            (f"{count} stream{'s' * (count != 1)}", lambda server, count=count: stop_with_streams(server, count))
            for count in STREAMS
        ),
        (f"{UNARY_CALLS} unary calls, each of some 40 ms", stop_with_calls),
    ):
        taken = []
        for number in range(repeats):
            server = ForkedServer(zygote, directory / f"{len(rows)}-{number}")
            server.start()
            try:
                taken.append(run(server))
            finally:
                server.kill()
        rows.append([name, f"{median(taken):.2f} s", f"{max(taken):.2f} s"])
    show("From SIGTERM to the end of the process", ["with", f"median of {repeats}", "longest"], rows)


def stop_with_streams(server: ForkedServer, count: int) -> float:
    """Each stream has made a step and leaves when it is asked to, as our client's do."""
    with PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name="p", num_examples=1000))
    with ExitStack() as stack:
        steps = steps_of(ROWS, high=1000)
        for number in range(count):
            flow = stack.enter_context(Flow(server.address, steps, trainer_id=f"t{number}"))
            flow.make(1)
        return seconds_to_stop(server)


def stop_with_calls(server: ForkedServer) -> float:
    with PolicyAdmin(server.address) as admin:
        admin.create(SLOW)
    random = np.random.default_rng(0)
    step = pb.StepRequest(
        example_ids=random.choice(SLOW.num_examples, ROWS, replace=False).astype("<u8").tobytes(),
        contributions=random.standard_normal(ROWS).astype("<f4").tobytes(),
    )
    with grpc.insecure_channel(server.address) as channel:
        update = PolicyServiceStub(channel).UpdateWeights
        request = pb.UpdateWeightsRequest(policy=SLOW.name, step=step)
        calls = [update.future(request, timeout=120) for _ in range(UNARY_CALLS)]
        until(lambda: calls_begun(server, "UpdateWeights") == UNARY_CALLS, what="the calls are under way")
        until(lambda: any(call.done() for call in calls), what="the first is answered")
        took = seconds_to_stop(server)
        until(lambda: all(call.done() for call in calls), what="every call ends")
    return took


def seconds_to_stop(server: ForkedServer) -> float:
    began = monotonic()
    status = server.stop()
    took = monotonic() - began
    assert status == 0, f"exit status {status}:\n{server.log[-2000:]}"
    return took


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, and how busy the machine was meanwhile."""
    print(f"\n**{title}** (load average {os.getloadavg()[0]:.1f})\n")
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")
    sys.stdout.flush()


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def machine() -> str:
    """This machine, and how busy it is."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cpu = found[1] if found else platform.processor() or platform.machine()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return f"{date.today()}, {os.cpu_count()} cores ({cpu}), Python {platform.python_version()}, load average {load}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="latencies", description=__doc__)
    parser.add_argument("--examples", type=int, default=30_000_000, help="of a large policy")
    parser.add_argument("--entries", type=int, default=50_000, help="steps in the log at a restart")
    parser.add_argument("--repeats", type=int, default=3, help="how often each thing is measured")
    parser.add_argument("parts", nargs="*", default=["beside", "restarts", "stops"], help="which tables")
    options = parser.parse_args()
    print(machine())
    zygote = Zygote()
    try:
        # A short path: the server's Redis listens on a socket in it.
        with tempfile.TemporaryDirectory(prefix="latencies-") as directory:
            for part in options.parts:
                place = Path(directory) / part
                place.mkdir()
                if part == "beside":
                    beside_large_policies(zygote, place, examples=options.examples, repeats=options.repeats)
                elif part == "restarts":
                    restarts(zygote, place, entries=options.entries, repeats=options.repeats)
                elif part == "stops":
                    stops(zygote, place, repeats=options.repeats)
                else:
                    parser.error(f"{part!r} is none of beside, restarts, stops")
    finally:
        zygote.close()


if __name__ == "__main__":
    main()
