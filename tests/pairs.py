"""Two processes of one training, as a launcher starts them, for the tests of what ranks do together."""

import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.ports import free_port

PATIENCE_S = 400.0
"""Two that wait for each other are given up after so long."""
LOADED = ["accelerate", "lightning", "torch.distributed", "transformers.trainer"]
"""What takes a process seconds to import, and is imported once for all pairs of a run of the tests."""


def run_pair(job: Callable[..., None], *arguments: Any) -> None:
    """Runs `job(rank, *arguments)` in two processes under the environment of a launcher; raises what one of them does.

    The job may form the process group, or let its framework do so, and need not take it down.
    """
    get_context("forkserver").set_forkserver_preload(LOADED)
    processes = mp.start_processes(
        _run, args=(free_port(), job, arguments), nprocs=2, join=False, start_method="forkserver"
    )
    end = monotonic() + PATIENCE_S
    try:
        while not processes.join(1):
            assert monotonic() < end, f"the two processes of {job.__module__} did not end within {PATIENCE_S:g} s"
    finally:
        for process in processes.processes:
            process.kill()  # who is left; pytest would wait for them at its end


def _run(rank: int, port: int, job: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "NODE_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    job(rank, *arguments)
    if dist.is_initialized():
        dist.barrier()  # the first one keeps what the others look each other up in
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # On its way out the interpreter of a process with a group once aborted ("terminate called without an active
    # exception"), perhaps at a thread that still ran. What a job has to say is on the disk.
    os._exit(0)
