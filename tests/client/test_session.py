"""The session alone: numbering, replay, fallbacks and modes, with time and network in the test's hands."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import Outcome, Source, errors
from equipoise.link import MAX_FOLLOWED
from equipoise.options import WhenLost
from equipoise.tickets import SUSPECT_STREAMS, Ticket
from equipoise.v1 import policy_pb2 as pb
from equipoise.wire import StepFields
from tests.client.conversations import NUM_EXAMPLES, Conversation, Server, make_session

STREAM = ["connect", "send", "serve", "receive", "settle"]
TROUBLE = ["persist", "cut", "crash", "wait"]
ACTIONS = st.lists(
    st.sampled_from(["step", "step", "step", "submit", *STREAM, *TROUBLE]),
    min_size=40,  # shorter ones hardly get to a crash after an answer
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(ACTIONS, st.sampled_from(["continue", "wait"]), st.integers(1, 5))
def test_whatever_is_lost_every_step_is_applied_once_and_in_order(
    actions: list[str], when_lost: WhenLost, in_flight: int
) -> None:
    talk = Conversation(make_session(when_lost, in_flight=in_flight))
    made, tickets = 0, []
    for action in actions:
        if action in ("step", "submit"):
            made += 1
            tickets.append(talk.step(made, waits=action == "step"))
        elif action == "persist":
            talk.server.durable = len(talk.server.applied)
        elif action == "cut":
            talk.cut()
        elif action == "crash":
            talk.cut()
            talk.server.crash()
        elif action == "wait":
            talk.now += 10.0
            if when_lost == "continue":
                for ticket in tickets:
                    if ticket.deadline <= talk.now and ticket.waits:
                        talk.session.expire(ticket, talk.now)
        else:
            getattr(talk, action)()
        kept = {t.request.message.step for t in talk.session._window}
        known_durable = talk.session._view.durable_sequence
        assert kept == {t.request.message.step for t in tickets if not (t.answered and t.sequence <= known_durable)}
        assert len(talk.session._in_flight) <= in_flight
    talk.settle()
    assert talk.server.applied == list(range(1, made + 1))
    assert all(ticket.settled for ticket in tickets if ticket.waits)
    assert talk.session.flushed(durable=False)
    if when_lost == "wait":
        assert all(t.value().source is Source.SERVED for t in tickets if t.waits)
    talk.server.durable = made
    if made:
        talk.session.probe(talk.now)
        talk.settle()
    assert talk.session.flushed(durable=True)
    stats = talk.session.stats
    assert stats.steps == made == stats.applied + stats.duplicates
    assert (stats.unacked, stats.undurable, stats.lost, stats.regressions) == (0, 0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(ACTIONS, st.integers(1, 4))
def test_a_small_window_drops_and_counts_but_never_leaves_a_gap(actions: list[str], window_steps: int) -> None:
    talk = Conversation(make_session(window_steps=window_steps))
    made = 0
    for action in actions:
        if action in ("step", "submit"):
            made += 1
            talk.step(made, waits=action == "step")
        elif action == "persist":
            talk.server.durable = len(talk.server.applied)
        elif action in ("cut", "crash", "wait"):
            talk.cut()
            if action == "crash":
                talk.server.crash()
        else:
            getattr(talk, action)()
        assert talk.session.stats.undurable <= window_steps
    talk.settle()
    stats = talk.session.stats
    applied = talk.server.applied
    assert applied == sorted(set(applied))
    assert len(applied) + stats.dropped + stats.lost >= made


def opened(when_lost: WhenLost = "continue", *, max_staleness: int = 1000, **limits: int) -> Conversation:
    talk = Conversation(make_session(when_lost, max_staleness=max_staleness, **limits))
    talk.step(1)
    talk.settle()
    return talk


def test_a_served_step_has_the_weights_of_its_answer() -> None:
    talk = opened()
    ticket = talk.step(2)
    talk.settle()
    result = ticket.value()
    assert (result.source, result.outcome, result.version) == (Source.SERVED, Outcome.APPLIED, 2)
    assert result.weights.tolist() == [3.0]


def test_before_the_first_opening_a_step_waits_for_the_connection() -> None:
    talk = Conversation(make_session())
    ticket = talk.step(1)
    assert ticket.deadline == 5.0
    assert not ticket.settled


def test_after_a_loss_steps_are_answered_at_once() -> None:
    talk = opened()
    waiting = talk.step(1)
    talk.cut()
    assert waiting.value().source is Source.STALE
    assert talk.step(9).value().weights.tolist() == [2.0]
    assert talk.step(2).value().source is Source.UNIFORM  # never served
    assert talk.session.stats.outages == 1


def test_after_one_missed_deadline_steps_are_answered_at_once_until_the_server_speaks() -> None:
    talk = opened()
    slow = talk.step(2)
    assert slow.deadline == talk.now + 1.0
    talk.now += 1.0
    talk.session.expire(slow, talk.now)
    assert slow.value().outcome is Outcome.PENDING
    assert talk.step(3).settled
    talk.settle()
    assert not talk.step(4).settled
    talk.settle()
    assert talk.server.applied == [1, 2, 3, 4]
    assert talk.session.stats.longest_stall == 1.0


def test_stale_weights_are_bounded() -> None:
    talk = opened(max_staleness=3)
    talk.cut()
    results = [talk.step(9).value() for _ in range(5)]
    assert [r.source for r in results] == [Source.STALE] * 3 + [Source.UNIFORM] * 2
    assert [r.staleness for r in results] == [1, 2, 3, 4, 5]
    assert results[-1].weights.tolist() == [1.0]
    assert talk.session.cached_weights([1]).tolist() == [1.0]


def test_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    talk = opened()
    caplog.set_level("INFO", "equipoise")
    for number in range(10):
        talk.cut()
        talk.step(number)
        talk.connect()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    talk.settle()
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]


def test_the_wait_between_attempts_grows_and_starts_over_after_an_answer() -> None:
    talk = opened()
    delays = []
    for _ in range(8):
        talk.cut()
        assert talk.session.connect_at is not None
        delays.append(round(talk.session.connect_at - talk.now, 3))
        talk.connect()
    assert delays == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    talk.step(2)
    talk.settle()
    talk.cut()
    assert talk.session.connect_at == pytest.approx(talk.now + 0.05)


def test_the_server_decides_when_it_says_so() -> None:
    talk = opened()
    talk.cut(errors.OverloadedError("full", retry_after=7.0))
    assert talk.session.connect_at == talk.now + 7.0


def test_the_openings_of_a_client_are_numbered_and_two_clients_of_one_trainer_differ() -> None:
    one, two = Conversation(make_session()), Conversation(make_session())
    for _ in range(3):
        for conversation in (one, two):
            conversation.step(1)
            conversation.settle()
            conversation.cut()
    assert [attempt for _, attempt in one.openings] == [1, 2, 3]
    assert len({client_id for client_id, _ in one.openings}) == 1
    assert {client_id for client_id, _ in one.openings}.isdisjoint({client_id for client_id, _ in two.openings})


def test_a_request_to_reconnect_is_no_outage() -> None:
    talk = opened()
    ticket = talk.step(2)
    talk.send()
    talk.session.received(pb.ExchangeResponse(reconnect=pb.ReconnectRequest(within_ms=1000)), talk.now)
    later = talk.step(3)
    assert not talk.session.left  # step 2 is still to be answered
    talk.serve()
    talk.receive()
    assert talk.session.left
    talk.session.ended(None, talk.now)
    assert talk.session.connect_at == talk.now + 0.5
    talk.settle()
    assert [t.value().source for t in (ticket, later)] == [Source.SERVED] * 2
    assert (talk.session.stats.outages, talk.session.stats.reconnects) == (0, 1)


def test_to_be_sent_to_the_owner_is_no_outage_unless_it_goes_on() -> None:
    talk = opened()
    ticket = talk.step(2)
    elsewhere = errors.OwnershipError("not here", reason="NOT_OWNER", metadata={"owner": "b:50051"})
    for _ in range(MAX_FOLLOWED):
        talk.cut(elsewhere)
        assert talk.session.connect_at == talk.now
        talk.connect()
    assert not ticket.settled
    assert talk.session.stats.outages == 0
    talk.cut(elsewhere)
    assert talk.session.connect_at is not None
    assert talk.session.connect_at > talk.now
    assert talk.session.stats.outages == 1
    talk.now = talk.session.connect_at
    talk.settle()
    assert ticket.settled


def test_wait_mode_gives_up_at_its_deadline_and_names_the_step() -> None:
    talk = opened("wait")
    ticket = talk.step(2)
    assert ticket.deadline == talk.now + 300.0
    talk.cut()
    assert not ticket.settled
    talk.session.expire(ticket, ticket.deadline)
    with pytest.raises(errors.DeadlineError, match="step 2"):
        ticket.value()


def test_a_window_that_is_full_in_wait_mode_is_an_error() -> None:
    talk = opened("wait", window_steps=3)
    talk.cut()
    talk.step(2, waits=False)
    talk.step(3, waits=False)
    with pytest.raises(errors.WindowFullError, match="window_steps"):
        talk.step(4, waits=False)


def test_without_a_stream_nothing_that_was_answered_is_let_go_for_new_steps() -> None:
    """The server may have died before it was durable: then it is sent again."""
    talk = Conversation(make_session(window_steps=2))
    talk.step(1, waits=False)
    talk.step(2, waits=False)
    talk.settle()
    assert (len(talk.server.applied), talk.session.stats.undurable) == (2, 2)
    talk.cut()
    talk.server.crash()  # nothing was durable
    for number in (3, 4, 5):
        talk.step(number, waits=False)
    talk.settle()
    stats = talk.session.stats
    assert (stats.lost, stats.forgotten, stats.dropped) == (0, 0, 3)
    assert len(talk.server.applied) == 2


def refuse(talk: Conversation) -> None:
    talk.send()
    sequence = talk.upstream.popleft().step.sequence
    talk.server.applied.append(0)
    status = pb.StepResponse().error
    status.code, status.message = 3, "no"
    answer = pb.StepResponse(sequence=sequence, epoch=1, version=2, outcome=pb.OUTCOME_REFUSED, error=status)
    talk.session.received(pb.ExchangeResponse(step=answer), talk.now)


def test_a_refused_step_raises_for_its_caller() -> None:
    talk = opened()
    ticket = talk.step(2)
    refuse(talk)
    with pytest.raises(errors.StepRefusedError) as caught:
        ticket.value()
    assert caught.value.sequence == 2
    assert talk.session.stats.refused == 1
    talk.session.raise_unreported()  # once is enough


def test_a_refused_read_raises_for_its_caller() -> None:
    talk = opened("wait")
    ticket = talk.session.read([1], step=9, now=talk.now)
    refuse(talk)
    with pytest.raises(errors.StepRefusedError):
        ticket.value()


def test_a_refusal_is_told_once_though_its_step_is_sent_again() -> None:
    talk = opened()
    ticket = talk.step(2)
    refuse(talk)
    talk.cut()
    talk.server.crash()  # neither step was durable
    talk.connect()
    for move in (talk.send, talk.serve, talk.receive, talk.send, talk.serve, talk.receive):
        move()
    refuse(talk)
    assert isinstance(ticket.error, errors.StepRefusedError)
    assert talk.session.stats.refused == 1
    talk.session.raise_unreported()
    assert talk.session.flushed(durable=False)


def test_a_refused_submission_raises_at_the_next_call() -> None:
    talk = opened()
    talk.step(2, waits=False)
    refuse(talk)
    with pytest.raises(errors.StepRefusedError):
        talk.step(3)
    talk.step(3)
    talk.settle()
    assert talk.server.applied == [1, 0, 3]


def test_a_server_that_lost_its_store_is_followed_in_continue_mode() -> None:
    talk = opened()
    talk.server.durable = 1
    talk.step(2)
    talk.settle()
    talk.cut(errors.PolicyNotFoundError("gone"))
    talk.server.uid, talk.server.applied, talk.server.durable, talk.server.epoch = "u2", [], 0, 1
    talk.now = talk.session.connect_at or 0.0
    opening = talk.session.begin()
    assert opening.create is not None
    talk.generation, talk.sent = opening.generation, []
    talk.step(3)
    talk.settle()
    assert talk.server.applied == [2, 3]  # 1 was durable: let go of, and lost with the store
    assert talk.session.stats.lost == 1
    assert not talk.session.unreachable


def test_a_deleted_policy_is_not_made_again() -> None:
    talk = opened()
    talk.cut(errors.PolicyDeletedError("deleted"))
    assert talk.session.begin().create is None
    assert talk.step(2).settled


@pytest.mark.parametrize(
    "error", [errors.PolicyNotFoundError("gone"), errors.PolicyDeletedError("gone"), errors.PolicyChangedError("other")]
)
def test_in_wait_mode_a_lost_policy_is_the_end(error: errors.EquipoiseError) -> None:
    talk = opened("wait")
    ticket = talk.step(2)
    talk.cut(error)
    with pytest.raises(type(error)):
        ticket.value()
    with pytest.raises(type(error)):
        talk.step(3)


@pytest.mark.parametrize("when_lost", ["continue", "wait"])
def test_a_store_that_went_back_is_counted_or_raised(when_lost: WhenLost) -> None:
    talk = opened(when_lost)
    talk.server.durable = 3
    for number in (2, 3):
        talk.step(number)
        talk.settle()
    talk.cut()
    del talk.server.applied[1:]
    talk.server.durable = 1
    if when_lost == "wait":
        talk.settle()
        with pytest.raises(errors.StateLostError, match="lost 2 steps"):
            talk.step(4)
        return
    talk.step(4)
    talk.settle()
    assert talk.server.applied == [1, 4]
    assert (talk.session.stats.lost, talk.session.stats.regressions) == (2, 1)


def test_a_second_client_with_the_same_trainer_id_is_an_error_in_both_modes() -> None:
    talk = opened()
    talk.cut(errors.TrainerReplacedError("replaced"))
    with pytest.raises(errors.TrainerReplacedError):
        talk.step(2)


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (errors.PolicyNotFoundError("x"), True),
        (errors.PolicyExistsError("x"), True),
        (errors.AccessDeniedError("x"), True),
        (errors.UnsupportedError("x"), True),
        (errors.InvalidRequestError("x"), True),
        (errors.UnavailableError("x"), False),
        (errors.OwnershipError("x"), False),
        (errors.DrainingError("x"), False),
        (errors.ServerBugError("x"), False),
        (errors.SequenceGapError("x"), False),
    ],
)
def test_what_no_retry_mends_raises_before_the_first_opening(error: errors.EquipoiseError, final: bool) -> None:
    talk = Conversation(make_session())
    ticket = talk.step(1)
    talk.connect()
    talk.cut(error)
    assert (talk.session.failure is error) is final
    assert (ticket.error is error) is final
    assert ticket.settled


def test_an_answer_out_of_order_is_the_servers_bug() -> None:
    talk = opened()
    talk.step(2)
    talk.send()
    talk.serve()
    talk.downstream[0].step.sequence = 7
    with pytest.raises(errors.ServerBugError, match="sequence 7 out of order"):
        talk.receive()


def test_an_answer_of_another_length_is_the_servers_bug() -> None:
    talk = opened()
    talk.step(2)
    talk.send()
    talk.serve()
    talk.downstream[0].step.weights = b"\0" * 8
    with pytest.raises(errors.ServerBugError, match="2 weights for 1 ids"):
        talk.receive()


@pytest.mark.parametrize("answered", [0, 1, 2, 3])
def test_a_restarted_trainer_goes_on_exactly_once(answered: int) -> None:
    talk = opened()
    for number in (2, 3, 4):
        talk.step(number)
    for _ in range(3):
        talk.send()
    for _ in range(answered):
        talk.serve()
    state = talk.session.state_dict()
    session = make_session("wait")
    session.load_state_dict(state)
    assert session.trainer_id == "t"
    again = Conversation(session, talk.server)
    ticket = again.step(5)
    again.settle()
    assert again.server.applied == [1, 2, 3, 4, 5]
    assert ticket.value().outcome is Outcome.APPLIED


@pytest.mark.parametrize("when_lost", ["continue", "wait"])
def test_an_old_checkpoint_does_not_pass_silently(when_lost: WhenLost, caplog: pytest.LogCaptureFixture) -> None:
    talk = opened()
    state = talk.session.state_dict()
    for number in (2, 3):
        talk.step(number)
    talk.settle()
    session = make_session(when_lost)
    session.load_state_dict(state)
    again = Conversation(session, talk.server)
    ticket = again.step(2)
    again.settle()
    if when_lost == "wait":
        with pytest.raises(errors.StateLostError, match="2 steps ahead"):
            ticket.value()
        return
    assert again.server.applied == [1, 2, 3, 2]
    assert ticket.value().version == 4
    assert "2 steps ahead" in caplog.text


@pytest.mark.parametrize("change", [{"policy": "q"}, {"format": 2}, {"window": None, "more": 1}])
def test_a_foreign_state_is_refused(change: dict[str, object]) -> None:
    state = make_session().state_dict() | change
    with pytest.raises(errors.InvalidRequestError, match="state"):
        make_session().load_state_dict(state)


def test_a_state_is_loaded_before_the_first_step() -> None:
    talk = opened()
    with pytest.raises(errors.InvalidRequestError, match="before"):
        talk.session.load_state_dict(make_session().state_dict())


def test_a_trainer_known_to_the_server_goes_on_after_its_last_step() -> None:
    talk = Conversation(make_session("wait"), Server(applied=[7, 8], durable=2))
    ticket = talk.step(9)
    talk.settle()
    assert talk.server.applied == [7, 8, 9]
    assert ticket.sequence == 3


def test_reads_survive_a_loss_in_wait_mode_only() -> None:
    for when_lost, source in (("continue", Source.STALE), ("wait", Source.SERVED)):
        talk = opened(when_lost)  # type: ignore[arg-type]
        ticket = talk.session.read([1], now=talk.now)
        talk.send()
        talk.cut()
        talk.settle()
        assert ticket.value().source is source


def test_a_row_of_a_trajectory_says_nothing_about_other_weights() -> None:
    talk = opened()
    row = talk.session.read([1, 5], step=3, now=talk.now)
    talk.settle()
    assert row.value().weights.tolist() == [2.0, 2.0]
    assert talk.session.cached_weights([1, 5]).tolist() == [2.0, 1.0]  # of the step before alone
    talk.cut()
    lost = talk.session.read([1, 5], step=3, now=talk.now).value()
    assert (lost.source, lost.outcome, lost.weights.tolist()) == (Source.UNIFORM, Outcome.DROPPED, [1.0, 1.0])


LARGE_IDS = np.arange(NUM_EXAMPLES).repeat(2000)


def large_step(talk: Conversation, number: int) -> Ticket:
    fields: StepFields = {"losses": np.ones(len(LARGE_IDS)), "step": number}
    return talk.session.step(LARGE_IDS, fields, now=talk.now, waits=False)


def end_at_the_first_message(talk: Conversation) -> None:
    """A stream is opened, carries one message, and is reset before the server has it."""
    assert talk.connect()
    assert talk.send()
    assert talk.serve()
    assert talk.receive()
    assert talk.send()
    talk.cut()
    talk.now += 10.0


def test_a_large_message_at_which_every_stream_ends_is_given_up_and_the_steps_behind_it_move_up() -> None:
    talk = Conversation(make_session("continue", window_bytes=1 << 20))
    large_step(talk, 1)
    behind = [talk.step(number) for number in (2, 3)]
    for _ in range(SUSPECT_STREAMS):
        assert talk.session.stats.refused == 0
        end_at_the_first_message(talk)
    talk.settle()
    assert talk.server.applied == [2, 3]
    assert [ticket.sequence for ticket in behind] == [1, 2]
    assert (talk.session.stats.unacked, talk.session.stats.refused) == (0, 1)
    with pytest.raises(errors.InvalidRequestError, match="5 streams ended at it"):
        talk.session.raise_unreported()


def test_a_message_no_larger_than_one_that_was_answered_is_never_given_up() -> None:
    talk = Conversation(make_session("continue", window_bytes=1 << 22))
    large_step(talk, 1)
    talk.settle()
    talk.cut()
    large_step(talk, 2)
    for _ in range(3 * SUSPECT_STREAMS):
        end_at_the_first_message(talk)
    talk.settle()
    assert talk.server.applied == [1, 2]


def test_a_message_that_the_server_says_it_does_not_take_is_not_sent() -> None:
    talk = Conversation(make_session("continue", window_bytes=1 << 20), Server(max_message_bytes=1 << 17))
    large_step(talk, 1)
    talk.step(2)
    talk.settle()
    assert talk.server.applied == [2]
    for call in (talk.session.raise_unreported, lambda: large_step(talk, 3)):
        with pytest.raises(errors.InvalidRequestError, match="at most 131072 bytes"):
            call()
