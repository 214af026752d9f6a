"""Writes the record of a release. It runs with the packages of that release, and this folder of now:

    git worktree add /tmp/release COMMIT
    PYTHONPATH=/tmp/release/client:/tmp/release/server python -m tests.e2e.releases.write RELEASE

A policy of every rule gets steps until they were swept into pages, and some more, which stay in the log. The server is
killed and its data directory is kept; then it goes on from there, and its answers are kept too. 0.1.0 was written so at
commit 87ddc3f.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import redis

import equipoise
from equipoise.testing import ServerProcess, serve
from equipoise.v1 import policy_pb2_grpc as rpc
from equipoise_server.rules.registry import names
from tests.e2e.releases.record import Record
from tests.e2e.releases.trainer import Trainer, named, steps

MIB = 1 << 20
MANY, FEW = 1000, 24
"""Rows of the steps that are swept, and of the others."""
LOGGED, MORE = 5, 8
"""Steps that stay in the log, and steps behind the state that is kept."""
MOST = 1000
"""Steps after which a policy should have been swept."""


def main(release: str) -> None:
    """Writes the record of a release, and says how large it is."""
    record, rules = Record(), names()
    with serve(sweep_min_bytes=MIB) as server:
        with _trainer(server) as trainer:
            for rule in rules:
                policy = named(rule)
                trainer.create(rule)
                swept = _until_swept(server, trainer, rule)
                runs = steps(rule, first=swept + 1, batch=FEW)
                for _ in range(LOGGED):
                    record.again[policy] = next(runs)
                    answer = trainer.step(policy, record.again[policy])
                    assert answer.durable_sequence == answer.sequence, "it is in the store"
        _rewrite(server)
        server.kill()
        record.files = {path.name: path.read_bytes() for path in sorted(server.data_dir.glob("*.aof"))}
        server.start()
        with _trainer(server) as trainer:
            for rule in rules:
                policy = named(rule)
                runs = steps(rule, first=record.again[policy].sequence + 1, batch=FEW)
                given = [next(runs) for _ in range(MORE)]
                record.steps[policy] = [(step, trainer.step(policy, step)) for step in given]
                record.ends[policy], record.weights[policy] = trainer.status(policy), trainer.weights(policy)
    path = record.save(release)
    print(f"{path.name}: {len(rules)} policies of {Path(equipoise.__file__).parent}, {path.stat().st_size:,} bytes")


@contextmanager
def _trainer(server: ServerProcess) -> Iterator[Trainer]:
    with grpc.insecure_channel(server.address) as channel:
        yield Trainer(rpc.PolicyServiceStub(channel))


def _until_swept(server: ServerProcess, trainer: Trainer, rule: str) -> int:
    """The last step of those that the pages hold, or were to hold: how many there are."""
    for step in steps(rule, first=1, batch=MANY):
        trainer.step(named(rule), step)
        lines = [line for line in server.log.splitlines() if named(rule) in line and "swept" in line]
        if lines:
            return step.sequence
        assert step.sequence < MOST, f"{rule} is never swept"
    raise AssertionError


def _rewrite(server: ServerProcess) -> None:
    """Has Redis write its file anew, without its history."""
    holder = next(json.loads(path.read_text()) for path in server.data_dir.glob("*lock*") if path.stat().st_size)
    (socket,) = Path(holder["socket_dir"]).glob("*.sock")
    with redis.Redis(unix_socket_path=str(socket)) as client:
        client.bgrewriteaof()
        while client.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
