"""`equipoise train images` against a real server process."""

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import pytest
import torch

from equipoise import PolicySpec
from equipoise.torch import TrainingOptions
from equipoise_trainer.commands import train
from equipoise_trainer.images.data import make_task
from equipoise_trainer.images.network import Schedule, score
from equipoise_trainer.images.report import summarise
from equipoise_trainer.images.rivals import RIVALS, cleanlab_is_installed
from equipoise_trainer.images.runs import TITLES, ExperimentConfig, parse_methods, run_experiment
from equipoise_trainer.images.served import served
from tests.servers import ServerProcess, serve


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as server:
        yield server


@pytest.mark.parametrize("norm_matched", [False, True])
def test_under_uniform_weights_a_served_run_is_the_uniform_one(server: ServerProcess, norm_matched: bool) -> None:
    """Bit for bit: the same network, order and steps, whatever is measured beside them."""
    torch.set_num_threads(1)
    task = make_task(noise="confused", share=0.3, seed=1)
    schedule = Schedule(epochs=2, batch=32, learning_rate=1e-3, seed=1)
    spec = PolicySpec(name=f"as-uniform-{norm_matched}".lower(), num_examples=len(task.train), rule="uniform")
    outcome, facts = served(
        task, schedule, address=server.address, spec=spec, options=TrainingOptions(norm_matched=norm_matched)
    )
    plain = RIVALS["uniform"](task, schedule, 0.3)
    expected = dict(plain.trained.network.state_dict())
    torch.testing.assert_close(dict(outcome.trained.network.state_dict()), expected, rtol=0, atol=0)
    assert outcome.trained.curve == plain.trained.curve
    assert (facts["steps"], facts["not_served"]) == (2 * (len(task.train) // 32), 0)


def test_the_command_compares_all_methods(
    server: ServerProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["images", "--server", server.address, "--epochs", "2", "--seeds", "2", "--output", str(tmp_path)]
    assert train.main([*arguments, "--set", "floor=0.2", "--measure-every", "2"]) == 0
    printed = capfd.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    here = [name for name in TITLES if name != "cleanlab" or cleanlab_is_installed()]
    assert [row["method"] for row in report["summary"]] == here
    assert all(TITLES[name] in printed for name in here)
    assert ("pip install cleanlab" in printed) == (not cleanlab_is_installed())
    losses = {(run["method"], run["seed"]): run["test"]["loss"] for run in report["runs"]}
    assert len(losses) == 2 * len(here)
    for row in report["summary"]:
        expected = [losses[row["method"], seed] - losses["uniform", seed] for seed in (0, 1)]
        assert row["minus_uniform"] == pytest.approx(expected)
    for run in report["runs"]:
        assert len(run["curve"]) == 2
        assert run["curve"][-1] == run["test"]
        assert run["seconds"] > 0
        if run["policy"]:
            strata = run["method"] == "served"
            assert run["policy"]["rule"] == ("strata" if strata else "ema_sign")
            assert run["policy"]["settings"]["floor"] == pytest.approx(0.2 if strata else 0.01)
            losses_first = 2 * (1100 // 32) if strata else 0
            assert run["policy"]["steps"] == losses_first + 2 * (1100 // 32) // (2 if strata else 1)
            assert run["policy"]["not_served"] == 0
    assert matplotlib.image.imread(tmp_path / "report.png").shape[:2] == (900, 1950)


def test_guard_b_chooses_the_learning_rate() -> None:
    """One that is far too small is never taken."""
    config = ExperimentConfig(epochs=2, seeds=(0,), methods=("uniform", "oracle"), learning_rates=(1e-6, 1e-3))
    told: list[str] = []
    runs = list(run_experiment(config, address="", on_run=lambda method, _count: told.append(method)))
    assert [run.learning_rate for run in runs] == [1e-3, 1e-3]
    assert told == ["uniform", "uniform", "oracle", "oracle"]
    assert config.num_runs == 4
    task = make_task(noise="confused", share=0.3, seed=0)
    again = RIVALS["oracle"](task, Schedule(epochs=2, batch=32, learning_rate=1e-3, seed=0), 0.3)
    assert runs[1].guard_loss == pytest.approx(score(again.trained.network, task.guard).loss, rel=1e-4)
    rows = summarise(runs)
    assert rows[0].minus_uniform == (0.0,)
    assert rows[1].auroc == (1.0,)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--noise", "loud"], "noise: 'loud', must be one of confused, random"),
        (["--wrong", "1"], r"wrong: 1.0, must be at least 0 and below 1"),
        (["--epochs", "0"], "epochs: 0, must be at least 1"),
        (["--measure-every", "-1"], "measure_every = -1: must be an integer of at least 0"),
        (["--refresh-every", "0"], "refresh_every = 0: must be an integer of at least 1"),
        (["--momentum", "1"], "momentum = 1.0: must be in [0, 1)"),
        (["--methods", "magic"], "methods: 'magic', must be among uniform, served"),
        (["--learning-rates", "2"], r"learning_rates: \[2.0\], must be at least one, in (0, 1)"),
    ],
)
def test_wrong_arguments_are_named(option: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main(["images", *option]) == 2
    assert f"equipoise train images: {message}".replace("\\", "") in capfd.readouterr().err


def test_what_is_not_installed_is_left_out_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equipoise_trainer.images.runs.cleanlab_is_installed", lambda: False)
    assert parse_methods("") == tuple(name for name in TITLES if name != "cleanlab")
    with pytest.raises(ValueError, match="methods: 'cleanlab', needs its package: pip install cleanlab"):
        parse_methods("uniform,cleanlab")
