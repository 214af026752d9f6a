"""The checker finds what it is there to find, and nothing in a run that went well."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from equipoise import Outcome
from equipoise_server.rules import build
from tests.e2e.faults.aof import Log, LoggedVersion, commands, read_log
from tests.e2e.faults.checker import Findings, Model, check
from tests.e2e.faults.history import Answered, History, Sent

NUM_EXAMPLES = 20
TRAINERS = ("a", "b")


def sent(random: np.random.Generator, *, complete: bool) -> Sent:
    ids = random.integers(0, NUM_EXAMPLES, 5)
    contributions = random.standard_normal(5).astype(np.float32) if complete else None
    return Sent(ids=ids, contributions=contributions, losses=random.random(5).astype(np.float32))


@pytest.fixture
def run() -> tuple[History, Log]:
    """Two trainers in turn, ten steps each, each answered at once; every seventh is refused."""
    random, history, log = np.random.default_rng(0), History(), Log(taken_over_at={1: 0})
    model = Model.of(build("ema_sign", {}), NUM_EXAMPLES)
    for version in range(1, 21):
        trainer_id = TRAINERS[version % 2]
        step = sent(random, complete=bool(version % 7))
        taken = model.take(step)
        history.sent[trainer_id].append(step)
        sequence = len(history.sent[trainer_id])
        log.entries.append(LoggedVersion(version=version, trainer_id=trainer_id, sequence=sequence, refused=not taken))
        answer = Answered(
            sequence=sequence,
            outcome=Outcome.APPLIED if taken else None,
            epoch=1,
            version=version,
            durable_sequence=sequence,
            ids=step.ids,
            weights=model.rule.weights(model.state, step.ids),
        )
        history.answered[trainer_id].append(answer)
    return history, log


def findings(history: History, log: Log) -> Findings:
    return check(history, log, rule=build("ema_sign", {}), num_examples=NUM_EXAMPLES)


def violations(history: History, log: Log) -> str:
    return "; ".join(findings(history, log).violations)


def change(history: History, position: int, **changes: object) -> None:
    answers = history.answered["a"]
    answers[position] = replace(answers[position], **changes)  # type: ignore[arg-type]


def test_a_good_run_has_no_violations(run: tuple[History, Log]) -> None:
    found = findings(*run)
    assert (found.violations, found.compared, found.model.version) == ([], 18 * 5, 20)


def test_a_durable_step_that_is_missing(run: tuple[History, Log]) -> None:
    history, log = run
    lost = log.entries.pop()
    assert f"step 10 of {lost.trainer_id} was acknowledged as durable and is missing" in violations(history, log)


def test_a_durable_step_that_is_missing_after_a_takeover(run: tuple[History, Log]) -> None:
    history, log = run
    lost = log.entries.pop()
    log.taken_over_at[2] = log.entries[-1].version
    assert f"step 10 of {lost.trainer_id} was acknowledged as durable and is missing" in violations(history, log)


def test_a_step_applied_twice(run: tuple[History, Log]) -> None:
    history, log = run
    log.entries.append(replace(log.entries[-1], version=21))
    assert "version 21: step 10 of a was applied twice" in violations(history, log)


def test_steps_of_a_trainer_out_of_order(run: tuple[History, Log]) -> None:
    history, log = run
    log.entries[2], log.entries[4] = (
        replace(log.entries[2], sequence=log.entries[4].sequence),
        replace(log.entries[4], sequence=log.entries[2].sequence),
    )
    assert "version 3: step 3 of b comes before 2" in violations(history, log)


def test_a_gap_between_versions(run: tuple[History, Log]) -> None:
    history, log = run
    log.entries[-1] = replace(log.entries[-1], version=22)
    assert "entry 20 of the log has version 22" in violations(history, log)


def test_a_version_that_went_back(run: tuple[History, Log]) -> None:
    history, log = run
    change(history, 5, version=2)
    assert "(epoch, version) went back from (1, 10) to (1, 2)" in violations(history, log)


def test_an_epoch_that_went_back(run: tuple[History, Log]) -> None:
    history, log = run
    log.taken_over_at[2] = 20
    change(history, 4, epoch=2)
    assert "(epoch, version) went back from (2, 10) to (1, 12)" in violations(history, log)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_a_weight_that_no_policy_has(run: tuple[History, Log], weight: float) -> None:
    history, log = run
    change(history, 3, weights=np.full(5, weight, np.float32))
    assert "a weight is not finite or negative" in violations(history, log)


def test_a_weight_off_by_one_bit(run: tuple[History, Log]) -> None:
    history, log = run
    weights = history.answered["a"][3].weights
    change(history, 3, weights=np.nextafter(weights, np.float32(9)))
    assert "a, step 4, version 8: weights" in violations(history, log)


def test_an_answer_whose_version_was_never_logged_promises_nothing(run: tuple[History, Log]) -> None:
    history, log = run
    log.taken_over_at[2] = 20
    history.answered["a"].append(replace(history.answered["a"][-1], version=23, weights=np.ones(5, np.float32)))
    found = findings(history, log)
    assert (found.violations, found.forgone) == ([], 1)
    log.taken_over_at.clear()
    assert "answers of version 23, which is not in the log" in violations(history, log)


def test_an_answer_that_an_orderly_stop_did_not_write(run: tuple[History, Log]) -> None:
    history, log = run
    log.taken_over_at[2] = 20
    history.answered["a"].append(replace(history.answered["a"][-1], version=23, weights=np.ones(5, np.float32)))
    found = check(history, log, rule=build("ema_sign", {}), num_examples=NUM_EXAMPLES, orderly={1})
    assert found.violations == [
        "a, step 10, epoch 1, version 23: was answered before an orderly stop, and is not in the log"
    ]
    assert check(history, log, rule=build("ema_sign", {}), num_examples=NUM_EXAMPLES, orderly={2}).violations == []


def test_a_refusal_that_the_rule_does_not_share(run: tuple[History, Log]) -> None:
    history, log = run
    log.entries[3] = replace(log.entries[3], refused=True)
    assert "version 4:" in violations(history, log)


def test_the_last_command_of_a_file_may_be_cut(tmp_path: Path) -> None:
    whole = b"*2\r\n$3\r\nDEL\r\n$1\r\na\r\n"
    for end in range(1, len(whole)):
        assert list(commands(whole + whole[:end])) == [[b"DEL", b"a"]]
    file = tmp_path / "appendonly.aof"
    owner = b"*4\r\n$7\r\nHINCRBY\r\n$9\r\n{p}:owner\r\n$5\r\nepoch\r\n$1\r\n1\r\n"
    entry = b"*5\r\n$4\r\nXADD\r\n$7\r\n{p}:log\r\n$3\r\n1-0\r\n$2\r\nat\r\n$1\r\n0\r\n"
    file.write_bytes(owner + entry + owner + whole)
    log = read_log(file, policy="p")
    assert ([entry.version for entry in log.entries], log.taken_over_at) == ([1], {1: 0, 2: 1})


def test_a_model_that_has_taken_the_first_steps_goes_on_from_there(run: tuple[History, Log]) -> None:
    history, log = run
    rule = build("ema_sign", {})
    begun = Model.of(rule, NUM_EXAMPLES)
    for entry in log.entries[:8]:
        begun.take(history.sent[entry.trainer_id][entry.sequence - 1])
    for answers in history.answered.values():
        answers[:] = [answer for answer in answers if answer.version > 8]

    def found() -> list[str]:
        return check(history, log, rule=rule, num_examples=NUM_EXAMPLES, begun=begun).violations

    assert not found()
    assert begun.version == 8
    del log.entries[3]
    assert any("missing" in violation for violation in found())
