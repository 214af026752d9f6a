"""Which server is asked next."""

import pytest

from equipoise import Security
from equipoise.errors import DeadlineError, InvalidRequestError, OwnershipError, UnavailableError
from equipoise.route import Route

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


def test_other_errors_turn_nowhere() -> None:
    route = Route("a:1,b:2", None)
    assert not route.turn(InvalidRequestError(field="ids", rule="no"))
    assert route.server.address == "a:1"


def test_a_token_does_not_follow_an_owner_in_plain_text() -> None:
    route = Route("localhost:1", Security(token="secret"))
    assert not route.turn(owned_by("10.0.0.1:2"))
    assert route.server.address == "localhost:1"
    assert route.turn(owned_by("127.0.0.1:2"))


@pytest.mark.parametrize(("error", "method", "repeats"), [
    (LOST, "GetPolicy", True),
    (LOST, "DeletePolicy", False),
    (owned_by("c:3"), "DeletePolicy", True),
    (DeadlineError("late"), "GetPolicy", False),
])  # fmt: skip
def test_calls_that_are_worth_another_server(error: UnavailableError, method: str, repeats: bool) -> None:
    route = Route("a:1,b:2", None)
    assert route.repeats(error, method=method) is repeats
    assert route.server.address != "a:1"


def test_a_list_of_grpc_s_own_is_one_target() -> None:
    route = Route("ipv4:10.0.0.1:5,10.0.0.2:5", None)
    assert route.server.address == "ipv4:10.0.0.1:5,10.0.0.2:5"


@pytest.mark.parametrize("address", ["", "a:1,", ",a:1", "a:1,,b:2"])
def test_an_empty_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="host:port"):
        Route(address, None)
