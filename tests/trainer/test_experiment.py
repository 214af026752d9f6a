"""Experiments without a server: choices on guard B, reports, and what the command says of wrong arguments."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from equipoise_trainer.commands import demo, train
from equipoise_trainer.experiment import ExperimentConfig, Run, run_experiment
from equipoise_trainer.methods import parse_methods
from equipoise_trainer.report import FORMAT, print_report, save_report, to_json
from equipoise_trainer.summary import Spread, summarise

CONFIG = ExperimentConfig(
    dataset="digits",
    flipped=0.2,
    seeds=(0, 1),
    methods=("uniform", "uniform-tuned", "target", "oracle"),
    steps=60,
    learning_rate=0.5,
    learning_rates=(0.1, 1.0, 1e4),
)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return list(run_experiment(CONFIG, address=""))


def test_every_method_runs_on_every_seed(runs: Sequence[Run]) -> None:
    assert [(run.seed, run.method) for run in runs] == [(seed, method) for seed in (0, 1) for method in CONFIG.methods]


def test_the_learning_rate_is_the_one_with_the_lowest_guard_loss(runs: Sequence[Run]) -> None:
    for seed in CONFIG.seeds:
        alone = [
            next(
                iter(
                    run_experiment(
                        replace(CONFIG, seeds=(seed,), methods=("uniform",), learning_rate=rate, learning_rates=()),
                        address="",
                    )
                )
            )
            for rate in CONFIG.learning_rates
        ]
        best = min(alone, key=lambda run: run.guard_loss)
        chosen = next(run for run in runs if run.seed == seed and run.method == "uniform-tuned")
        assert chosen.candidate == best.candidate
        assert chosen.candidates == 3
        np.testing.assert_array_equal(chosen.trained.parameters, best.trained.parameters)


def test_runs_are_read_off_where_the_guard_loss_is_lowest(runs: Sequence[Run]) -> None:
    for run in runs:
        assert run.guard_loss == np.nanmin(run.trained.curve.guard_loss)
    for row in summarise(runs):
        own = [run for run in runs if run.method == row.method]
        losses = [float(run.trained.curve.test_loss[run.chosen]) for run in own]
        assert row.test_loss == Spread(mean=np.mean(losses), deviation=np.std(losses, ddof=1))


def test_the_oracle_beats_uniform(runs: Sequence[Run]) -> None:
    rows = {row.method: row for row in summarise(runs)}
    assert rows["oracle"].test_loss.mean < rows["uniform"].test_loss.mean - 0.05


def test_total_steps_count_every_candidate() -> None:
    told: list[int] = []
    small = replace(CONFIG, seeds=(0,), steps=3)
    assert len(list(run_experiment(small, address="", on_step=lambda _, step: told.append(step)))) == 4
    assert len(told) == small.total_steps == 3 * (1 + 3 + 3 + 3)


def test_report_is_plain_json_and_a_picture_with_ink(runs: Sequence[Run], tmp_path: Path) -> None:
    files = save_report(runs, CONFIG, directory=tmp_path / "new" / "folder", server="none")

    def reject(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(files.data.read_text(encoding="utf-8"), parse_constant=reject)
    assert document["format"] == FORMAT
    assert document["config"]["steps"] == 60
    assert document["machine"]["cores"] >= 1
    assert document["versions"]["equipoise"]
    assert [row["method"] for row in document["summary"]] == list(CONFIG.methods)
    assert len(document["runs"]) == 8
    for run in document["runs"]:
        curve = run["curve"]
        assert {len(values) for values in curve.values()} == {61}
        assert run["chosen_step"] == curve["steps"][int(np.argmin(curve["guard_loss"]))]
    picture = matplotlib.image.imread(files.picture)
    assert picture.shape[:2] == (1140, 1950)
    assert 0.01 < float((picture[..., :3].min(axis=2) < 0.8).mean()) < 0.5


def test_diverged_runs_leave_no_nan_in_the_report() -> None:
    wild = replace(CONFIG, seeds=(0,), methods=("uniform",), learning_rate=1e308, learning_rates=(), steps=3)
    with np.errstate(all="ignore"):
        document = to_json(list(run_experiment(wild, address="")), wild, server="none")
    json.dumps(document, allow_nan=False)


def test_the_table_fits_eighty_columns(runs: Sequence[Run]) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(runs, CONFIG, console=console)
    text = console.export_text()
    assert "…" not in text
    assert "oracle (no flips)" in text
    console.file.close()


def test_methods_come_in_the_order_of_the_table() -> None:
    assert parse_methods("oracle, uniform") == ("uniform", "oracle")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "dataset: 'mnist', must be one of digits, paper, paper-noisy"),
        (["--flipped", "1.5"], "flipped: 1.5, must be at least 0 and below 1"),
        (["--seeds", "0"], "seeds: 0, must be at least 1"),
        (["--steps", "0"], "steps: 0, must be at least 1"),
        (["--learning-rate", "-1"], "learning_rate: -1.0, must be a positive number"),
        (["--learning-rates", "1,x"], "learning_rates: '1,x', must be numbers separated by commas"),
        (["--batch", "half"], "batch: 'half', must be full or a whole number of at least 1"),
        (["--set", "floor"], "set: 'floor', must be key=value"),
        (["--set", "floor=0", "--tune", "floor=0,1"], "tune: 'floor' is set as well, must be either set or tuned"),
        (["--methods", "best"], "methods: 'best', must be among uniform, uniform-tuned"),
        (["--methods", "norm-matched"], "methods: norm-matched needs served"),
        (["--when-lost", "panic"], "when_lost: 'panic', must be continue or wait"),
        (["--target-size", "500"], "target_size: 500, must be at most 200 for digits"),
    ],
)
def test_wrong_arguments_name_field_value_and_rule(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["perceptron", *arguments]) == 2
    assert f"equipoise train perceptron: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [train.main, demo.main])
def test_unknown_options_are_usage_errors(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(command)
    assert command(["--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_no_server_is_started_when_none_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seeds", "1", "--steps", "20", "--methods", "uniform,oracle", "--output", str(tmp_path)]
    assert train.main(["perceptron", *options]) == 0
    assert "local" not in capsys.readouterr().out
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_server_that_is_not_there_is_an_error_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seeds", "1", "--steps", "2", "--server", "127.0.0.1:1", "--set", "floor=0.01"]
    status = train.main(["perceptron", *options, "--methods", "served", "--output", str(tmp_path)])
    assert status == 1
    assert "equipoise train perceptron: " in capsys.readouterr().err
