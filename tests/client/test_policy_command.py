"""`equipoise policy` against a real server."""

import csv
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
from equipoise.keys import ExampleKeys
from equipoise.policies import PolicySpec
from tests.client.scripted_server import ScriptedServer
from tests.patience import PATIENT
from tests.servers import serve

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
    with PolicyClient(
        server, policy=name, num_examples=NUM_EXAMPLES, rule="ema_relu", reference_nats=2.0, timeout=PATIENT
    ) as client:
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
        with PolicyClient(server, policy=policy, num_examples=NUM_EXAMPLES, timeout=PATIENT) as client:
            client.step([0], contributions=[1.0])
        # The opening of the stream may be shown, too.
        assert NUM_STEPS + 1 in (json.loads(process.stdout.readline())["version"] for _ in range(5))
        with PolicyAdmin(server) as admin:
            admin.delete(policy)
        process.stdout.read()
        assert process.wait(60) == NOT_FOUND


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


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture
def trajectory(server: str, request: pytest.FixtureRequest) -> str:
    """A policy of 4 rows over 3 examples, one of them moved."""
    name = "trajectory-" + str(abs(hash(request.node.name)))
    settings = {"rows": 4, "learning_rate": 0.1}
    with PolicyClient(
        server, policy=name, num_examples=3, rule="trajectory", settings=settings, timeout=PATIENT
    ) as client:
        client.step(all_examples=True, contributions=[1.0, 0.0, -1.0], step=2)
    return name


def test_weights_are_written_as_a_table_that_gives_every_bit_back(
    run: Command, server: str, policy: str, tmp_path: Path
) -> None:
    file = tmp_path / "weights.csv"
    said = run("weights", policy, "--output", file)
    assert said == Said(0, f"{NUM_EXAMPLES} lines of {policy} at version {NUM_STEPS} are in {file}\n", "")
    lines = rows_of(file.read_text())
    assert list(lines[0]) == ["id", "weight", "score"]
    assert [int(line["id"]) for line in lines] == [*range(NUM_EXAMPLES)]
    with PolicyAdmin(server) as admin:
        for field in ("weight", "score"):
            written = np.array([line[field] or "nan" for line in lines]).astype(np.float32)
            np.testing.assert_array_equal(written, admin.read_weights(policy, field))
    assert [line["id"] for line in lines if not line["score"]] == [str(id) for id in range(12, NUM_EXAMPLES)]
    assert [path.name for path in tmp_path.iterdir()] == ["weights.csv"]


def test_the_lowest_scores_come_first_and_what_was_never_scored_last(run: Command, policy: str) -> None:
    lines = rows_of(run("weights", policy, "--sort", "score").out)
    scores = [float(line["score"]) for line in lines if line["score"]]
    assert scores == sorted(scores)
    assert len(scores) == 10 + NUM_STEPS - 1
    assert not any(line["score"] for line in lines[len(scores) :])
    assert rows_of(run("weights", policy, "--sort", "score", "--limit", 5).out) == lines[:5]
    highest = rows_of(run("weights", policy, "--sort", "score", "--descending").out)
    assert [float(line["score"]) for line in highest if line["score"]] == scores[::-1]
    assert not highest[-1]["score"]
    weights = [float(line["weight"]) for line in rows_of(run("weights", policy, "--sort", "weight").out)]
    assert weights == sorted(weights)


def test_a_limit_reads_the_first_examples(run: Command, policy: str) -> None:
    assert [line["id"] for line in rows_of(run("weights", policy, "--limit", 3).out)] == ["0", "1", "2"]
    assert len(rows_of(run("weights", policy, "--limit", 1000).out)) == NUM_EXAMPLES


def test_weights_of_a_large_policy_come_in_pieces(run: Command, server: str, tmp_path: Path) -> None:
    many = 300_000  # of which the server sends some at a time
    with PolicyClient(server, policy="large", num_examples=many, rule="ema_sign", timeout=PATIENT) as client:
        ids = np.arange(0, many, 3)
        for part in np.array_split(ids, 4):
            client.step(part, contributions=np.cos(part))
    file = tmp_path / "large.csv"
    assert run("weights", "large", "--output", file).status == 0
    id, weight, score = np.genfromtxt(file, delimiter=",", skip_header=1, filling_values=np.nan, unpack=True)
    assert np.array_equal(id, np.arange(many))
    with PolicyAdmin(server) as admin:
        assert [len(chunk.values) for chunk in admin.read_chunks("large")] != [many]
        np.testing.assert_array_equal(weight.astype(np.float32), admin.read_weights("large"))
        np.testing.assert_array_equal(score.astype(np.float32), admin.read_weights("large", "score"))


def test_a_trajectory_has_a_line_for_each_row_and_example(run: Command, server: str, trajectory: str) -> None:
    lines = rows_of(run("weights", trajectory).out)
    assert list(lines[0]) == ["row", "id", "weight"]
    assert [(line["row"], line["id"]) for line in lines] == [(str(t), str(n)) for t in range(4) for n in range(3)]
    written = np.array([line["weight"] for line in lines]).astype(np.float32).reshape(4, 3)
    with PolicyAdmin(server) as admin:
        np.testing.assert_array_equal(written, admin.read_weights(trajectory, rows=range(4)))
    assert written[2, 0] > 1 > written[2, 2]
    assert rows_of(run("weights", trajectory, "--rows", "2:4").out) == lines[6:]
    first = rows_of(run("weights", trajectory, "--sort", "weight", "--limit", 1).out)
    assert [(line["row"], line["id"]) for line in first] == [("2", "2")]


