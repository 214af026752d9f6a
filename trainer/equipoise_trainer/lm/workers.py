"""Runs in several processes at once; one thread each, since a small model gains nothing from more."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from equipoise_trainer.lm.experiment import ExperimentConfig, OnStep, Runs, Workers
from equipoise_trainer.lm.records import RunRecord
from equipoise_trainer.lm.runs import RunPlan

POLL_S = 0.2
"""How often progress is shown."""

_runs: Runs | None = None
"""Of a worker process."""


@contextmanager
def working(
    config: ExperimentConfig, *, directory: Path, address: str, jobs: int, on_step: OnStep | None = None
) -> Iterator[Workers]:
    """Workers while inside: this process for one job, else processes of their own.

    Args:
        config: the experiment.
        directory: where records and checkpoints lie.
        address: `host:port` of the policy server.
        jobs: runs at a time.
        on_step: told of every step.
    """
    if jobs == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield Runs(config, directory=directory, address=address, on_step=on_step)
        finally:
            torch.set_num_threads(before)
        return
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    steps: Any = context.Queue()
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start, initargs=(config, directory, address, steps)
    ) as pool:
        yield _Pool(pool, steps, on_step)


class _Pool:
    def __init__(self, pool: ProcessPoolExecutor, steps: Any, on_step: OnStep | None) -> None:
        self._pool = pool
        self._steps = steps
        self._on_step = on_step

    def run(self, plans: Sequence[RunPlan]) -> list[RunRecord]:
        """The records of runs, in their order; after a failure no further run is begun."""
        futures = [self._pool.submit(_work, plan) for plan in plans]
        pending: set[Future[RunRecord]] = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=POLL_S)
                self._tell()
                for future in done:
                    future.result()
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]

    def _tell(self) -> None:
        while True:
            try:
                method, step = self._steps.get_nowait()
            except Empty:
                return
            if self._on_step is not None:
                self._on_step(method, step)


def _start(config: ExperimentConfig, directory: Path, address: str, steps: Any) -> None:
    global _runs
    torch.set_num_threads(1)
    command = os.getppid()

    def on_step(method: str, step: int) -> None:
        if os.getppid() != command:  # it was killed: a run that nobody waits for must not go on beside its successor's
            os._exit(1)
        steps.put((method, step))

    _runs = Runs(config, directory=directory, address=address, on_step=on_step)


def _work(plan: RunPlan) -> RunRecord:
    assert _runs is not None, "the pool starts its processes with _start"
    return _runs.get(plan)
