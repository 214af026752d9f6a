"""The sync client against a real server on a socket that is killed, falls silent and misbehaves."""

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Any

import grpc
import numpy as np
import pytest

from equipoise import Backoff, Limits, Outcome, PolicyAdmin, PolicyClient, PolicySpec, Source, Timeout, errors
from tests.client.scripted_server import REFUSED_STEP, ScriptedServer, refusal, status_of
from tests.patience import PATIENT

HOPEFUL = replace(PATIENT, close=1.0)
"""Waits for answers, and not for ever for a server that is gone."""
QUICK = replace(HOPEFUL, step=0.5)
"""Does not wait long for one that has fallen silent either."""
PROMPT = Backoff(first=0.01, longest=0.05)


def client_of(server: ScriptedServer, **options: Any) -> PolicyClient:
    defaults: dict[str, Any] = {"policy": "run-7", "num_examples": 10, "timeout": HOPEFUL, "backoff": PROMPT}
    return PolicyClient(server.address, **(defaults | options))


def step(client: PolicyClient, number: int) -> Source:
    return client.step([number % 10], losses=[1.0], step=number).source


def applied(server: ScriptedServer) -> list[int]:
    (steps,) = server.memory.applied.values()
    return steps


def test_a_step_is_applied_and_answered_with_weights(server: ScriptedServer) -> None:
    with client_of(server) as client:
        result = client.step(np.array([1, 2, 2]), contributions=[0.5, 1.0, -1.0])
        assert (result.source, result.outcome, result.version) == (Source.SERVED, Outcome.APPLIED, 1)
        assert result.weights.tolist() == [2.0, 2.0, 2.0]
        assert result.weights.dtype == np.float32
        assert client.step([1], losses=[1.0], weights_for=[2, 3]).weights.tolist() == [2.0, 1.0]
        assert client.step(losses=np.ones(10), all_examples=True).weights.tolist() == [2, 4, 3, 2, 2, 2, 2, 2, 2, 2]
        assert client.read([1, 9]).weights.tolist() == [4.0, 2.0]
        assert client.stats.applied == 3


def test_every_stream_names_its_policy_in_the_header(server: ScriptedServer) -> None:
    with client_of(server) as client:
        step(client, 1)
    assert server.service.headers == ["run-7"]


def test_nothing_is_dialled_before_the_first_use() -> None:
    with PolicyClient("127.0.0.1:1", policy="a") as client:
        assert client.weights([3, 4]).tolist() == [1.0, 1.0]


def test_submissions_never_wait_and_their_weights_arrive(server: ScriptedServer) -> None:
    with client_of(server) as client:
        client.submit([4], losses=[1.0])
        client.submit([5], losses=[1.0], weights_for=[6])
        assert client.flush(60)
        assert client.weights([4, 5, 6]).tolist() == [2.0, 1.0, 1.0]
        assert client.knows([4, 5, 6]).tolist() == [True, False, True]


def test_weights_can_be_known_before_the_first_step(server: ScriptedServer) -> None:
    """Answers are newer; another incarnation's weights do not hold."""
    with client_of(server, num_examples=6) as first:
        step(first, 1)
    with client_of(server, num_examples=6) as client, client_of(server, num_examples=6) as other:
        for each in (client, other):
            assert not each.knows([5, 3, 2]).any()
            each.preload()
            assert each.knows([5, 3, 2]).all()
            assert each.weights([5, 3, 2]).tolist() == [5.0, 3.0, 2.0]
        client.step([3], losses=[1.0])
        assert client.weights([5, 3, 2]).tolist() == [5.0, 2.0, 2.0]
        server.memory.uid = "another"
        step(other, 4)
        assert other.flush(60)
        assert other.weights([5, 3, 2]).tolist() == [1.0, 1.0, 1.0]