def test_examples_are_called_by_their_names(run: Command, server: str, policy: str, tmp_path: Path) -> None:
    """Whatever is in them; in CSV and in Parquet."""
    keys = ExampleKeys(
        [*(f"example {i:03d}" for i in range(NUM_EXAMPLES - 2)), 'a "quoted", name', "größe\nin two lines"]
    )
    table, file = tmp_path / "keys.csv", tmp_path / "weights.csv"
    keys.save(table)
    assert run("weights", policy, "--keys", table, "--output", file).status == 0
    with file.open(encoding="utf-8", newline="") as written:
        lines = list(csv.DictReader(written))
    assert list(lines[0]) == ["id", "key", "weight", "score"]
    assert [line["key"] for line in lines] == list(keys)
    lowest = csv.DictReader(run("weights", policy, "--keys", table, "--sort", "score", "--limit", 3).out.splitlines())
    assert [keys.ids([line["key"]])[0] for line in lowest] == [
        int(line["id"]) for line in rows_of(run("weights", policy, "--sort", "score", "--limit", 3).out)
    ]
    parquet = pytest.importorskip("pyarrow.parquet")
    run("weights", policy, "--keys", table, "--output", tmp_path / "weights.parquet")
    assert parquet.read_table(tmp_path / "weights.parquet")["key"].to_pylist() == list(keys)


def test_names_of_other_examples_are_refused(
    run: Command, policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ExampleKeys(["a", "b"]).save(tmp_path / "keys.csv")
    said = run("weights", policy, "--keys", tmp_path / "keys.csv")
    assert said.status == FAILED
    assert f"--keys = 2 names: must name the {NUM_EXAMPLES} examples of the policy" in said.err
    (tmp_path / "other.csv").write_text("some,table\n1,2\n")
    for file, message in (("other.csv", "must be a table of names"), ("missing.csv", "No such file")):
        with pytest.raises(SystemExit):
            run("weights", policy, "--keys", tmp_path / file)
        assert message in capsys.readouterr().err


def test_parquet_holds_types_and_what_was_read(run: Command, server: str, policy: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "weights.parquet"
    assert run("weights", policy, "--output", file, "--json").status == 0
    table = parquet.read_table(file)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id", "int64"),
        ("weight", "float"),
        ("score", "float"),
    ]
    assert table.schema.metadata[b"equipoise.policy"] == policy.encode()
    assert table["score"].null_count == NUM_EXAMPLES - (10 + NUM_STEPS - 1)
    with PolicyAdmin(server) as admin:
        np.testing.assert_array_equal(table["weight"].to_numpy(), admin.read_weights(policy))


def test_without_pyarrow_the_way_to_it_is_told(
    run: Command, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SystemExit) as caught:
        run("weights", policy, "--output", tmp_path / "weights.parquet")
    assert caught.value.code == USAGE_ERROR
    assert "pip install pyarrow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--output", "weights.xlsx"], "'weights.xlsx' must end in .csv or .parquet"),
        (["--limit", "0"], "'0' must be a positive integer"),
        (["--rows", "3:3"], "'3:3' must be FIRST:END with FIRST below END"),
        (["--sort", "id"], "invalid choice: 'id'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    run: Command, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("weights", "p", *options)
    assert caught.value.code == USAGE_ERROR
    assert told in capsys.readouterr().err


def test_options_that_do_not_go_with_the_policy_are_refused(run: Command, policy: str, trajectory: str) -> None:
    assert "--rows = 0:2: rule ema_relu has no rows" in run("weights", policy, "--rows", "0:2").err
    assert "a trajectory has weights alone" in run("weights", trajectory, "--sort", "score").err
    assert "but rule 'trajectory' has rows [0, 4)" in run("weights", trajectory, "--rows", "3:5").err
    assert run("weights", policy, "--json").status == USAGE_ERROR
    assert run("weights", policy, "--descending").status == USAGE_ERROR


def test_a_table_that_cannot_be_written_leaves_the_file_before_alone(
    run: Command, server: str, policy: str, tmp_path: Path
) -> None:
    file = tmp_path / "weights.csv"
    file.write_text("precious")
    assert run("weights", "absent", "--output", file).status == NOT_FOUND
    assert run("weights", policy, "--rows", "0:1", "--output", file).status == FAILED
    assert (file.read_text(), [*tmp_path.iterdir()]) == ("precious", [file])
    missing = tmp_path / "nowhere" / "weights.csv"
    assert (
        run("weights", policy, "--output", missing).err == f"equipoise policy: {missing}: No such file or directory\n"
    )


def test_a_table_of_several_versions_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    scripted = ScriptedServer()  # gives six values in two pieces, of versions 0 and 3
    try:
        with PolicyAdmin(scripted.address) as admin:
            admin.create(PolicySpec(name="moving", num_examples=6))
        assert main(["weights", "moving", "--server", scripted.address]) == 0
        said = capsys.readouterr()
        assert said.out.splitlines()[1:] == [f"{id},{id}.0,{id}.0" for id in range(6)]
        assert "moving went from version 0 to 3 while it was read" in said.err
        scripted.service.chunk_offsets = [0]
        assert main(["weights", "moving", "--server", scripted.address]) == FAILED
        assert "the server sent 3 of 6 values" in capsys.readouterr().err
    finally:
        scripted.kill()


def test_the_first_lines_of_a_long_table_may_be_taken_by_a_pipe(server: str, policy: str) -> None:
    command = f"'{sys.executable}' -m equipoise policy weights {policy} --server {server} | head -n 2"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout.splitlines()[0], done.stderr) == ("id,weight,score", "")
