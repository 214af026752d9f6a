"""The trainer against a real server process with its own Redis."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from equipoise_trainer.commands import demo
from equipoise_trainer.commands.demo import Accident
from equipoise_trainer.experiment import ExperimentConfig, run_experiment
from equipoise_trainer.summary import summarise, summarise_served
from tests.servers import ServerProcess, serve

CONFIG = ExperimentConfig(
    dataset="digits",
    flipped=0.2,
    seeds=(0,),
    methods=("uniform", "norm-matched", "served"),
    steps=120,
    learning_rate=1.0,
    settings={"ema_decay": 0.99, "guard": False},
    when_lost="wait",
)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as server:
        yield server


def test_served_weights_find_the_flips_and_every_step_arrives(server: ServerProcess) -> None:
    runs = list(run_experiment(CONFIG, address=server.address))
    served = next(run for run in runs if run.method == "served")
    assert served.facts is not None
    assert (served.facts.steps_sent, served.facts.version, served.facts.served) == (120, 120, 120)
    assert served.facts.settings["ema_decay"] == 0.99
    assert served.auroc is not None
    assert served.auroc > 0.75
    curve = served.trained.curve
    assert curve.flipped_share[-1] < 0.15
    assert served.facts.effective_examples == pytest.approx(curve.effective_examples[-1], rel=1e-6)
    rows = {row.method: row for row in summarise(runs)}
    assert rows["served"].test_loss.mean < rows["uniform"].test_loss.mean
    matched = next(run for run in runs if run.method == "norm-matched")
    np.testing.assert_allclose(matched.trained.gradient_norms, served.trained.gradient_norms, rtol=1e-12)
    summary = summarise_served(runs)
    assert summary is not None
    assert summary.accelerations is not None


def test_mini_batches_are_served_too(server: ServerProcess) -> None:
    config = replace(CONFIG, methods=("served",), batch_size=200, steps=60)
    (run,) = run_experiment(config, address=server.address)
    assert run.facts is not None
    assert run.facts.version == 60
    # The curve holds the weights of all examples, though a step carries 200.
    assert run.facts.effective_examples == pytest.approx(run.trained.curve.effective_examples[-1], rel=1e-6)


def test_a_killed_run_equals_an_undisturbed_one_bit_for_bit(server: ServerProcess) -> None:
    config = replace(CONFIG, methods=("served",))
    accident = Accident(server, at_step=60)
    (killed,) = run_experiment(config, address=server.address, on_step=accident.on_step)
    accident.join()
    assert accident.down_s is not None
    assert accident.down_s >= 1
    (undisturbed,) = run_experiment(config, address=server.address)
    assert killed.facts is not None
    assert killed.facts.reconnects >= 1
    assert killed.facts.version == killed.facts.durable_version == killed.facts.steps_sent == 120
    np.testing.assert_array_equal(killed.trained.weights, undisturbed.trained.weights)
    np.testing.assert_array_equal(killed.trained.parameters, undisturbed.trained.parameters)
    assert killed.auroc == undisturbed.auroc


def test_live_metrics_name_the_policy(server: ServerProcess) -> None:
    (run,) = run_experiment(replace(CONFIG, methods=("served",), steps=5), address=server.address)
    lines = demo.policy_metrics(server.metrics_address, run.facts)
    assert run.facts is not None
    assert f'equipoise_server_policy_version{{policy="{run.facts.policy}"}} 5.0' in lines
    assert len(lines) == len(demo.METRICS_SHOWN)


def test_the_demo_tells_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--seeds", "1", "--steps", "60", "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "At step 30 of the first served run the server was killed with SIGKILL" in told
    assert "60 steps sent, 60 applied, 60 durable: nothing lost." in told
    assert "equal bit for bit" in told
    assert "served (ema_sign)" in told
    assert "equipoise_server_policy_version{" in told
    assert str(tmp_path / "report.png") in told
    assert (tmp_path / "report.json").stat().st_size > 1000