def test_a_client_of_another_policy_has_the_same_options(server: ScriptedServer) -> None:
    with client_of(server, rule="ema_sign", settings={"floor": 0.5}, when_lost="wait", max_staleness=7) as client:
        other = client.for_policy("run-8")
        assert (other.policy, other.address) == ("run-8", client.address)
        assert other.trainer_id != client.trainer_id
        assert other._route.server == client._route.server
        assert replace(other._options, spec=client._options.spec) == client._options
        assert replace(other._options.spec, name="run-7") == client._options.spec


def test_submissions_do_not_wait_for_a_silent_server(server: ScriptedServer) -> None:
    with client_of(server, limits=Limits(window_steps=50)) as client:
        step(client, 0)
        server.service.speaking.clear()
        start = monotonic()
        for number in range(100):
            client.submit([0], losses=[1.0], step=number)
        assert monotonic() - start < 60.0  # 6000 s if each waited
        assert client.stats.dropped == 50
        server.service.speaking.set()
        assert client.flush(60)
        assert applied(server) == [0, *range(50)]


def test_a_server_killed_and_back_has_every_step_once(server: ScriptedServer) -> None:
    with client_of(server) as client:
        for number in range(5):
            assert step(client, number) is Source.SERVED
        server.kill()
        sources = [step(client, number) for number in range(5, 12)]
        assert set(sources) == {Source.STALE, Source.UNIFORM}
        server.start()
        assert client.flush(60, durable=True)
        assert step(client, 12) is Source.SERVED
        assert applied(server) == list(range(13))
        assert (client.stats.reconnects, client.stats.outages, client.stats.fallbacks) == (1, 1, 7)


def test_in_wait_mode_a_killed_server_changes_nothing_but_time(server: ScriptedServer) -> None:
    with client_of(server, when_lost="wait") as client:
        step(client, 0)
        server.kill()
        revival = threading.Timer(0.3, server.start)
        revival.start()
        results = [client.step([number % 10], losses=[1.0], step=number) for number in range(1, 5)]
        revival.join()
    assert [(r.source, r.version) for r in results] == [(Source.SERVED, version) for version in range(2, 6)]
    assert applied(server) == list(range(5))


def test_in_wait_mode_a_server_that_stays_away_is_an_error(server: ScriptedServer) -> None:
    with client_of(server, when_lost="wait", timeout=Timeout(wait=3.0, close=0.5)) as client:
        step(client, 0)
        server.kill()
        start = monotonic()
        with pytest.raises(errors.DeadlineError, match="step 2 was not answered within"):
            step(client, 1)
        assert monotonic() - start < 30.0


def test_a_silent_server_costs_one_deadline(server: ScriptedServer) -> None:
    with client_of(server, timeout=QUICK) as client:
        step(client, 1)
        server.service.speaking.clear()
        start = monotonic()
        assert client.step([1], losses=[1.0], step=2).source is Source.STALE
        assert monotonic() - start >= 0.5
        start = monotonic()
        for number in range(3, 100):
            step(client, number)
        assert monotonic() - start < 40.0  # 48 s if each waited
        server.service.speaking.set()
        assert client.flush(60)
        until(lambda: client.read([1]).source is Source.SERVED)
        assert applied(server) == list(range(1, 100))


def test_close_returns_when_the_server_hangs(server: ScriptedServer) -> None:
    client = client_of(server, when_lost="wait")
    step(client, 1)
    server.service.speaking.clear()
    client.submit([1], losses=[1.0])
    start = monotonic()
    client.close()
    assert monotonic() - start < 10.0  # timeout.close is 1 s
    client.close()
    with pytest.raises(errors.ClientClosedError):
        step(client, 2)


def test_close_wakes_those_who_wait(server: ScriptedServer) -> None:
    client = client_of(server, when_lost="wait", timeout=Timeout(wait=60.0, close=0.2))
    step(client, 1)
    server.service.speaking.clear()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            step(client, 2)
        except errors.EquipoiseError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: client.stats.unacked == 1)
    client.close()
    waiting.join(60)
    assert [type(error) for error in caught] == [errors.ClientClosedError]


