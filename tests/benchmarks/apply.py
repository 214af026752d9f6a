"""What `Policy.apply` costs on the CPU: the step, its log entry and its answer, without Redis and without gRPC.

    python -m tests.benchmarks.apply [--against TREE] [--rule ema_sign] [--rounds 15]

Each source tree has a process of its own, with one thread of torch, and they take turns: a ratio is the median over the
rounds of the older tree's time over this one's. Times are processor time, and the least of the rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

NUM_EXAMPLES = 1_000_000
ROWS = (64, 1024, 16_384)
STEPS = 64
"""Steps a round."""
KINDS = ("as one step comes", "behind others")
"""With evidence, and without: of steps that are taken together only the last one has it."""


def serve_rounds(rule_name: str) -> None:
    """Reads `rows kind` from stdin, line by line, and answers with microseconds of processor time an apply."""
    import numpy as np
    import torch

    from equipoise_server.engine import Durability, PolicySpec
    from equipoise_server.engine.policy import Policy
    from equipoise_server.engine.step import Kind, Step
    from equipoise_server.engine.trainers import Trainers
    from equipoise_server.rules import aggregate, build

    torch.set_num_threads(1)
    rule, rng = build(rule_name, {}), np.random.default_rng(0)
    spec = PolicySpec(
        name="p",
        num_examples=NUM_EXAMPLES,
        rule=rule_name,
        settings=dict(rule.settings),
        durability=Durability.LOGGED,
        reference_nats=None,
    )

    def step(rows: int) -> Step:
        ids = rng.choice(NUM_EXAMPLES, rows, replace=False)
        contributions, losses, references = rng.standard_normal((3, rows)).astype(np.float32)
        rho = "reference_losses" in rule.signals
        told = aggregate(ids, contributions, losses, reference_losses=references if rho else None)
        return Step(kind=Kind.STEP, statistics=told, weights_for=ids, num_rows=rows)

    steps = {rows: [step(rows) for _ in range(STEPS)] for rows in ROWS}
    state = rule.init(NUM_EXAMPLES, device=torch.device("cpu"))
    policy = Policy(spec, "u", rule=rule, state=state, trainers=Trainers(1e9, 1000))
    for line in sys.stdin:
        rows, kind = (int(word) for word in line.split())
        started = time.process_time()
        for each in steps[rows]:
            policy.apply(each, now=1.0, with_evidence=kind == 0)
        os.write(1, f"{1e6 * (time.process_time() - started) / STEPS}\n".encode())


class Worker:
    """A process that applies steps with the code of a source tree."""

    def __init__(self, tree: Path, rule: str) -> None:
        paths = os.pathsep.join(str(tree / part) for part in ("client", "server"))
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", "--rule", rule],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def round_us(self, rows: int, kind: int) -> float:
        """Microseconds of processor time an apply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{rows} {kind}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="source tree of the code to compare with")
    parser.add_argument("--rule", default="ema_sign")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve_rounds(options.rule)
        return
    here = Path(__file__).parents[2]
    trees = [here] if options.against is None else [here, options.against]
    workers = [Worker(tree, options.rule) for tree in trees]
    print(f"{options.rule}, N = {NUM_EXAMPLES:,}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}")
    print("| rows | | us an apply | ns a row | before, us | ratio |\n|---|---|---|---|---|---|")
    for rows in ROWS:
        for kind, what in enumerate(KINDS):
            for worker in workers:
                worker.round_us(rows, kind)  # the caches are warm then
            times = [[worker.round_us(rows, kind) for worker in workers] for _ in range(options.rounds)]
            least = [min(column) for column in zip(*times, strict=True)]
            ratio = statistics.median(each[-1] / each[0] for each in times)
            before = f"{least[-1]:.0f} | {ratio:.2f}" if len(workers) > 1 else " | "
            print(f"| {rows:,} | {what} | {least[0]:.0f} | {1e3 * least[0] / rows:.0f} | {before} |", flush=True)
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
