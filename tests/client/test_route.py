"""Which server is asked next."""

import pytest

from equipoise import Security
from equipoise.errors import (
    DeadlineError,
    DrainingError,
    EquipoiseError,
    InvalidRequestError,
    OwnershipError,
    ServerBugError,
    UnavailableError,
)
from equipoise.route import FIRST_ABSENCE_S, LONGEST_ABSENCE_S, MAX_ABSENCES, Route

LOST = UnavailableError("lost")


def owned_by(address: str) -> OwnershipError:
    return OwnershipError("not here", metadata={"owner": address})


def test_lost_servers_are_tried_in_turn() -> None:
    route = Route("a:1, b:2,c:3", None)
    seen = []
    for _ in range(4):
        seen.append(route.server.address)
        assert route.turn(LOST)
    assert seen == ["a:1", "b:2", "c:3", "a:1"]


def test_a_server_that_asks_to_leave_is_followed_by_the_next() -> None:
    route = Route("a:1,b:2", None)
    assert route.turn(None)
    assert route.server.address == "b:2"


def test_a_single_server_is_tried_again() -> None:
    route = Route("a:1", None)
    assert not route.turn(LOST)
    assert route.server.address == "a:1"


def test_the_owner_is_asked_until_it_is_lost() -> None:
    route = Route("a:1", None)
    assert route.turn(owned_by("b:2"))
    assert route.server.address == "b:2"
    assert route.turn(LOST)
    assert route.server.address == "a:1"


def test_an_owner_at_the_address_that_was_asked_is_looked_for_over_another_connection() -> None:
    """An address that leads to several servers may lead to the owner the next time."""
    route = Route("a:1", None)
    for _ in range(5):
        asked = route.server
        assert route.turn(owned_by("a:1"))
        assert route.server.address == "a:1"
        assert route.server != asked
    assert route.turn(owned_by("b:2"))
    assert route.turn(owned_by("b:2"))  # whoever answers there is not the one
    assert route.server.address == "a:1"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_owner_out_of_reach_is_not_followed_until_later_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    route = Route("a:1", None, clock=clock)
    first = route.server
    absence_s = FIRST_ABSENCE_S
    for _ in range(10):
        assert route.turn(owned_by("pod-1:2"))
        assert route.server.address == "pod-1:2"
        route.turn(LOST)
        assert route.server.address == "a:1"
        assert route.turn(owned_by("pod-1:2"))
        assert route.server.address == "a:1"
        assert route.server != first  # another connection: the address may be that of many servers
        clock.now += absence_s - 0.01
        route.turn(owned_by("pod-1:2"))
        assert route.server.address == "a:1"
        clock.now += 0.02
        absence_s = min(LONGEST_ABSENCE_S, 2 * absence_s)
    [record] = caplog.records
    assert "pod-1:2" in record.getMessage()
    assert "advertise" in record.getMessage()


def test_another_owner_is_followed_while_one_is_out_of_reach() -> None:
    route = Route("a:1", None, clock=Clock())
    route.turn(owned_by("b:2"))
    route.turn(LOST)
    assert route.turn(owned_by("c:3"))
    assert route.server.address == "c:3"


@pytest.mark.parametrize(("error", "answered"), [
    (LOST, True),
    (DrainingError("stops", reason="DRAINING"), False),
    (UnavailableError("is loaded", reason="LOADING"), False),
    (None, True),
])  # fmt: skip
def test_an_owner_that_spoke_is_within_reach(error: EquipoiseError | None, answered: bool) -> None:
    route = Route("a:1", None, clock=Clock())
    route.turn(owned_by("b:2"))
    route.turn(error, answered=answered)
    assert route.server.address == "a:1"
    assert route.turn(owned_by("b:2"))
    assert route.server.address == "b:2"


def test_somebody_else_at_the_owners_address_is_left() -> None:
    route = Route("a:1", None, clock=Clock())
    route.turn(owned_by("b:2"))
    assert route.turn(ServerBugError("no method of mine"))
    assert route.server.address == "a:1"
    route.turn(owned_by("b:2"))
    assert route.server.address == "a:1"


def test_an_owner_out_of_reach_leads_to_the_next_listed_server() -> None:
    route = Route("a:1,b:2", None, clock=Clock())
    route.turn(owned_by("pod:3"))
    route.turn(LOST)
    assert route.server.address == "a:1"
    route.turn(owned_by("pod:3"))
    assert route.server.address == "b:2"


def test_made_up_owners_fill_no_memory() -> None:
    route = Route("a:1", None, clock=Clock())
    for number in range(3 * MAX_ABSENCES):
        route.turn(owned_by(f"made-up-{number}:1"))
        route.turn(LOST)
    assert len(route._absent) == MAX_ABSENCES


def test_other_errors_turn_nowhere() -> None:
    route = Route("a:1,b:2", None)
    assert not route.turn(InvalidRequestError(field="ids", rule="no"))
    assert route.server.address == "a:1"


def test_a_token_does_not_follow_an_owner_in_plain_text() -> None:
    route = Route("localhost:1", Security(token="secret"))
    route.turn(owned_by("10.0.0.1:2"))
    assert route.server.address == "localhost:1"
    assert route.turn(owned_by("127.0.0.1:2"))


@pytest.mark.parametrize(("error", "method", "repeats"), [
    (LOST, "GetPolicy", True),
    (LOST, "DeletePolicy", False),
    (owned_by("c:3"), "DeletePolicy", True),
    (DeadlineError("late"), "GetPolicy", False),
])  # fmt: skip
def test_calls_that_are_worth_another_attempt(error: UnavailableError, method: str, repeats: bool) -> None:
    assert Route.repeats(error, method=method) is repeats


def test_a_list_of_grpc_s_own_is_one_target() -> None:
    route = Route("ipv4:10.0.0.1:5,10.0.0.2:5", None)
    assert route.server.address == "ipv4:10.0.0.1:5,10.0.0.2:5"


@pytest.mark.parametrize("address", ["", "a:1,", ",a:1", "a:1,,b:2"])
def test_an_empty_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="host:port"):
        Route(address, None)
