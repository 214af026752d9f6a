"""`equipoise bench`: whatever is compared is measured, with every rule, and what cannot be is told."""

import json
import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise import testing
from equipoise.options import Limits
from equipoise_server.bench import restore, scrape, servers, steps, sweep
from equipoise_server.bench.clients import at_once
from equipoise_server.bench.comparison import Block, Contender
from equipoise_server.bench.load import Case, make_rows
from equipoise_server.bench.options import PARTS
from equipoise_server.bench.projection import by_sorting
from equipoise_server.bench.result import results as results_of
from equipoise_server.commands.bench import main
from equipoise_server.rules import aggregate, build, names
from tests.e2e.faults.proxy import until
from tests.servers import serve

TINY = ("--rows", "8", "--examples", "64", "--turns", "1", "--seconds", "0.01")


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of one process are there at once."""

    def start(**settings: Any) -> AbstractContextManager[Any]:
        return testing.serve(**settings) if "processes" in settings else serve(**settings)

    for module in (servers, restore, sweep, scrape):
        monkeypatch.setattr(module, "serve", start)


@pytest.mark.parametrize("rule", names())
def test_steps_suit_every_rule(rule: str) -> None:
    case = Case(rows=16, trainers=1, pipelined=False, rule=rule)
    made = make_rows(case, 16)
    assert len(made) >= 4
    for rows in made:
        assert sorted(rows.ids) == list(range(16))  # distinct, and in range
        row = 0 if rule == "trajectory" else None
        build(rule, case.settings_for(16)).check(aggregate(rows.ids, trajectory_row=row, **rows.statistics))  # type: ignore[arg-type]


def run(tmp_path: Path, *options: str) -> dict[str, Any]:
    """What a run that succeeds writes."""
    output = tmp_path / "found.json"
    assert main([*options, "--output", str(output)]) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_everything_is_measured_beside_the_echo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, *TINY, "--trainers", "1,2", "--via", "stubs,aio,client")
    told = capsys.readouterr().out
    assert "Reverb did not run: --reverb was not given" in told
    assert "in all lines: rows 8, " in told
    results: list[dict[str, Any]] = found["results"]
    compared = [("echo", "stubs"), *product(("logged", "behind"), ("stubs", "aio", "client"))]
    cases = list(product((1, 2), (False, True)))
    seen = {(r["case"]["trainers"], r["case"]["pipelined"], r["contender"], r["via"]): r for r in results}
    assert seen.keys() == {(*case, *each) for case, each in product(cases, compared)}
    for result in results:
        assert result["steps"] >= result["case"]["trainers"]
        assert result["examples_per_s"] == pytest.approx(8 * result["steps_per_s"])
        assert result["server_cpu_s_per_million"] == pytest.approx(result["server_us"] / 8)
        assert min(result["server_us"], result["client_us"], result["resident_mb"]) > 0
        assert result["bound"].split()[0] in ("server", "redis", "client", "waiting")
        told_latency = result["via"] == "stubs" or not result["case"]["pipelined"]
        assert (result["p50_ms"] is not None) == told_latency
        assert not told_latency or 0 < result["p50_ms"] <= result["p99_ms"]
        assert (result["latency_ratio"] is None) == result["case"]["pipelined"]
        assert (result["fairness"] is not None) == told_latency
        assert not told_latency or result["fairness"] >= 1
        of_echo = result["contender"] == "echo"
        assert result["num_examples"] == (0 if of_echo else 64)
        assert result["bytes_per_example"] == (None if of_echo else 8)  # of ema_sign: float32 weight and average
        if of_echo:
            assert result["rate_ratio"] == {"median": 1, "low": 1, "high": 1}
            assert result["latency_ratio"] in ({"median": 1, "low": 1, "high": 1}, None)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_servers_sizes_and_sketches_take_turns_in_one_case(tmp_path: Path) -> None:
    """Also by stubs, which follow to the process that has a policy."""
    wide = ("--sketch", "0,3", "--examples", "64,128", "--security", "plain,tls+token", "--modes", "one")
    few = ("--processes", "1,2", "--policies", "2", "--trainers", "2", "--durability", "behind", "--via", "stubs")
    results = run(tmp_path, *TINY, *wide, *few)["results"]
    for sketch in (0, 3):
        case = [each for each in results if each["case"]["sketch"] == sketch]
        assert [each["contender"] for each in case] == ["echo", *["behind"] * 8]
        seen = [(each["security"], each["processes"], each["num_examples"]) for each in case[1:]]
        assert seen == list(product(("plain", "tls+token"), (1, 2), (64, 128)))
        assert {each["policies"] for each in case[1:]} == {2}
        one = {"median": 1, "low": 1, "high": 1}
        assert [each["rate_of_first"] == one for each in case[1:]].count(True) == 1  # only the first of them


def test_all_rules_that_can_be_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--rule", "all", "--sketch", "0,2", "--modes", "one", "--via", "stubs", "--durability", "behind")
    found = run(tmp_path, *TINY, *options)
    measured = {each["case"]["rule"] for each in found["results"]}
    assert measured == set(names())
    sketched = {each["case"]["rule"] for each in found["results"] if each["case"]["sketch"]}
    assert "ema_sign" in sketched
    assert "rule rho did not run: --sketch 2: rule rho does not live on contributions alone" in capsys.readouterr().out
    assert "rho" not in sketched


def test_figures_of_what_each_trainer_did() -> None:
    case = Case(rows=10, trainers=2, pipelined=False, rule="uniform")

    def contender(name: str, *blocks: Block) -> Contender:
        return Contender(name=name, via="stubs", caller=None, pids=[1], blocks=list(blocks))  # type: ignore[arg-type]

    # Two turns: (steps and seconds of each trainer), wall, and processor time of server, Redis and client.
    echo = contender(
        "echo",
        Block([(1, [1.0]), (1, [1.0])], 1.0, 0.1, 0.0, 0.1),
        Block([(2, [2.0, 2.0]), (2, [2.0, 2.0])], 1.0, 0.1, 0.0, 0.1),
    )
    behind = contender(
        "behind",
        Block([(3, [3.0] * 3), (1, [3.0])], 2.0, 1.5, 0.1, 0.2),
        Block([(3, [8.0] * 3), (1, [8.0])], 2.0, 1.5, 0.1, 0.2),
    )
    slower = contender(
        "behind",
        Block([(1, [6.0]), (1, [6.0])], 2.0, 0.1, 0.1, 0.1),
        Block([(1, [8.0]), (1, [8.0])], 2.0, 0.1, 0.1, 0.1),
    )
    slower.num_examples, slower.policy_bytes = 100, 1200
    of_echo, first, second = results_of(case, [echo, behind, slower])
    assert first.latency_ratio is not None
    assert (first.latency_ratio.median, first.latency_ratio.low, first.latency_ratio.high) == (3.5, 3.25, 3.75)
    assert first.rate_ratio.median == (1.0 + 0.5) / 2  # 2/s over 2/s, 2/s over 4/s
    assert (first.steps_per_s, first.examples_per_s, first.fairness) == (2.0, 20.0, 3.0)
    assert (first.p50_ms, first.bound) == (5500.0, "server 75%")
    assert (first.server_us, first.server_cpu_s_per_million) == (375_000.0, 37_500.0)
    assert second.latency_of_first is not None
    assert (second.latency_of_first.median, second.rate_of_first.median) == (1.5, 0.5)
    assert (second.bytes_per_example, second.fairness, second.bound) == (12.0, 1.0, "waiting 85%")
    assert of_echo.latency_of_first is not None
    assert of_echo.latency_of_first.median == 1.0


@pytest.mark.parametrize(
    ("python", "reason"),
    [("/no/such/python", "No such file"), (sys.executable, "has the interpreter dm-reverb?")],
    ids=["no interpreter", "no reverb"],
)
def test_without_reverb_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], python: str, reason: str
) -> None:
    options = ("--modes", "one", "--via", "stubs", "--durability", "behind", "--reverb", python)
    found = run(tmp_path, *TINY, *options)
    assert reason in capsys.readouterr().out
    assert reason in found["not_run"]["Reverb"]
    assert [result["contender"] for result in found["results"]] == ["echo", "behind"]


def test_what_is_missing_is_told_and_the_rest_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equipoise_server.bench.servers.CERTIFICATE", ("no-openssl",))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ("--modes", "one", "--via", "stubs", "--durability", "behind", "--security", "plain,tls")
    found = run(tmp_path, *TINY, *options)
    told = capsys.readouterr().out
    assert "tls did not run: openssl, which makes a certificate for it: No such file" in told
    assert "plot did not run: matplotlib is not installed" in told
    assert [each["security"] for each in found["results"]] == ["plain", "plain"]  # the echo, and one
    assert not (tmp_path / "found.png").exists()


def test_what_was_measured_before_a_failure_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Case] = []
    compare = steps.compare

    async def fails_later(case: Case, *given: Any, **options: Any) -> Any:
        if measured:
            raise RuntimeError("the server ended the stream")
        measured.append(case)
        return await compare(case, *given, **options)

    monkeypatch.setattr(steps, "compare", fails_later)
    output = tmp_path / "found.json"
    options = ("--trainers", "1,2", "--modes", "one", "--via", "stubs", "--durability", "behind")
    assert main([*TINY, *options, "--output", str(output)]) == 1
    told = capsys.readouterr()
    assert "equipoise bench: the server ended the stream" in told.err
    assert "steps/s" in told.out
    assert [each["contender"] for each in json.loads(output.read_text())["results"]] == ["echo", "behind"]


def test_a_policy_comes_back_from_pages_and_from_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "LARGE_STEPS", 200)  # surely longer to replay than what a stop leaves as it is
    options = ("--examples", "65536", "--entries", "300", "--rows", "4", "--turns", "2")
    pages, log = run(tmp_path, "restore", *options)["results"]
    assert (pages["from"], pages["pages"], pages["entries"], pages["entries_per_s"]) == ("pages", 1, 0, None)
    assert pages["read_bytes"] >= 8 * 65536  # ema_sign: 8 bytes an example
    assert (log["from"], log["pages"], log["entries"]) == ("log", 0, 300)
    assert log["entries_per_s"] == pytest.approx(300 / log["seconds"])
    assert log["read_bytes"] > 300 * 4 * 12  # an id and a contribution each
    for each in (pages, log):
        assert min(each["seconds"], each["read_s"], each["read_cpu_s"], each["server_s"], each["redis_s"]) > 0
        assert [turn["read_bytes"] for turn in each["turns"]] == [each["read_bytes"]] * 2


def test_steps_are_told_apart_by_whether_a_sweep_went_on(tmp_path: Path) -> None:
    during, none = run(tmp_path, "sweep", "--examples", "1e6", "--seconds", "0.2")["results"]
    assert (during["during"], none["during"]) == ("a sweep", "none")
    assert during["pages"] == 16  # of 65,536 examples each: large steps touch all
    assert during["sweep_s"] > 0
    assert none["steps"] > 0
    assert 0 < none["p50_ms"] <= none["p99_ms"] <= none["worst_ms"]


def test_projections_agree_with_a_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    found = run(tmp_path, "projection", "--rows", "70", "--examples", "33")
    ours, sort = found["results"]
    assert (ours["method"], sort["method"]) == ("ours", "torch sort")
    assert ours["rows"] == sort["rows"] == 70
    assert sort["largest_difference"] < 1e-9
    assert "cvxpy" in found["not_run"]
    # By hand: {2, 1, -3} moves by the same 1/3 to {5/3 + 2/3, 2/3 + 2/3, 0}: mean 1, and the third stays at 0.
    assert by_sorting(np.array([[2.0, 1.0, -3.0]])) == pytest.approx(np.array([[2.0, 1.0, 0.0]]))


def test_a_scrape_has_more_series_with_more_policies(tmp_path: Path) -> None:
    few, more = run(tmp_path, "scrape", "--policies", "3,1", "--turns", "2")["results"]
    assert (few["policies"], more["policies"]) == (1, 3)
    assert more["series"] > few["series"] > 100
    assert 0 < more["p50_ms"] <= more["p99_ms"]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_a_help_that_names_all_others(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([part, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(f"\n  {other} " in told for other in PARTS)
    assert "--output" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rule", "no_rule"), "no_rule"),
        (("--rule", "all", "--setting", "no_setting=1"), "no_setting"),
        (("--sketch", "3", "--rule", "rho"), "--sketch 3: rule rho does not live on contributions alone"),
        (("--sketch", "-1"), "--sketch: -1: must be an integer of at least 0"),
        (("--examples", "1e6,x"), "--examples: x: must be an integer of at least 1"),
        (("--examples", "64,64"), "--examples: 64: must be there once"),
        (("--rule", "trajectory", "--rows", "2e6"), "num_examples = 2000000: rule trajectory projects at most"),
        (("--policies", "2"), "--policies 2: more than --trainers 1"),
        (("--security", "ssl"), "--security: ssl: must be of plain, tls, tls+token"),
        (("--processes", "0"), "--processes: 0: must be an integer of at least 1"),
        (("--setting", "floor=x"), "--setting floor = 'x': must be a number, true or false"),
        (("--setting", "floor=7"), "floor"),
        (("--setting", "floor"), "--setting floor: must be KEY=VALUE"),
        (("--rows", "65"), "--rows 65: more than --examples 64"),
        (("--rows", "1,x"), "--rows: x: must be an integer of at least 1"),
        (("--trainers", "1.5"), "--trainers: 1.5: must be an integer of at least 1"),
        (("--turns", "inf"), "--turns: inf: must be an integer of at least 1"),
        (("--seconds", "nan"), "--seconds: nan: must be above 0"),
        (("--seconds", "0"), "--seconds: 0: must be above 0"),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str
) -> None:
    try:
        status: object = main([*TINY, *options])
    except SystemExit as ended:  # of the parser
        status = ended.code
    assert status == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("steppes",), "PART steppes: must be of steps, restore, sweep, projection, scrape"),
        (("restore", "--rule", "no_rule"), "no_rule"),
        (("restore", "--examples", "8", "--rows", "9"), "--rows 9: more than --examples 8"),
        (("restore", "--durability", "logged"), "--durability"),
        (("sweep", "--examples", "65535"), "--examples 65535: must be at least 65536"),
        (("sweep", "--seconds", "0"), "--seconds: 0: must be above 0"),
        (("projection", "--examples", "1048577"), "--examples 1048577: rule trajectory projects at most 1048576"),
        (("scrape", "--policies", "1,0"), "--policies: 0: must be an integer of at least 1"),
    ],
)
def test_wrong_usage_of_a_part_is_told(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str) -> None:
    try:
        status: object = main(options)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert told in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "run", lambda *_: pytest.fail("it ran"))
    assert main([*TINY, "--output", str(tmp_path / "none" / "found.json")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_clients_submit_no_more_than_they_keep() -> None:
    for rows in (1, 65536):
        case = Case(rows=rows, trainers=1, pipelined=True, rule="ema_sign")
        step = make_rows(case, 65536)[0]
        submitted = at_once([step])
        assert 1 <= submitted <= 256
        assert submitted * len(step.request(1).SerializeToString()) <= Limits().window_bytes // 2


def test_a_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """As a terminal sends it: to all processes of the group at once."""
    told = tmp_path / "told"
    command = [sys.executable, "-m", "equipoise", "bench", *TINY, "--trainers", "1,2", "--turns", "100000"]
    with told.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--via", "stubs", "--output", str(tmp_path / "found.json")],
            stdout=out,
            stderr=out,
            env=os.environ | {"TMPDIR": str(tmp_path)},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        # A server that is ready and the echo beside it are in the middle of a case that never ends.
        until(
            lambda: any(tmp_path.glob("equipoise-*/ready.json")) and b"bench.echo" in _children(process.pid),
            within_s=120,
            what="the server and the echo run",
        )
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.glob("equipoise-*"))
    assert told.read_text() == ""


def _children(pid: int) -> bytes:
    """Command lines of a process's children."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return b"\n".join(Path(f"/proc/{child}/cmdline").read_bytes() for child in found)
