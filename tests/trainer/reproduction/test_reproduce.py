"""`equipoise reproduce`: small runs, their page, and going on after being killed."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from equipoise import PolicyAdmin
from equipoise_trainer.commands.reproduce import main
from equipoise_trainer.reproduction.runs import FinishedRun
from equipoise_trainer.reproduction.studies import STUDIES, parse_studies
from tests.servers import serve

SMALL = ["--steps", "12", "--policy-epochs", "2", "--seeds", "1"]
ALONE = ["--rows", "local", "--no-online"]


def test_small_runs_make_a_page_that_needs_no_other_file(tmp_path: Path) -> None:
    wanted = ["perceptron", *SMALL, *ALONE, "--studies", "flips-512,planted-4096", "--output", str(tmp_path)]
    assert main(wanted) == 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for number in ("5.50", "2.41", "96.6", "21.2", "93.7", "18.7", "16.7"):
        assert number in page
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    findings = json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))
    assert [each["seed"] for each in findings["perceptron"]["flips-512"]] == [0]
    run = FinishedRun.load(tmp_path / "perceptron" / "flips-512" / "seed-0")
    assert findings["perceptron"]["flips-512"][0]["compression"][1] == pytest.approx(math.log(2) / run.final.area)
    assert run.final.area < run.uniform.area
    assert [each.epoch for each in run.measures] == [0, 1, 2]
    assert np.isnan(run.final.group_weight).all()
    planted = FinishedRun.load(tmp_path / "perceptron" / "planted-4096" / "seed-0")
    assert planted.planted.groups.shape == (32, 8)
    assert np.isfinite(planted.final.group_weight).all()
    # What is finished is not run again.
    before = (tmp_path / "perceptron" / "flips-512" / "seed-0" / "run.json").stat().st_mtime_ns
    assert main(wanted) == 0
    assert (tmp_path / "perceptron" / "flips-512" / "seed-0" / "run.json").stat().st_mtime_ns == before


def test_a_served_run_that_was_stopped_goes_on_and_leaves_no_policy_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve() as server, PolicyAdmin(server.address) as admin:
        wanted = ["perceptron", *SMALL, "--studies", "flips-512", "--output", str(tmp_path), "--server", server.address]
        assert main([*wanted, "--minutes", "0"]) == 0
        assert "stopped after row 11; the same command goes on" in capsys.readouterr().out
        assert [admin.get(each.spec.name).version for each in admin.list_policies()] == [1]
        assert main(wanted) == 0
        assert list(admin.list_policies()) == []
    served = FinishedRun.load(tmp_path / "perceptron" / "flips-512" / "seed-0")
    assert served.rows == "on the server"
    assert served.online is not None
    assert served.online.target_loss[0] == pytest.approx(math.log(2))
    np.testing.assert_array_equal(served.online.steps, np.arange(13))
    assert served.online.effective < 4000  # of 4096: its weights are not uniform any more
    assert main([*wanted[:-4], "--output", str(tmp_path / "alone"), *ALONE]) == 0
    alone = FinishedRun.load(tmp_path / "alone" / "perceptron" / "flips-512" / "seed-0")
    np.testing.assert_allclose(served.final.target_loss, alone.final.target_loss, rtol=1e-5)


@pytest.mark.slow
def test_a_run_that_was_terminated_takes_its_server_along_and_goes_on(tmp_path: Path) -> None:
    large = ["--steps", "600", "--policy-epochs", "3", "--seeds", "1"]  # long enough to be terminated in time
    wanted = ["perceptron", *large, "--studies", "flips-512", "--no-online", "--output", str(tmp_path)]
    first = subprocess.Popen([sys.executable, "-m", "equipoise", "reproduce", *wanted], stdout=subprocess.DEVNULL)
    folder = tmp_path / "perceptron" / "flips-512" / "seed-0"
    end = time.monotonic() + 300
    while not (folder / "rows.json").exists():  # it has fetched the rows of its first policy epoch
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    first.terminate()
    assert first.wait(120) == 128 + signal.SIGTERM
    assert not (folder / "run.json").exists()
    assert main(wanted) == 0
    assert FinishedRun.load(folder).rows == "on the server"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--studies", "nonsense"], "studies: 'nonsense', must be all, or among paper-512"),
        (["--rows", "here"], "rows: 'here', must be served or local"),
        (["--steps", "0"], "rows: 0, must be at least 1"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["perceptron", *arguments, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_all_studies_can_be_made() -> None:
    assert [study.name for study in parse_studies("all")] == list(STUDIES)
    task, planted = STUDIES["planted-4096"].task(0)
    assert len(task.target) == 4096
    assert planted.easy.sum() == 128
