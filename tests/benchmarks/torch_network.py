"""Time that a training step spends in client calls when the server is far away.

    python -m tests.benchmarks.torch_network [--steps 60] [--delay-ms 50] [--threads 1]

The model and the step are those of `torch_cost`, with contributions by `ghost`, a target direction every 10 steps, and
AdamW. A proxy delays every byte by the given time in each direction, so that a round trip takes twice as long. Three
loops take turns, step by step: without a client; with `weights` and `submit`, which never wait; with `step`, which
waits, for comparison.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from equipoise import PolicyClient, Timeout
from equipoise.testing import serve
from equipoise.torch import GhostContributions, TargetDirection, weighted_mean
from tests.benchmarks.torch_cost import BATCH, LENGTH, REFRESH_EVERY, VOCABULARY, SmallGPT, keep_memory, losses_of
from tests.delay_proxy import delayed

NUM_EXAMPLES = 100_000
GOAL = 0.02
WARM_UP = 5


class Loop:
    """A training loop that measures how long its steps take, and how much of that its client calls."""

    def __init__(self, client: PolicyClient | None, *, waits: bool = False) -> None:
        torch.manual_seed(0)
        self.client, self.waits = client, waits
        self.model = SmallGPT()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.tokens, targets = (torch.randint(VOCABULARY, (BATCH, LENGTH)) for _ in range(2))
        direction = TargetDirection(self.model, losses_of, [targets], refresh_every=REFRESH_EVERY)
        self.contributions = GhostContributions(self.model, direction, shared=["positions"])
        self.random = np.random.default_rng(0)
        self.next_ids = self.ids()
        self.steps: list[float] = []
        self.blocked: list[float] = []
        self._blocked = 0.0

    def ids(self) -> Any:
        """A batch of ids."""
        return self.random.integers(NUM_EXAMPLES, size=BATCH)

    def step(self) -> None:
        """One training step."""
        start, self._blocked = perf_counter(), 0.0
        ids, self.next_ids = self.next_ids, self.ids()
        weights = self.call(lambda client: client.weights(ids)) if self.client else np.ones(BATCH, np.float32)
        with self.contributions.capture(ids) as capture:
            losses = capture.losses(self.tokens)
            weighted_mean(losses, weights).backward()
        fields = capture.fields()
        if self.client and self.waits:
            self.call(lambda client: client.step(ids, weights_for=self.next_ids, **fields))
        elif self.client:
            self.call(lambda client: client.submit(ids, weights_for=self.next_ids, **fields))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps.append(perf_counter() - start)
        self.blocked.append(self._blocked)

    def call(self, ask: Callable[[PolicyClient], Any]) -> Any:
        """A client call, and how long it took."""
        assert self.client is not None
        start = perf_counter()
        answer = ask(self.client)
        self._blocked += perf_counter() - start
        return answer

    def result(self) -> dict[str, float]:
        """Medians and shares after warming up."""
        steps, blocked = self.steps[WARM_UP:], self.blocked[WARM_UP:]
        return {
            "first_call_ms": round(1e3 * self.blocked[0], 3),
            "step_ms": round(1e3 * median(steps), 1),
            "blocked_ms_median": round(1e3 * median(blocked), 3),
            "blocked_ms_worst": round(1e3 * max(blocked), 3),
            "blocked_share": round(sum(blocked) / sum(steps), 5),
        }


@contextmanager
def loops(one_way_s: float) -> Iterator[dict[str, Loop]]:
    """The loops, with a server behind a far network."""
    patient = Timeout(step=10.0, connect=10.0)
    with (
        serve() as server,
        delayed(server.address, one_way_s=one_way_s) as far,
        PolicyClient(far, policy="submit", num_examples=NUM_EXAMPLES, timeout=patient) as submitting,
        PolicyClient(far, policy="step", num_examples=NUM_EXAMPLES, timeout=patient) as stepping,
    ):
        yield {"no client": Loop(None), "submit": Loop(submitting), "step": Loop(stepping, waits=True)}
        assert submitting.flush(10)
        assert submitting.stats.applied == submitting.stats.steps


def main() -> None:
    """Prints a line for each loop, and the whole as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--delay-ms", type=float, default=50)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    with loops(options.delay_ms / 1e3) as running:
        for _ in range(options.steps + WARM_UP):
            for loop in running.values():
                loop.step()
    table = {name: loop.result() for name, loop in running.items()}
    print(
        f"{options.delay_ms:g} ms in each direction, {options.steps} steps, {options.threads} thread(s), "
        f"torch {torch.__version__}, {platform.platform()}"
    )
    for name, row in table.items():
        goal = f"   goal {GOAL:.0%}" if name == "submit" else ""
        print(
            f"{name:10} step {row['step_ms']:7.1f} ms   in client calls: first {row['first_call_ms']:.2f} ms, "
            f"median {row['blocked_ms_median']:.3f} ms, worst {row['blocked_ms_worst']:.3f} ms, "
            f"{row['blocked_share']:.2%} of the time{goal}"
        )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
