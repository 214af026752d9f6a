"""The guard of a policy, whatever its rule: it moves with guard losses alone, and mixes what is served."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from equipoise_server.engine import Durability, Header, Kind, Outcome, Policy, PolicySpec, Step
from equipoise_server.engine.trainers import Trainers
from equipoise_server.errors import invalid
from equipoise_server.rules import Guard, Statistics, build, names
from tests.server.engine.runs import apply, replay, restore

NUM_EXAMPLES = 40


def policy_of(rule: str, **settings: float | bool) -> Policy:
    needed = {"rows": 3, "learning_rate": 0.01} if rule == "trajectory" else {}
    bound = build(rule, needed | settings)
    of = PolicySpec(
        name="policy",
        num_examples=NUM_EXAMPLES,
        rule=rule,
        settings=bound.settings,
        durability=Durability.LOGGED,
        reference_nats=None,
    )
    state = bound.init(NUM_EXAMPLES, device=torch.device("cpu"))
    return Policy(of, "uid", rule=bound, state=state, trainers=Trainers(86_400.0, 10_000))


def told(rule: str, count: int, *, guard_loss: float | None = None) -> Iterator[Step]:
    """Steps with all that the rule reads; the guard loss falls."""
    random = np.random.default_rng(3)
    for index in range(count):
        rows = random.standard_normal((3, NUM_EXAMPLES)).astype(np.float32)
        if rule == "learnability":
            attempts = random.integers(1, 9, NUM_EXAMPLES)
            statistics = Statistics(ids=None, successes=random.integers(0, attempts + 1), attempts=attempts)
        else:
            statistics = Statistics(
                ids=None,
                contributions=rows[0],
                losses=rows[1],
                reference_losses=rows[2] if rule in ("excess_loss", "rho") else None,
                trajectory_row=1 if rule == "trajectory" else None,
            )
        loss = None if guard_loss is None else guard_loss / (index + 1)
        yield Step(kind=Kind.STEP, statistics=statistics, guard_loss=loss)


def served(policy: Policy, given: Iterator[Step]) -> list[np.ndarray]:
    answers = [apply(policy, step, now=0.0)[0] for step in given]
    assert all(answer.outcome is Outcome.APPLIED for answer in answers)
    return [answer.weights for answer in answers]


@pytest.mark.parametrize("rule", names())
def test_g_mixes_what_is_served_whatever_the_rule(rule: str) -> None:
    guarded, free = policy_of(rule, guard=True), policy_of(rule, guard=False)
    strengths = []
    for step in told(rule, 12, guard_loss=2.0):
        [weights], [own] = served(guarded, iter([step])), served(free, iter([step]))
        strengths.append(guarded.status().guard_strength)
        if strengths[-1] == 1.0:
            np.testing.assert_array_equal(weights, np.ones(NUM_EXAMPLES))
            assert guarded.status().effective_examples == pytest.approx(NUM_EXAMPLES)
        else:
            np.testing.assert_array_equal(weights, own)
    assert strengths == [0.0] * 7 + [1.0] * 2 + strengths[9:]
    assert free.status().guard_strength == 0.0
    assert free.state.guard == Guard()


@pytest.mark.parametrize("rule", names())
def test_steps_without_a_guard_loss_leave_the_guard_alone(rule: str) -> None:
    policy = policy_of(rule, guard=True)
    served(policy, told(rule, 8, guard_loss=2.0))
    before = policy.state.guard
    assert before.trial
    served(policy, told(rule, 20))
    assert policy.state.guard == before
    assert policy.status().guard_strength == 1.0


@pytest.mark.parametrize("rule", names())
def test_the_log_replays_to_the_same_guard(rule: str) -> None:
    live, replayed = policy_of(rule, guard=True), policy_of(rule, guard=True)
    for step in [*told(rule, 30, guard_loss=2.0), Step(kind=Kind.STEP, guard_loss=3.0)]:  # the last: a loss alone
        _, entry = apply(live, step, now=0.0)
        assert entry is not None
        replay(replayed, entry)
    assert live.state.guard.count == 31
    assert replayed.state.guard == live.state.guard
    assert replayed.status() == live.status()


def test_entries_that_the_header_already_holds_do_not_move_the_guard_again() -> None:
    live, restored = policy_of("ema_sign"), policy_of("ema_sign")
    entries = [apply(live, step, now=0.0)[1] for step in told("ema_sign", 20, guard_loss=2.0)]
    for entry in entries[:12]:
        replay(restored, entry)
    header = Header.from_fields(restored.header.to_fields())
    again = policy_of("ema_sign")  # its page was never written: it replays from the first entry on
    restore(again, header, {})
    for entry in entries:
        replay(again, entry)
    assert again.state.guard == live.state.guard
    np.testing.assert_array_equal(again.weights(None), live.weights(None))


def test_a_refused_step_does_not_move_the_guard() -> None:
    policy = policy_of("ema_sign")
    refused = Step(kind=Kind.REFUSED, trainer_id="t", sequence=1, guard_loss=1.0, error=invalid("A", "b", "c"))
    apply(policy, refused, now=0.0)
    unusable = next(told("ema_sign", 1, guard_loss=1.0))
    assert unusable.statistics is not None
    wrong = replace(unusable.statistics, contributions=np.full(NUM_EXAMPLES, np.inf, np.float32))
    step = replace(unusable, statistics=wrong, trainer_id="t", sequence=2)
    assert apply(policy, step, now=0.0)[0].outcome is Outcome.REFUSED
    assert policy.state.guard == Guard()


def test_an_offline_search_has_no_guard_unless_asked_for() -> None:
    policy = policy_of("trajectory")
    served(policy, told("trajectory", 10, guard_loss=2.0))
    assert policy.state.guard == Guard()