def test_close_delivers_what_was_submitted(server: ScriptedServer) -> None:
    client = client_of(server, timeout=replace(HOPEFUL, close=60.0))
    for number in range(20):
        client.submit([0], losses=[1.0], step=number)
    client.close()
    assert applied(server) == list(range(20))


def test_no_server_at_all_does_not_stop_training() -> None:
    options: dict[str, Any] = {"num_examples": 10, "timeout": QUICK, "backoff": PROMPT}
    with PolicyClient("127.0.0.1:1", policy="run-7", **options) as client:
        results = [client.step([1], losses=[1.0]) for _ in range(3)]
    assert {r.source for r in results} == {Source.UNIFORM}
    assert client.stats.longest_stall <= 10.0


def test_a_policy_that_does_not_exist_is_an_error(server: ScriptedServer) -> None:
    with client_of(server, num_examples=None) as client, pytest.raises(errors.PolicyNotFoundError) as caught:
        step(client, 1)
    assert caught.value.reason == "POLICY_NOT_FOUND"
    assert server.address in str(caught.value)


def test_an_existing_policy_needs_no_size(server: ScriptedServer) -> None:
    with client_of(server) as first:
        step(first, 1)
    with client_of(server, num_examples=None) as second:
        assert step(second, 1) is Source.SERVED
        with pytest.raises(errors.InvalidRequestError, match="below num_examples = 10"):
            step_id(second, 10)


def test_the_size_is_told_by_the_server(server: ScriptedServer) -> None:
    with client_of(server, num_examples=10) as first, client_of(server, num_examples=None) as client:
        step(first, 1)
        assert (first.num_examples, client.num_examples) == (10, None)
        client.read([1])
        assert client.num_examples == 10


def step_id(client: PolicyClient, example: int) -> None:
    client.step([example], losses=[1.0])


def test_another_policy_of_this_name_is_an_error(server: ScriptedServer) -> None:
    with client_of(server) as first:
        step(first, 1)
    with client_of(server, num_examples=11) as second, pytest.raises(errors.PolicyExistsError):
        step(second, 1)


def test_a_refused_step_names_what_was_wrong_and_the_stream_goes_on(server: ScriptedServer) -> None:
    for when_lost in ("continue", "wait"):
        with client_of(server, when_lost=when_lost) as client:
            with pytest.raises(errors.StepRefusedError) as caught:
                step(client, REFUSED_STEP)
            error = caught.value
            assert (error.field, error.index, error.value, error.rule) == ("contributions", 1, "nan", "finite")
            assert (error.reason, error.sequence) == ("NON_FINITE_STATISTIC", 1)
            assert step(client, 1) is Source.SERVED
            assert client.stats.reconnects == 0


def test_a_batch_beyond_the_servers_limit_is_refused_here(server: ScriptedServer) -> None:
    with client_of(server, num_examples=None) as client:
        client.admin.create(PolicySpec(name="run-7", num_examples=10))
        step(client, 1)
        with pytest.raises(errors.InvalidRequestError, match="at most 1000"):
            client.step([1] * 1001, losses=[1.0] * 1001)


RETRYABLE = [
    (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    (grpc.StatusCode.ABORTED, "FENCED"),
    (grpc.StatusCode.FAILED_PRECONDITION, "NOT_OWNER"),
    (grpc.StatusCode.CANCELLED, ""),
    (grpc.StatusCode.INTERNAL, "BUG"),
    (grpc.StatusCode.UNKNOWN, ""),
    (grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_GAP"),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS"),
]


@pytest.mark.parametrize(("code", "reason"), RETRYABLE)
@pytest.mark.parametrize("when_lost", ["continue", "wait"])
def test_a_stream_that_ends_is_opened_again(
    server: ScriptedServer, when_lost: str, code: grpc.StatusCode, reason: str
) -> None:
    with client_of(server, when_lost=when_lost) as client:
        step(client, 0)
        server.service.end_with, server.service.end_after = (code, status_of(code, reason)), 1
        for number in range(1, 5):
            step(client, number)
        assert client.flush(60)
        assert applied(server) == list(range(5))
        assert client.stats.reconnects == 1


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.ABORTED, "TRAINER_REPLACED", errors.TrainerReplacedError),
        (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST", errors.InvalidRequestError),
    ],
)
def test_a_stream_that_ends_by_the_callers_fault_is_not(
    server: ScriptedServer, code: grpc.StatusCode, reason: str, kind: type[Exception]
) -> None:
    with client_of(server) as client:
        step(client, 0)
        server.service.end_with, server.service.end_after = (code, status_of(code, reason)), 1
        with pytest.raises(kind):
            step(client, 1)
        with pytest.raises(kind):
            client.submit([1], losses=[1.0])


