"""The conformance kit passes our server, finds what is wrong with others, and leaves nothing behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.admin import PolicyAdmin
from equipoise.commands.conformance import FAILED, UNREACHABLE, USAGE_ERROR, main
from equipoise.policies import PolicySpec
from equipoise.v1 import policy_pb2 as pb
from tests.e2e.conformance.crooked import Metadata, crooked
from tests.servers import ServerProcess

EXCHANGE = "/equipoise.v1.PolicyService/Exchange"
DELETE = "/equipoise.v1.PolicyService/DeletePolicy"
STRATA = {
    f"rules/strata/{case}" for case in ("defaults", "evidence", "groups", "soft", "spike", "target", "target_groups")
}
OUTCOMES = {f"rules/learnability/{case}" for case in ("defaults", "greedy", "patient")}
SOURCES = {
    f"rules/{case}"
    for case in (
        "exp3/cold",
        "exp3/defaults",
        "group_softmax/cold",
        "group_softmax/defaults",
        "group_dro/adjusted",
        "group_dro/defaults",
        "excess_loss/slow",  # by default all weights of that step are below what is tolerated
    )
}
GUARD = {f"rules/{rule}/guard" for rule in (
    "uniform", "ema_sign", "ema_relu", "exponentiated_gradient", "projected_gradient", "boltzmann"
)}  # fmt: skip
"""The vectors with more than ten versions."""

Failures = Callable[..., set[str]]


@pytest.fixture
def failures(capsys: pytest.CaptureFixture[str]) -> Failures:
    """Names of the checks that fail at an address."""

    def run(address: str, *arguments: str) -> set[str]:
        status = main([address, "--json", *arguments])
        said = json.loads(capsys.readouterr().out)
        failed = {check["name"] for check in said["checks"] if check["verdict"] == "FAILED"}
        assert (status, said["failed"]) == (FAILED if failed else 0, len(failed))
        assert all(check["expected"] and check["found"] for check in said["checks"])
        return failed

    return run


def names(address: str) -> list[str]:
    with PolicyAdmin(address) as admin:
        return [policy.spec.name for policy in admin.list_policies("conformance-")]


def test_our_server_passes_to_the_last_bit_and_keeps_nothing(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    with PolicyAdmin(server.address) as admin:
        admin.create(PolicySpec(name="conformance-of-somebody-else", num_examples=3))
    before = names(server.address)
    assert main([server.address, "--exact"]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert summary == f"{len(lines) - 2} ok, 0 failed, 2 skipped"
    assert [line.split()[1] for line in lines if line.startswith("skipped")] == ["server/token", "server/token"]
    assert all("expected: " in line and "; came: " in line for line in lines)
    assert names(server.address) == before


def in_step(version: int, change: Callable[[pb.StepResponse], None]) -> Callable[[str, bytes], bytes]:
    """Changes the answers to steps of a version in streams."""

    def changed(method: str, data: bytes) -> bytes:
        if method != EXCHANGE:
            return data
        response = pb.ExchangeResponse.FromString(data)
        if response.HasField("step") and version in (0, response.step.version):
            change(response.step)
        return response.SerializeToString()

    return changed


def heavier(by: float) -> Callable[[pb.StepResponse], None]:
    """The largest weight is wrong by a share."""

    def change(step: pb.StepResponse) -> None:
        weights = np.frombuffer(step.weights, "<f4").copy()
        if len(weights):
            weights[weights.argmax()] *= np.float32(1 + by)
        step.weights = weights.tobytes()

    return change


def version_of_then(step: pb.StepResponse) -> None:
    if step.outcome == pb.OUTCOME_DUPLICATE:
        step.version = step.sequence


def never_durable(step: pb.StepResponse) -> None:
    step.durable_sequence = 0


def without_details(method: str, metadata: Metadata) -> Metadata:
    return () if method == DELETE else metadata


@pytest.mark.parametrize(
    ("wrong", "arguments", "expected"),
    [
        ({"change": in_step(11, heavier(1e-4))}, [], GUARD | STRATA | OUTCOMES | SOURCES),
        ({"change": in_step(11, heavier(1.2e-7))}, ["--only", "rules/ema_sign"], set()),
        ({"change": in_step(11, heavier(1.2e-7))}, ["--only", "rules/ema_sign", "--exact"], {"rules/ema_sign/guard"}),
        (
            {"change": in_step(0, version_of_then)},
            ["--only", "stream", "--only", "unary", "--only", "durability"],
            {"stream/duplicate"},
        ),
        (
            {"trailing": without_details},
            ["--only", "server", "--only", "policies"],
            {"policies/unknown", "policies/delete"},
        ),
        (
            {"change": in_step(0, never_durable)},
            ["--only", "durability", "--timeout", "1"],
            {"durability/logged", "durability/behind", "durability/after reconnect"},
        ),
        (
            {"missing": ("/grpc.reflection.v1.",), "trailing": without_details},
            ["--only", "server", "--only", "policies"],
            {"server/reflection v1", "policies/unknown", "policies/delete"},
        ),
        ({}, [], set()),
    ],
    ids=["weight", "last bit", "last bit, exact", "duplicate", "details", "durable", "two", "nothing"],
)
def test_what_is_wrong_with_a_server_fails_these_checks_and_no_others(
    server: ServerProcess, failures: Failures, wrong: dict[str, Any], arguments: list[str], expected: set[str]
) -> None:
    with crooked(server.address, **wrong) as address:
        assert failures(address, *arguments) == expected


def test_an_answer_that_never_comes_fails_its_check_and_the_others_go_on(
    server: ServerProcess, failures: Failures
) -> None:
    def unlike_a_step(method: str, data: bytes) -> bytes:
        return b"" if method == EXCHANGE else data

    with crooked(server.address, change=unlike_a_step) as address:
        failed = failures(address, "--only", "stream/order", "--only", "copies", "--timeout", "5")
    assert failed == {"stream/order", "copies/fork", "copies/export and import"}


INTERRUPTED = """
import os, signal, sys
from equipoise.commands.conformance import main
from equipoise.conformance.target import Target

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored, in the background
create = Target.create

