"""`equipoise policy` against a real server."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from equipoise.admin import PolicyAdmin
from equipoise.archive import ArchiveError, PolicyArchive
from equipoise.client import PolicyClient
from equipoise.commands.policy import FAILED, NOT_FOUND, UNREACHABLE, USAGE_ERROR, main
from equipoise.policies import PolicySpec
from equipoise.testing import serve

NUM_EXAMPLES = 50
NUM_STEPS = 3


class Said(NamedTuple):
    """What a run of the command gave."""

    status: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve() as process:
        yield process.address


@pytest.fixture
def policy(server: str, request: pytest.FixtureRequest) -> str:
    """A policy of this test's own, with a few steps behind it."""
    name = request.node.name.replace("[", "-").replace("]", "")[:100].lower()
    with PolicyClient(server, policy=name, num_examples=NUM_EXAMPLES, rule="ema_relu", reference_nats=2.0) as client:
        for step in range(NUM_STEPS):
            ids = np.arange(step, step + 10)
            client.step(ids, contributions=np.linspace(-1, 1, 10), target_loss=0.5, step=step)
    return name


@pytest.fixture
def run(server: str, capsys: pytest.CaptureFixture[str]) -> Command:
    def run_command(*arguments: object) -> Said:
        status = main([*map(str, arguments), "--server", server])
        return Said(status, *capsys.readouterr())

    return run_command


def test_policies_are_listed_as_a_table_and_as_json(run: Command, policy: str) -> None:
    heads, row = run("list", "--prefix", policy).out.splitlines()
    assert heads.split() == ["NAME", "EXAMPLES", "RULE", "DURABILITY", "CREATED"]
    assert row.split()[:4] == [policy, str(NUM_EXAMPLES), "ema_relu", "logged"]
    [listed] = json.loads(run("list", "--prefix", policy, "--json").out)
    assert (listed["spec"]["name"], len(listed["uid"])) == (policy, 32)


def test_without_policies_the_list_says_so(run: Command) -> None:
    assert run("list", "--prefix", "nothing-like-this") == Said(0, "no policies\n", "")
    assert json.loads(run("list", "--prefix", "nothing-like-this", "--json").out) == []


def test_a_policy_is_shown_as_it_stands(run: Command, policy: str) -> None:
    shown = json.loads(run("show", policy, "--json").out)
    assert (shown["version"], shown["target_loss"], shown["compression_ratio"]) == (NUM_STEPS, 0.5, 4.0)
    table = dict(line.rsplit(maxsplit=1) for line in run("show", policy).out.splitlines())
    assert table["version"] == str(NUM_STEPS)
    assert table["compression ratio"] == "4"
    assert table["guard loss"] == "-"


def test_an_exported_policy_comes_back_bit_for_bit(run: Command, server: str, policy: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.npz"
    assert run("export", policy, file).out == f"{policy} at version {NUM_STEPS} is in {file}\n"
    assert run("import", f"{policy}-copy", file).out == f"{policy}-copy has the state of {file}\n"
    with PolicyAdmin(server) as admin:
        for field in ("weight", "score"):
            original, copy = (admin.read_weights(name, field) for name in (policy, f"{policy}-copy"))
            assert original.tobytes() == copy.tobytes()
        assert admin.get(f"{policy}-copy").version == 0


def test_numpy_reads_an_exported_policy(run: Command, policy: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.npz"
    run("export", policy, file)
    with np.load(file) as arrays:
        raw = arrays["columns/raw"]
        assert raw.shape == (NUM_EXAMPLES,)
        assert np.count_nonzero(raw >= 0) == 10 + NUM_STEPS - 1
        assert json.loads(str(arrays["spec"]))["name"] == policy


def test_a_failed_export_leaves_the_file_before_alone(run: Command, tmp_path: Path) -> None:
    file = tmp_path / "policy.npz"
    file.write_bytes(b"precious")
    assert run("export", "absent", file).status == NOT_FOUND
    assert file.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [file]


def test_an_import_never_replaces_a_policy(run: Command, policy: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.npz"
    run("export", policy, file)
    said = run("import", policy, file)
    assert said.status == FAILED
    assert policy in said.err


@pytest.mark.parametrize("content", [b"", b"not a zip file", None])
def test_a_file_that_is_no_policy_is_refused(run: Command, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "policy.npz"
    if content is None:
        np.savez(file, weights=np.ones(3))
    else:
        file.write_bytes(content)
    said = run("import", "new", file)
    assert said.status == FAILED
    assert f"{file} is no exported policy" in said.err


def test_a_file_that_is_not_there_is_named(run: Command, tmp_path: Path) -> None:
    assert run("import", "new", tmp_path / "absent.npz").err == (
        f"equipoise policy: {tmp_path / 'absent.npz'}: No such file or directory\n"
    )


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", format=np.array("equipoise policy 2"))
    with pytest.raises(ArchiveError, match="'equipoise policy 2' is not 'equipoise policy 1'"):
        PolicyArchive.load(tmp_path / "new.npz")


def test_a_deletion_asks_first(run: Command, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[str] = []
    replies = iter(("no", "y"))

    def reply(question: str) -> str:
        questions.append(question)
        return next(replies)

    monkeypatch.setattr("builtins.input", reply)
    assert run("delete", policy).status == USAGE_ERROR
    assert run("show", policy).status == 0
    assert run("delete", policy) == Said(0, f"{policy} is deleted\n", "")
    assert run("show", policy).status == NOT_FOUND
    assert questions == [f"delete {policy}, {NUM_EXAMPLES} examples, version {NUM_STEPS}? [y/N] "] * 2


def test_yes_deletes_without_asking(run: Command, policy: str) -> None:
    assert run("delete", policy, "--yes").status == 0
    assert run("delete", policy, "--yes").status == NOT_FOUND


def test_a_watch_shows_each_change_until_the_policy_is_deleted(server: str, policy: str) -> None:
    arguments = ["policy", "watch", policy, "--json", "--interval", "0.1", "--server", server]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "equipoise", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout
        assert json.loads(process.stdout.readline())["version"] == NUM_STEPS
        with PolicyClient(server, policy=policy, num_examples=NUM_EXAMPLES) as client:
            client.step([0], contributions=[1.0])
        # The opening of the stream may be shown, too.
        assert NUM_STEPS + 1 in (json.loads(process.stdout.readline())["version"] for _ in range(5))
        with PolicyAdmin(server) as admin:
            admin.delete(policy)
        process.stdout.read()
        assert process.wait(20) == NOT_FOUND


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--server", "127.0.0.1:1", "--timeout", "0.5"]) == UNREACHABLE
    assert "127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["shwo", "p"], ["show"]])
def test_wrong_usage_is_told_apart(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == USAGE_ERROR


def test_a_name_that_no_policy_can_have_is_refused(run: Command, server: str) -> None:
    with PolicyAdmin(server) as admin, pytest.raises(ValueError, match="Upper"):
        admin.create(PolicySpec(name="Upper", num_examples=1))
    assert run("show", "Upper").status in (FAILED, NOT_FOUND)