def test_a_server_that_asks_to_reconnect_loses_nothing(server: ScriptedServer) -> None:
    with client_of(server) as client:
        server.service.reconnect_after = 3
        for number in range(8):
            assert step(client, number) is Source.SERVED
        assert applied(server) == list(range(8))
        assert (client.stats.reconnects, client.stats.outages) == (1, 0)


def test_a_lost_store_is_replaced_in_continue_mode(server: ScriptedServer) -> None:
    with client_of(server) as client:
        step(client, 0)
        server.kill()
        server.memory = type(server.memory)()
        server.start()
        step(client, 1)
        assert client.flush(60)
        assert applied(server)[-1:] == [1]
        assert client.stats.lost == 1


def test_a_lost_store_is_an_error_in_wait_mode(server: ScriptedServer) -> None:
    with client_of(server, when_lost="wait") as client:
        step(client, 0)
        server.kill()
        server.memory = type(server.memory)()
        server.start()
        with pytest.raises(errors.PolicyNotFoundError):
            step(client, 1)


def test_flush_waits_for_the_store_when_asked(server: ScriptedServer) -> None:
    with client_of(server) as client:
        server.service.durable_lag = 2
        for number in range(3):
            step(client, number)
        assert client.flush(60)
        assert not client.flush(0.2, durable=True)
        assert client.stats.undurable == 2
        server.service.durable_lag = 0
        assert client.flush(60, durable=True)
        assert client.stats.undurable == 0


def test_steps_a_dead_server_had_not_stored_are_replayed(server: ScriptedServer) -> None:
    with client_of(server, when_lost="wait") as client:
        server.service.durable_lag = 2
        for number in range(4):
            step(client, number)
        server.kill()
        del applied(server)[2:]
        server.memory.version = 2
        server.start()
        step(client, 4)
        assert applied(server) == list(range(5))


def test_a_restarted_trainer_goes_on_exactly_once(server: ScriptedServer) -> None:
    with client_of(server) as client:
        step(client, 0)
        server.kill()
        step(client, 1)
        state = client.state_dict()
    server.start()
    with client_of(server, when_lost="wait") as client:
        client.load_state_dict(state)
        step(client, 2)
        assert applied(server) == [0, 1, 2]


def test_a_restarted_trainer_need_not_know_the_size(server: ScriptedServer) -> None:
    with client_of(server) as client:
        step(client, 0)
        server.kill()
        client.submit(losses=np.ones(10), all_examples=True, step=1)
        state = client.state_dict()
    server.start()
    with client_of(server, num_examples=None) as client:
        client.load_state_dict(state)
        assert client.step([0], losses=[1.0], step=2).weights.tolist() == [4.0]
        assert applied(server) == [0, 1, 2]


def test_served_weights_may_be_written(server: ScriptedServer) -> None:
    with client_of(server) as client:
        assert client.step([1], losses=[1.0]).weights.flags.writeable


