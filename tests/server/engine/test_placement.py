"""Which server serves which policy."""

from collections import Counter
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from equipoise_server.engine.memory import ALWAYS_FITS
from equipoise_server.engine.placement import SLACK, Placement, score
from equipoise_server.store import ServerLoad

LARGE = 2 * ALWAYS_FITS

loads = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 30), min_size=1)


def placement(counts: Mapping[str, int], *, full: str = "") -> Placement:
    """Servers with so many policies each; the `full` ones have no memory left."""
    return Placement(
        {at: ServerLoad(policies=count, free_bytes=0 if at in full else None) for at, count in counts.items()}
    )


def filled(servers: str, policies: range) -> dict[str, list[str]]:
    """Policies placed one after another, each server told at once of all that were placed."""
    placed: dict[str, list[str]] = {server: [] for server in servers}
    for number in policies:
        name = f"policy-{number}"
        chosen = placement({server: len(names) for server, names in placed.items()}).choose(name)
        placed[chosen].append(name)
    return placed


@given(loads=loads, policy=st.text(max_size=5))
def test_a_policy_goes_to_the_best_of_those_that_have_not_their_share(loads: dict[str, int], policy: str) -> None:
    chosen = placement(loads).choose(policy)
    total = sum(loads.values()) + 1
    assert (loads[chosen] + 1) <= -(-total // len(loads))
    better = [server for server in loads if score(server, policy) > score(chosen, policy)]
    assert all(loads[server] + 1 > total / len(loads) for server in better)


@given(loads=loads)
def test_what_is_handed_over_makes_the_loads_more_even(loads: dict[str, int]) -> None:
    for server, load in loads.items():
        names = [f"{server}{number}" for number in range(load)]
        doomed = placement(loads).excess(server, dict.fromkeys(names, 0))
        assert len(set(doomed)) == len(doomed) <= load
        left = load - len(doomed)
        if doomed:
            assert left >= sum(loads.values()) // len(loads)
            assert min(loads.values()) < left + 1
        assert left <= max(-(-sum(loads.values()) // len(loads)), (1 + SLACK) * sum(loads.values()) / len(loads))


def test_policies_are_spread_within_a_fifth_of_even() -> None:
    for servers in ("ab", "abc", "abcdefg"):
        placed = filled(servers, range(200))
        even = 200 / len(servers)
        assert all(0.8 * even <= len(names) <= 1.2 * even for names in placed.values())


def test_without_bounds_a_server_that_leaves_moves_only_its_own() -> None:
    def best(servers: str, number: int) -> str:
        return max(servers, key=lambda server: score(server, f"policy-{number}"))

    before = {number: best("abc", number) for number in range(3000)}
    after = {number: best("ab", number) for number in range(3000)}
    assert all(after[number] == server for number, server in before.items() if server != "c")
    for counted in (Counter(before.values()), Counter(after.values())):
        assert max(counted.values()) < 1.2 * min(counted.values())


def test_those_that_suit_a_server_least_go_first() -> None:
    names = [f"policy-{number}" for number in range(9)]
    doomed = placement({"a": 9, "b": 0, "c": 0}).excess("a", dict.fromkeys(names, 0))
    assert len(doomed) == 6
    kept = set(names) - set(doomed)
    assert max(score("a", name) for name in doomed) < min(score("a", name) for name in kept)


@given(counts=loads, full=st.text("abcdefgh"), name=st.text(max_size=5))
def test_a_large_policy_goes_where_there_is_room_as_if_no_other_server_were_there(
    counts: dict[str, int], full: str, name: str
) -> None:
    roomy = {server: count for server, count in counts.items() if server not in full} or counts
    assert placement(counts, full=full).choose(name, needed=LARGE) == placement(roomy).choose(name)
    assert placement(counts, full=full).choose(name, needed=ALWAYS_FITS) == placement(counts).choose(name)


@given(counts=loads, full=st.text("abcdefgh"))
def test_what_is_handed_over_is_not_taken_back_for_want_of_room(counts: dict[str, int], full: str) -> None:
    for server, load in counts.items():
        names = {f"{server}{number}": LARGE for number in range(load)}
        doomed = placement(counts, full=full).excess(server, names)
        if doomed:
            left = counts | {server: load - 1}
            others = "".join(set(full) - {server})
            assert placement(left, full=others).choose(doomed[0], needed=LARGE) not in (server, *others)
