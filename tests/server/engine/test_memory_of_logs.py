"""The memory for logs is bounded in all, and whoever keeps more than his part lets go."""

from itertools import islice

from equipoise_server.engine.memory import Backlogs
from equipoise_server.errors import draining
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import everything, send, spec, steps


def test_while_there_is_room_each_policy_may_keep_as_much_as_one_may() -> None:
    backlogs = Backlogs(max_bytes=100, max_policy_bytes=60)
    backlogs.note("a", 50)
    backlogs.note("b", 50)
    assert backlogs.limit == 60


def test_beyond_it_each_has_an_equal_part_until_enough_was_let_go() -> None:
    backlogs = Backlogs(max_bytes=100, max_policy_bytes=60)
    for policy in "abcd":
        backlogs.note(policy, 26)
    assert backlogs.limit == 25
    backlogs.note("a", 22)
    assert backlogs.limit == 60
    backlogs.note("a", 60)
    backlogs.note("b", 0)
    assert backlogs.limit == 33
    for policy in "acd":
        backlogs.note(policy, 0)
    assert backlogs.limit == 60


async def test_what_was_loaded_counts(servers: Servers) -> None:
    engine, bound = await servers.make(), 1 << 20
    for number in range(3):
        await engine.create(spec(f"policy-{number}", num_examples=100_000))
        runner = await engine.runner(f"policy-{number}")
        for step in islice(steps(100_000, batch=2000), 15):
            await send(runner, step)
    await engine.close(draining(), flush_timeout_s=60)
    other = await servers.make("127.0.0.1:2", max_backlogs_bytes=bound)
    kept = [(await other.runner(f"policy-{number}")).log.tail.size for number in range(3)]
    assert sum(kept) < bound


async def test_many_policies_together_keep_no_more_than_there_is_room_for(servers: Servers) -> None:
    bound = 1 << 20
    engine = await servers.make(max_backlogs_bytes=bound)
    runners = []
    for number in range(6):
        await engine.create(spec(f"policy-{number}", num_examples=100_000))
        runners.append(await engine.runner(f"policy-{number}"))
    sent, one_step = 0, 2000 * 28
    for step in islice(steps(100_000, batch=2000), 12):
        for runner in runners:
            await send(runner, step)
            sent += 2000 * 12
            assert sum(other.log.tail.size for other in runners) < bound + len(runners) * one_step
    assert sent > bound + len(runners) * one_step  # what would be there without a bound
    expected = [await everything(runner) for runner in runners]
    other = await servers.make("127.0.0.1:2")
    await engine.close(draining(), flush_timeout_s=60)
    assert [await everything(await other.runner(f"policy-{number}")) for number in range(6)] == expected