def test_several_threads_share_a_client(server: ScriptedServer) -> None:
    with client_of(server, when_lost="wait") as client:
        threads = [threading.Thread(target=lambda: [step(client, number) for number in range(25)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(applied(server)) == sorted([*range(25)] * 4)


def test_a_call_beside_the_loop_maps_its_error(server: ScriptedServer) -> None:
    with client_of(server, num_examples=None) as client:
        with pytest.raises(errors.PolicyNotFoundError):
            client.status()
        server.service.fail_with = (grpc.StatusCode.INVALID_ARGUMENT, refusal())
        with pytest.raises(errors.InvalidRequestError) as caught:
            client.status()
        assert (caught.value.field, caught.value.index) == ("contributions", 1)


def test_listings_follow_pages(server: ScriptedServer) -> None:
    with client_of(server) as client:
        assert [p.spec.name for p in client.admin.list_policies("x")] == ["x0", "x1", "x2", "x3", "x4", "x5"]


def test_chunks_are_put_together_and_gaps_noticed(server: ScriptedServer) -> None:
    with client_of(server) as client:
        assert client.read_weights().tolist() == [0, 1, 2, 3, 4, 5]
        server.service.chunk_offsets = [0, 4]
        with pytest.raises(errors.ServerBugError, match="from 4 on where 3"):
            client.read_weights("score")


def test_watching_ends_with_the_policy(server: ScriptedServer) -> None:
    with client_of(server) as client:
        statuses = client.watch()
        assert [next(statuses).version for _ in range(3)] == [0, 1, 2]
        with pytest.raises(errors.PolicyDeletedError):
            next(statuses)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("when_lost", "panic"),
        ("max_staleness", -1),
        ("num_examples", 0),
        ("durability", "now"),
        ("trainer_id", ""),
        ("trainer_id", 7),
        ("policy", "Run 7"),
        ("policy", 7),
        ("address", 50051),
        ("num_examples", "7"),
        ("num_examples", 7.0),
        ("max_staleness", "7"),
        ("timeout", 5),
        ("limits", {"in_flight": 3}),
    ],
)
def test_bad_options_are_refused_by_name_value_and_rule(option: str, value: Any) -> None:
    options: dict[str, Any] = {"policy": "a", "num_examples": 1, option: value}
    with pytest.raises(errors.InvalidRequestError, match=re.escape(f"{option} = {value!r}: must ")):
        PolicyClient(**options)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda client: client.sample_examples(2.5), "count = 2.5: must be an integer in [1, 2^32)"),
        (lambda client: client.sample_examples(3, seed=-1), "seed = -1: must be an integer in [0, 2^64)"),
        (lambda client: client.watch(min_interval=-1), "min_interval = -1: must be a number of seconds"),
        (
            lambda client: client.read_weights("wieght"),
            "field = 'wieght': must be 'weight', 'score', 'loss' or 'stratum'",
        ),
        (lambda client: client.read_weights(rows=3), "rows = 3: must be a range"),
        (lambda client: client.load_state_dict(3), "state = 3: must be what state_dict() gave"),
        (lambda client: client.for_policy("B"), "policy = 'B': must match"),
        (lambda client: client.step([-1], losses=[1.0]), "ids[0] = -1: ids must not be negative"),
        (lambda client: client.weights(np.array([3, -2]).astype(np.uint64)), "ids[1] = -2: ids must not be negative"),
        (lambda client: client.read_weights(ids=np.array([-1], "i4").astype("u8")), "ids[0] = -1: ids must not be"),
        (lambda client: client.step([2**64], losses=[1.0]), "ids = object values: ids must be integers in [0, 2^63)"),
        (lambda client: client.step([1.0], losses=[1.0]), "ids = float64 values: ids must be integers in [0, 2^63)"),
    ],
)
def test_bad_arguments_are_refused_by_name_value_and_rule(call: Callable[[PolicyClient], object], told: str) -> None:
    with PolicyClient("127.0.0.1:1", policy="a") as client:
        with pytest.raises(errors.InvalidRequestError, match=re.escape(told)):
            call(client)
        assert client.stats.steps == 0


def test_an_admin_without_time_is_refused() -> None:
    with PolicyAdmin("127.0.0.1:1", timeout=0) as admin, pytest.raises(errors.InvalidRequestError, match="timeout = 0"):
        admin.get("a")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert monotonic() < end, "it never came true"
        pause.wait(0.005)
