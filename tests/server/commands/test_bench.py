"""`equipoise bench`: whatever is compared is measured, with every rule, and what cannot be is told."""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from equipoise_server.bench.load import Case, make_rows
from equipoise_server.commands.bench import main
from equipoise_server.rules import aggregate, build, names

TINY = ("--rows", "8", "--examples", "64", "--turns", "1", "--seconds", "0.01")


@pytest.mark.parametrize("rule", names())
def test_steps_suit_every_rule(rule: str) -> None:
    settings = {"rows": 2, "learning_rate": 0.1} if rule == "trajectory" else {}
    case = Case(rows=16, trainers=1, pipelined=False, num_examples=16, rule=rule, settings=settings)
    made = make_rows(case)
    assert len(made) >= 4
    for rows in made:
        assert sorted(rows.ids) == list(range(16))  # distinct, and in range
        row = 0 if rule == "trajectory" else None
        build(rule, settings).check(aggregate(rows.ids, trajectory_row=row, **rows.statistics))


def test_everything_is_measured_beside_the_echo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    options = ("--trainers", "1,2", "--via", "stubs,aio,client", "--output", str(output))
    assert main([*TINY, *options]) == 0
    found = json.loads(output.read_text())
    told = capsys.readouterr().out
    assert "Reverb did not run: --reverb was not given" in told
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
        if result["contender"] == "echo":
            assert result["rate_ratio"] == 1
            assert result["latency_ratio"] in (1, None)


@pytest.mark.parametrize(
    ("python", "reason"),
    [("/no/such/python", "No such file"), (sys.executable, "has the interpreter dm-reverb?")],
    ids=["no interpreter", "no reverb"],
)
def test_without_reverb_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], python: str, reason: str
) -> None:
    output = tmp_path / "found.json"
    options = ("--modes", "one", "--via", "stubs", "--durability", "behind", "--reverb", python)
    assert main([*TINY, *options, "--output", str(output)]) == 0
    assert reason in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert reason in found["reverb_did_not_run"]
    assert [result["contender"] for result in found["results"]] == ["echo", "behind"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rule", "no_rule"), "no_rule"),
        (("--setting", "floor=7"), "floor"),
        (("--setting", "floor"), "--setting floor: must be KEY=VALUE"),
        (("--rows", "65"), "--rows 65: more than --examples 64"),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], told: str
) -> None:
    assert main([*TINY, *options]) == 2
    assert told in capsys.readouterr().err