def then_interrupted(self, **fields):
    name = create(self, **fields)
    if name.endswith("-7"):
        os.kill(os.getpid(), signal.SIGINT)
    return name

Target.create = then_interrupted
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_run_leaves_nothing_behind(server: ServerProcess) -> None:
    command = [sys.executable, "-c", INTERRUPTED, server.address, "--prefix", "conformance-interrupted-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode not in (0, FAILED), done.stdout + done.stderr
    with PolicyAdmin(server.address) as admin:
        assert list(admin.list_policies("conformance-interrupted-")) == []


def test_wrong_usage_and_an_absent_server_have_statuses_of_their_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["127.0.0.1:1", "--only", "nothing"]) == USAGE_ERROR
    assert "no check's name begins so" in capsys.readouterr().err
    assert main(["--list", "--only", "server/i"]) == 0
    assert capsys.readouterr().out == "server/info\n"
    for wrong in (["--timeout", "0"], ["--prefix", "Upper-"], ["--vectors", str(tmp_path)]):
        assert main(["127.0.0.1:1", *wrong]) == USAGE_ERROR
        assert wrong[1] in capsys.readouterr().err
    assert main(["127.0.0.1:1", "--timeout", "0.2"]) == UNREACHABLE
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert main(["127.0.0.1:1", "--tls", "--root-certificates", str(tmp_path / "none.pem")]) == USAGE_ERROR
    assert "none.pem" in capsys.readouterr().err


def test_a_server_of_something_else_fails(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    with crooked(server.address, missing=("/equipoise",)) as address:
        assert main([address]) == FAILED
    assert "GetServerInfo" in capsys.readouterr().err


def test_a_policy_of_ours_that_cannot_be_deleted_is_named(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(names(server.address))
    with crooked(server.address, missing=(DELETE,)) as address:
        assert main([address, "--only", "policies/create again"]) == 0
    said = capsys.readouterr().err
    left = set(names(server.address)) - before
    assert left
    with PolicyAdmin(server.address) as admin:
        for name in left:
            assert name in said
            admin.delete(name)
