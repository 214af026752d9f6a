"""The state that a release has left is read, and goes on to the weights to which that release itself went on."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc as rpc
from tests.e2e.releases.record import FOLDER, Record
from tests.e2e.releases.trainer import Trainer
from tests.servers import ServerProcess, zygote

RELEASES = sorted(path.stem for path in FOLDER.glob("*.zip"))
TOLD = (
    *("uid", "version", "scored_examples", "effective_examples", "largest_weight", "sim", "positive_share"),
    *("target_loss", "guard_loss", "guard_strength", "compression_ratio", "training_step", "bytes"),
)
"""What a status says that must be as that release said it."""


@pytest.fixture(scope="module", params=RELEASES)
def record(request: pytest.FixtureRequest) -> Record:
    return Record.load(request.param)


@pytest.fixture
def server(record: Record) -> Iterator[ServerProcess]:
    """A server of now on a data directory of then; not started."""
    directory = Path(tempfile.mkdtemp(prefix="equipoise-"))
    found = ServerProcess(zygote(), directory)
    found.data_dir.mkdir()
    for name, content in record.files.items():
        (found.data_dir / name).write_bytes(content)
    yield found
    found.kill()
    shutil.rmtree(directory)


def told(status: pb.PolicyStatus) -> dict[str, object]:
    return {name: getattr(status, name) for name in TOLD}


def go_on(trainer: Trainer, record: Record) -> None:
    """Every policy's next steps have the answers that they had, to the bit, and it ends as it ended."""
    for policy, steps in record.steps.items():
        again = trainer.step(policy, record.again[policy])
        assert again.outcome == pb.OUTCOME_DUPLICATE, policy
        for step, expected in steps:
            answer = trainer.step(policy, step)
            assert (answer.outcome, answer.version) == (expected.outcome, expected.version), policy
            assert answer.weights == expected.weights, (policy, step.sequence)
        assert trainer.weights(policy) == record.weights[policy], policy
        assert told(trainer.status(policy)) == told(record.ends[policy]), policy


def test_it_goes_on_to_the_same_weights(record: Record, server: ServerProcess) -> None:
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        go_on(Trainer(rpc.PolicyServiceStub(channel)), record)
    loads = {line["policy"]: line for line in map(json.loads, server.log.splitlines()) if line["event"] == "loaded"}
    assert loads.keys() == record.steps.keys()
    assert all(load["entries"] for load in loads.values()), "it has replayed that release's log"
    assert all(loads[policy]["pages"] for policy in ("ema-sign", "projected-gradient", "trajectory")), (
        "and read its pages"
    )


def test_it_goes_on_when_each_step_is_followed_by_another_start(record: Record, server: ServerProcess) -> None:
    """What this server wrote beside that release's pages and entries is read as well."""
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        trainer = Trainer(rpc.PolicyServiceStub(channel))
        for turn in range(2):
            for policy, steps in record.steps.items():
                for step, expected in steps[3 * turn : 3 * turn + 3]:
                    assert trainer.step(policy, step).weights == expected.weights, policy
            server.kill() if turn else server.stop()
            server.start()
        for policy, steps in record.steps.items():
            for step, expected in steps[6:]:
                assert trainer.step(policy, step).weights == expected.weights, policy
            assert trainer.weights(policy) == record.weights[policy], policy
            assert told(trainer.status(policy)) == told(record.ends[policy]), policy
