"""The deterministic machine: the same steps give the same policy, live, fused or from the log."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from equipoise_server.engine import Header, Kind, Outcome, Policy, PolicySpec, Step, tables
from equipoise_server.engine.trainers import MAX_REFUSED, Trainers
from equipoise_server.errors import ServiceError, invalid
from equipoise_server.rules import Statistics, build, names
from equipoise_server.store import LogEntry
from tests.server.engine.runs import PAGE, apply, replay, restore, spec, steps

ONLINE = [name for name in names() if name != "trajectory"]


def fresh(of: PolicySpec) -> Policy:
    rule = build(of.rule, of.settings)
    state = rule.init(of.num_examples, device=torch.device("cpu"))
    return Policy(of, "uid", rule=rule, state=state, trainers=Trainers(86_400.0, 10_000))


def run(policy: Policy, given: list[Step]) -> list[LogEntry]:
    entries = [apply(policy, step, now=float(step.sequence))[1] for step in given]
    return [entry for entry in entries if entry is not None]


def same_bits(left: Policy, right: Policy) -> bool:
    return all(torch.equal(left.state.columns[name], right.state.columns[name]) for name in left.state.columns)


@pytest.mark.parametrize("rule", ONLINE)
def test_the_log_replays_to_the_same_bits(rule: str) -> None:
    of = spec(rule=rule, num_examples=5000)
    live, replayed = fresh(of), fresh(of)
    for entry in run(live, list(islice(steps(of.num_examples, rule=rule), 30))):
        replay(replayed, entry)
    assert same_bits(live, replayed)
    assert replayed.state.scalars == live.state.scalars
    assert replayed.progress == live.progress
    assert replayed.trainers.known == live.trainers.known
    assert replayed.state.guard == live.state.guard
    np.testing.assert_array_equal(live.weights(None), replayed.weights(None))


@pytest.mark.parametrize("rule", ONLINE)
def test_pages_captured_at_different_versions_replay_to_the_same_bits(rule: str) -> None:
    of = spec(rule=rule)
    live, restored = fresh(of), fresh(of)
    given = list(islice(steps(of.num_examples, rule=rule, batch=2000), 12))
    entries = run(live, given[:4])
    pages = range(live.state.num_pages)
    captured = {index: live.capture_page(index) for index in pages if index == 0}
    entries += run(live, given[4:8])
    captured |= {index: live.capture_page(index) for index in pages if index == 2}  # page 1 was never captured
    entries += run(live, given[8:])
    for index, (_, columns) in captured.items():
        tables.load_page(restored.state, index, columns)
    restore(restored, restored.header, {index: version for index, (version, _) in captured.items()})
    for entry in entries:
        replay(restored, entry)
    assert same_bits(live, restored)
    assert (restored.state.scored, restored.state.raw_sum) == (live.state.scored, live.state.raw_sum)
    assert restored.state.raw_square_sum == live.state.raw_square_sum
    assert restored.state.scalars == live.state.scalars
    assert restored.status() == live.status()
    assert restored.state.guard == live.state.guard
    assert restored.version == 12


def test_what_a_step_showed_is_replayed_though_its_page_is_ahead_already() -> None:
    of = spec(num_examples=1000)
    live, restored = fresh(of), fresh(of)
    entries = run(live, list(islice(steps(of.num_examples), 10)))
    version, columns = live.capture_page(0)
    tables.load_page(restored.state, 0, columns)
    restore(restored, restored.header, {0: version})
    for entry in entries:
        replay(restored, entry)
    assert live.progress.sim is not None
    assert restored.status() == live.status()


def test_a_page_is_dirty_exactly_when_it_changed_since_it_was_stored() -> None:
    of = spec()
    policy = fresh(of)
    one_page = Statistics(ids=np.array([PAGE + 3]), contributions=np.array([1.0], np.float32))
    apply(policy, Step(kind=Kind.STEP, statistics=one_page), now=0.0)
    assert policy.dirty_pages.tolist() == [False, True, False]
    version, _ = policy.capture_page(1)
    assert policy.dirty_pages.any()  # nobody knows yet whether it reached the store
    policy.stored_at[1] = version
    assert not policy.dirty_pages.any()


def test_a_duplicate_changes_nothing_and_is_answered_with_the_weights_of_now() -> None:
    of = spec(num_examples=1000)
    policy = fresh(of)
    first, second = islice(steps(of.num_examples), 2)
    run(policy, [first, second])
    before = policy.weights(None)
    answer, entry = apply(policy, first, now=9.0)
    assert (answer.outcome, answer.version, entry) == (Outcome.DUPLICATE, 2, None)
    assert answer.weights is not None
    np.testing.assert_array_equal(answer.weights, before[first.weights_for])
    np.testing.assert_array_equal(policy.weights(None), before)


@pytest.mark.parametrize("rule", ["boltzmann", "loss_linear_upper"])
def test_a_batch_rule_answers_its_own_rows_keeps_no_page_and_reads_uniform(rule: str) -> None:
    of = spec(rule=rule, num_examples=10**12)
    policy = fresh(of)
    assert policy.state.num_pages == len(policy.dirty_pages) == 0
    first, second = islice(steps(1000), 2)
    answer, entry = apply(policy, first, now=0.0)
    assert entry is not None
    assert answer.weights is not None
    assert answer.weights.std() > 0.1
    assert np.mean(answer.weights, dtype=np.float64) == pytest.approx(1.0, abs=1e-6)
    again, nothing = apply(policy, first, now=0.0)
    assert (again.outcome, nothing) == (Outcome.DUPLICATE, None)
    np.testing.assert_array_equal(again.weights, answer.weights)
    elsewhere, _ = apply(policy, replace(second, weights_for=np.array([10**12 - 1])), now=0.0)
    assert elsewhere.weights.tolist() == [1.0]
    read, _ = apply(policy, Step(kind=Kind.READ, weights_for=first.weights_for), now=0.0)
    assert (read.weights == 1.0).all()
    status = policy.status()
    assert (status.scored_examples, status.table_bytes) == (0, 0)
    assert 1.0 <= status.effective_examples <= 200.0
    assert status.progress.largest_weight > 1.0
    assert status.progress.sim is not None


def test_a_gap_names_the_expected_sequence_and_changes_nothing() -> None:
    of = spec(num_examples=1000)
    policy = fresh(of)
    third = list(islice(steps(of.num_examples), 3))[2]
    with pytest.raises(ServiceError, match="next step is 1") as caught:
        apply(policy, third, now=0.0)
    assert caught.value.metadata == {"expected_sequence": "1"}
    assert policy.version == 0


def test_a_refused_step_consumes_its_sequence_and_nothing_else() -> None:
    of = spec(num_examples=1000)
    policy, without = fresh(of), fresh(of)
    first, _, third = islice(steps(of.num_examples), 3)
    refused = Step(kind=Kind.REFUSED, trainer_id="trainer", sequence=2, error=invalid("NON_FINITE_STAT", "c", "nan"))
    answers = [apply(policy, step, now=0.0)[0] for step in (first, refused, third)]
    assert [answer.outcome for answer in answers] == [Outcome.APPLIED, Outcome.REFUSED, Outcome.APPLIED]
    assert [answer.version for answer in answers] == [1, 2, 3]
    run(without, [first])
    apply(without, Step(kind=Kind.STEP, statistics=third.statistics), now=0.0)
    assert same_bits(policy, without)


def test_a_refused_step_that_is_sent_again_is_refused_again() -> None:
    policy = fresh(spec(num_examples=1000))
    error = invalid("NON_FINITE_STAT", "c", "nan")
    refused = Step(kind=Kind.REFUSED, trainer_id="trainer", sequence=1, error=error, wants_weights=False)
    apply(policy, refused, now=0.0)
    answer, entry = apply(policy, refused, now=0.0)
    assert (answer.outcome, answer.error, answer.version, entry) == (Outcome.REFUSED, error, 1, None)


def test_many_steps_in_one_call_equal_single_calls() -> None:
    of = spec(num_examples=3000)
    fused, single = fresh(of), fresh(of)
    given = list(islice(steps(of.num_examples), 20))
    fused_answers = [apply(fused, step, now=0.0, with_evidence=step is given[-1])[0] for step in given]
    single_answers = [apply(single, step, now=0.0)[0] for step in given]
    for left, right in zip(fused_answers, single_answers, strict=True):
        np.testing.assert_array_equal(left.weights, right.weights)
    assert same_bits(fused, single)
    assert fused.status() == single.status()


def test_the_compression_ratio_is_reference_over_mean_target_loss() -> None:
    of = spec(num_examples=1000)
    policy = fresh(of)
    run(policy, list(islice(steps(of.num_examples), 4)))
    mean = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    assert policy.progress.compression_ratio(of.reference_nats) == pytest.approx(2.0 / mean)
    assert policy.progress.compression_ratio(None) is None


def infinite(sequence: int, *, in_stream: bool) -> Step:
    """A step that only the rule finds wrong."""
    statistics = Statistics(ids=np.array([3]), contributions=np.array([np.inf], np.float32))
    return Step(
        kind=Kind.STEP, trainer_id="trainer", sequence=sequence, statistics=statistics, in_stream=in_stream,
        weights_for=statistics.ids,
    )  # fmt: skip


def test_a_step_that_the_rule_refuses_outside_of_a_stream_is_an_error_and_consumes_nothing() -> None:
    policy = fresh(spec(num_examples=1000))
    with pytest.raises(ServiceError) as caught:
        apply(policy, infinite(1, in_stream=False), now=0.0)
    assert caught.value.reason == "UNUSABLE_STATISTICS"
    assert (policy.version, policy.trainers.last_sequence("trainer")) == (0, 0)


def test_a_step_that_the_rule_refused_is_refused_again_also_from_the_log_and_from_the_header() -> None:
    of = spec(num_examples=1000)
    policy, replayed, restored = fresh(of), fresh(of), fresh(of)
    answer, entry = apply(policy, infinite(1, in_stream=True), now=0.0)
    assert answer.outcome is Outcome.REFUSED
    assert entry is not None
    replay(replayed, entry)
    restore(restored, Header.from_fields(policy.header.to_fields()), {})
    for again in (policy, replayed, restored):
        answer, nothing = apply(again, infinite(1, in_stream=True), now=0.0)
        assert (answer.outcome, answer.version, nothing) == (Outcome.REFUSED, 1, None)
        assert answer.error is not None
        assert answer.error.reason == "UNUSABLE_STATISTICS"
        assert answer.weights is None


def test_refusals_are_not_remembered_without_end() -> None:
    trainers = Trainers(86_400.0, 10_000)
    for sequence in range(1, 1001):
        trainers.record("trainer", sequence, 0.0, refused="NON_FINITE_STAT")
    assert trainers.refusal("trainer", 1000) == "NON_FINITE_STAT"
    assert len(trainers.known["trainer"].refused) == MAX_REFUSED


@pytest.mark.parametrize("together", [False, True])
def test_what_a_step_showed_stays_when_a_loss_is_reported_alone(together: bool) -> None:
    """However the two were fused: together, no evidence is made for the second."""
    of = spec(num_examples=1000)
    policy = fresh(of)
    first = next(steps(of.num_examples))
    loss = Step(kind=Kind.STEP, trainer_id="trainer", sequence=2, target_loss=1.0, wants_weights=False)
    apply(policy, first, now=0.0)
    shown = policy.progress
    apply(policy, loss, now=0.0, with_evidence=not together)
    assert shown.sim is not None
    assert (policy.progress.sim, policy.progress.positive_share) == (shown.sim, shown.positive_share)
    assert policy.progress.largest_weight == shown.largest_weight
