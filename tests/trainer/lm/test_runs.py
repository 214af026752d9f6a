"""Runs against a real server process."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from equipoise_trainer.commands import train
from equipoise_trainer.lm.experiment import ExperimentConfig, Runs, chosen_rate, run_experiment
from equipoise_trainer.lm.methods import METHODS, parse_methods
from equipoise_trainer.lm.recipes import TextTask
from equipoise_trainer.lm.records import Curve, RunRecord
from equipoise_trainer.lm.report import print_report, save_report, table
from equipoise_trainer.lm.runs import RunPlan, execute
from equipoise_trainer.lm.summary import summarise
from equipoise_trainer.lm.workers import working
from tests.servers import ServerProcess, serve
from tests.trainer.lm.sizes import TINY, tiny_task

PLAN = RunPlan(method="uniform", seed=0, learning_rate=5e-3, steps=28, batch_size=8, log_every=4, checkpoint_every=8)
CONFIG = ExperimentConfig(
    recipe="three-sources",
    preset=TINY,
    seeds=(0, 1),
    methods=("uniform", "norm-matched", "buckets"),
    steps=22,
    batch_size=8,
    learning_rates=(1e-3, 1e-2),
    log_every=6,
    checkpoint_every=10,
)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def task() -> TextTask:
    return tiny_task()


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_pays(method: str, task: TextTask, server: ServerProcess, tmp_path: Path) -> None:
    moves = tuple(np.linspace(0.2, 0.1, 28)) if method == "norm-matched" else None
    plan = replace(PLAN, method=method, policy=f"every-{method}", moves=moves)
    record = execute(plan, task, address=server.address, checkpoint=tmp_path / "run.pt")
    assert record.curve.step == [0, 4, 8, 12, 16, 20, 24, 28]
    assert np.isfinite(record.curve.test_loss).all()
    assert len(record.moves) == 28
    assert record.curve.units[-1] >= 28
    assert (record.curve.units[-1] > 28) == (METHODS[method].kind not in ("plain", "trim") and method != "lin-upper")
    assert (record.facts is not None) == bool(METHODS[method].rule)
    if record.facts is not None:
        assert record.facts["stale"] == 0
        assert record.facts["version"] > 0
    if moves is not None:
        np.testing.assert_allclose(record.moves, moves)
    assert not list(tmp_path.iterdir())  # the checkpoint of a finished run is gone


@pytest.mark.parametrize("method", ["rho", "boltzmann", "sign", "buckets"])
def test_a_resumed_run_equals_one_that_never_stopped(
    method: str, task: TextTask, server: ServerProcess, tmp_path: Path
) -> None:
    def run(policy: str, *, stop_at: int | None = None) -> RunRecord:
        def on_step(step: int) -> None:
            if step == stop_at:
                raise Killed

        plan = replace(PLAN, method=method, policy=policy)
        return execute(plan, task, address=server.address, checkpoint=tmp_path / "run.pt", on_step=on_step)

    undisturbed = run(f"whole-{method}")
    for part, stop in enumerate((13, 27)):  # after the checkpoints at 8 and 24
        with pytest.raises(Killed):
            run(f"part-{part}-{method}", stop_at=stop)
        assert (tmp_path / "run.pt").is_file()
    resumed = run(f"last-{method}")
    assert resumed.curve == undisturbed.curve
    assert resumed.moves == undisturbed.moves
    assert resumed.counts == undisturbed.counts
    assert resumed.table_shares == undisturbed.table_shares
    assert resumed.auroc == undisturbed.auroc


def test_an_experiment_chooses_by_guard_loss_and_is_made_once(server: ServerProcess, tmp_path: Path) -> None:
    told: list[str] = []
    runs = Runs(CONFIG, directory=tmp_path, address=server.address, on_step=lambda method, step: told.append(method))
    chosen = run_experiment(CONFIG, runs)
    assert [(run.method, run.seed) for run in chosen] == [(m, s) for m in CONFIG.methods for s in (0, 1)]
    assert len(told) == CONFIG.total_steps == 22 * (3 + 2 + 3)
    for method in ("uniform", "buckets"):
        tried = [runs.get(CONFIG.plan(method, 0, rate)) for rate in CONFIG.learning_rates]
        best = min(tried, key=lambda run: min(run.curve.guard_loss))
        assert {run.learning_rate for run in chosen if run.method == method} == {best.learning_rate}
    matched, headline = ([run for run in chosen if run.method == method] for method in ("norm-matched", "buckets"))
    np.testing.assert_allclose([run.moves for run in matched], [run.moves for run in headline])

    # A second command finds all of it, and needs no server.
    again = run_experiment(CONFIG, Runs(CONFIG, directory=tmp_path, address="", on_step=None))
    assert again == chosen

    rows = summarise(chosen)
    console = Console(width=80, record=True)
    print_report(chosen, CONFIG, console=console)
    assert "buckets, EG" in console.export_text()
    assert table(rows, CONFIG).row_count == 3
    files = save_report(chosen, CONFIG, directory=tmp_path / "report", server="local")
    document = json.loads(files.data.read_text())
    assert [row["method"] for row in document["summary"]] == list(CONFIG.methods)
    assert matplotlib.image.imread(files.picture).shape[1] == 1950


def test_the_lowest_mean_over_tuned_seeds_decides() -> None:
    losses = {(0.1, 0): 2.0, (0.1, 1): 4.0, (0.2, 0): 3.5, (0.2, 1): 2.0}
    runs = [_run(seed=seed, rate=rate, loss=loss) for (rate, seed), loss in losses.items()]
    assert chosen_rate(runs) == 0.2
    assert chosen_rate(runs[::2]) == 0.1


@pytest.mark.slow  # each process loads torch
def test_several_processes_give_what_one_gives(server: ServerProcess, tmp_path: Path) -> None:
    config = replace(CONFIG, methods=("uniform", "buckets"), learning_rates=(1e-2,), steps=12)
    steps: list[int] = []
    with working(
        config, directory=tmp_path / "two", address=server.address, jobs=2, on_step=lambda _, step: steps.append(step)
    ) as workers:
        together = run_experiment(config, workers)
    assert len(steps) == config.total_steps
    with working(config, directory=tmp_path / "one", address=server.address, jobs=1) as workers:
        alone = run_experiment(config, workers)
    assert [run.curve for run in together] == [run.curve for run in alone]


def test_what_a_policy_costs_is_counted(task: TextTask, server: ServerProcess, tmp_path: Path) -> None:
    plan = replace(PLAN, method="buckets", policy="counted", steps=61)
    record = execute(plan, task, address=server.address, checkpoint=tmp_path / "run.pt")
    batches, scored, heard = 61, 12, 3  # scored at 20, 22, ..., 42; B heard at 44, 52 and 60
    assert record.counts == {
        "plain": 8 * (batches - scored) + 8 * scored,  # trained on, and one batch of target A for each scored one
        "ghost": 8 * scored,
        "one_pass": 0,
        "forward": len(task.guard) * heard,
    }
    assert record.facts is not None
    assert record.facts["version"] == scored + heard


def test_known_sources_are_told_apart(task: TextTask, server: ServerProcess, tmp_path: Path) -> None:
    plan = replace(PLAN, method="sources", policy="known", steps=120, log_every=40, learning_rate=1e-2)
    record = execute(plan, task, address=server.address, checkpoint=tmp_path / "run.pt")
    assert record.table_shares is not None
    assert record.table_shares[0] > 0.5  # a third is uniform's share


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "x"], "recipe: 'x', must be one of clean"),
        (["--preset", "x"], "preset: 'x', must be one of small"),
        (["--corpus", "/nowhere"], "corpus: /nowhere, must be a text file"),
        (["--methods", "uniform,x"], "methods: 'x', must be among uniform"),
        (["--methods", "uniform,norm-matched"], "methods: norm-matched needs buckets"),
        (["--steps", "0"], "steps: 0, must be at least 1"),
        (["--learning-rates", "2"], r"learning_rates: [2.0], must be at least one, in (0, 1)"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["lm", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_methods_come_in_the_order_of_the_table() -> None:
    assert parse_methods("buckets, uniform") == ("uniform", "buckets")


def _run(*, seed: int, rate: float, loss: float) -> RunRecord:
    curve = {"step": [0], "units": [0.0], "guard_loss": [loss], "test_loss": [9.0], "shares": [None]}
    fields = {"method": "uniform", "moves": [], "counts": {}, "seconds": 0.0}
    return RunRecord(seed=seed, learning_rate=rate, curve=Curve(**curve), **fields)  # type: ignore[arg-type]
