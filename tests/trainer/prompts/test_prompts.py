"""`equipoise train prompts`: its gradient, what methods draw and pay for, and the command against a real server."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise_trainer.commands import train
from equipoise_trainer.prompts.report import summarise
from equipoise_trainer.prompts.runs import TITLES, ExperimentConfig, Run, run_experiment
from equipoise_trainer.prompts.task import JOBS, Task, rewards_of
from tests.servers import ServerProcess, serve


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serve() as server:
        yield server


@pytest.mark.parametrize("job", list(JOBS))
def test_a_job_has_the_shares_that_it_says(job: str) -> None:
    task = Task.of(JOBS[job], seed=3)
    rates = task.policy.success(task.train)
    assert float((rates == 0.0).float().mean()) == pytest.approx(JOBS[job].unsolvable, abs=0.05)
    assert float((rates > 0.9).float().mean()) > 0.9 * JOBS[job].solved * (1.0 - JOBS[job].unsolvable)
    assert bool(task.judged.solvable.all())
    again = Task.of(JOBS[job], seed=3)
    assert again.train.skills.equal(task.train.skills)
    assert again.policy.logits.equal(task.policy.logits)


def test_answers_are_right_as_often_as_said() -> None:
    task = Task.of(JOBS["rare"], seed=4)
    ids = np.arange(len(task.train))
    answers = task.policy.answers(task.train, ids, group=400, random=torch.Generator().manual_seed(0))
    found = rewards_of(task.train, ids, answers).mean(dim=1)
    expected = task.policy.success(task.train)
    errors = (found - expected) / (expected * (1 - expected) / 400 + 1e-6).sqrt()
    assert float(errors.abs().max()) < 6.0
    assert float(found[expected == 0].max()) == 0.0


def test_the_gradient_is_that_of_advantage_times_log_probability() -> None:
    task = Task.of(JOBS["rare"], seed=5)
    ids = np.arange(12)
    answers = task.policy.answers(task.train, ids, group=4, random=torch.Generator().manual_seed(0))
    rewards = rewards_of(task.train, ids, answers)
    task.policy.loss(task.train, ids, answers, rewards).backward()  # type: ignore[no-untyped-call]
    expected = torch.zeros_like(task.policy.logits)
    chances = task.policy.logits.detach().softmax(dim=1)
    for prompt in ids:
        group = rewards[prompt]
        advantages = (group - group.mean()) / (group.std() + 1e-4)
        for turn in range(4):
            for place in range(JOBS["rare"].longest):
                if task.train.needed[prompt, place]:
                    skill = task.train.skills[prompt, place]
                    chosen = torch.nn.functional.one_hot(answers[prompt, turn, place], chances.shape[1])
                    expected[skill] -= advantages[turn] * (chosen - chances[skill]) / (12 * 4)
    torch.testing.assert_close(task.policy.logits.grad, expected)


def test_a_group_that_is_all_or_nothing_moves_nothing() -> None:
    task = Task.of(JOBS["rare"], seed=6)
    ids = np.flatnonzero(~task.train.solvable.numpy())[:8]
    answers = task.policy.answers(task.train, ids, group=4, random=torch.Generator().manual_seed(0))
    task.policy.loss(task.train, ids, answers, rewards_of(task.train, ids, answers)).backward()  # type: ignore[no-untyped-call]
    assert task.policy.logits.grad is not None
    assert float(task.policy.logits.grad.abs().max()) == 0.0


def test_dropped_completions_are_paid_for_and_runs_repeat(server: ServerProcess) -> None:
    config = ExperimentConfig(seeds=(7,), learning_rates=(30.0,), steps=40, target=0.99)

    def runs() -> dict[str, Run]:
        found = run_experiment(config, address=server.address, on_run=lambda method, count: None)
        return {run.method: run for run in found}

    first = runs()
    assert list(first) == list(TITLES)
    for method, run in first.items():
        step, completions, _ = run.curve[-1]
        assert (run.steps, run.completions, step) == (None, None, 40)
        assert (completions > 40 * 256) == method.endswith("drop")
        assert completions % 256 == 0
    assert first["uniform"].useful < first["served"].useful < first["oracle"].useful
    assert runs() == first


def test_the_command_prints_and_saves_what_was_run(
    server: ServerProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prompts", "--server", server.address, "--seeds", "2", "--job", "shared", "--target", "0.5"]
    arguments += ["--learning-rates", "100", "--methods", "served,uniform", "--set", "exploration=0.2"]
    assert train.main([*arguments, "--output", str(tmp_path)]) == 0
    assert "learnability" in capfd.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["method"] for row in report["summary"]] == ["uniform", "served"]
    assert report["summary"][0]["speedup"] == [1.0, 1.0]
    spent = {(run["method"], run["seed"]): run["completions"] for run in report["runs"]}
    expected = [spent["uniform", seed] / spent["served", seed] for seed in (0, 1)]
    assert report["summary"][1]["speedup"] == pytest.approx(expected)
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_what_did_not_arrive_has_no_speedup() -> None:
    config = ExperimentConfig(methods=("uniform", "drop"), seeds=(0, 1), learning_rates=(1.0,))
    about = {"learning_rate": 1.0, "useful": 0.5, "curve": ()}
    spent = {("uniform", 0): 100, ("uniform", 1): None, ("drop", 0): 200, ("drop", 1): 50}
    runs = [Run(method=m, seed=s, steps=c, completions=c, **about) for (m, s), c in spent.items()]  # type: ignore[arg-type]
    uniform, drop = summarise(runs, config)
    assert (uniform.completions, uniform.speedup) == (None, (1.0, None))
    assert (drop.completions, drop.speedup) == (125, (0.5, None))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--job", "easy"], "job: 'easy', must be one of rare, live, shared"),
        (["--methods", "served,best"], "methods: 'best', must be among"),
        (["--group", "1"], "group: 1, must be at least 2"),
        (["--batch", "2001"], "batch: 2001, must be from 1 to 2000"),
        (["--target", "1"], r"target: 1.0, must be in (0, 1)"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert train.main(["prompts", *arguments]) == 2
    assert said in capfd.readouterr().err
