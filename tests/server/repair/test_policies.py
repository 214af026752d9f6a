"""A damaged policy comes back as it was at a step, bit for bit, or what it lost is said."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from redis.asyncio import Redis

from equipoise_server.engine import PolicyRunner
from equipoise_server.errors import ServiceError, draining
from equipoise_server.repair import Examined, PolicyRepair, examine_all
from equipoise_server.store import EmbeddedRedis, RedisStore, Unavailable
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import PAGE, Whole, everything, send, spec, steps

NUM_EXAMPLES = spec().num_examples
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
BACKUP = "equipoise:backup-20260102T030405Z"

Keys = Callable[[str], Awaitable[list[bytes]]]


@pytest.fixture
async def admin(redis: EmbeddedRedis) -> AsyncIterator["Redis[bytes]"]:
    client: Redis[bytes] = Redis(unix_socket_path=str(redis.socket), protocol=2)
    yield client
    await client.aclose()


@pytest.fixture
async def store(redis: EmbeddedRedis) -> AsyncIterator[RedisStore]:
    found = RedisStore.connect(redis.url, command_timeout_s=5)
    yield found
    await found.close()


async def fails(*_: object, **__: object) -> None:
    raise Unavailable("injected", kind="timeout")


async def history(
    servers: Servers, *, sweep_at: int = 3, last: int = 6, without: str = "", rule: str = "ema_sign"
) -> list[Whole]:
    """The policy after each step; swept once, but for `without` (a method of the store); nobody serves it any more."""
    engine = await servers.make()
    await engine.create(spec(rule=rule))
    runner = await engine.runner("policy")
    given, after = steps(NUM_EXAMPLES), [await everything(runner)]
    for version in range(1, last + 1):
        await send(runner, next(given))
        after.append(await everything(runner))
        if version == sweep_at:
            assert await runner.log.flush(timeout_s=60)
            if without:
                setattr(engine._store, without, fails)
                with pytest.raises(Unavailable):
                    await runner.sweep()
                delattr(engine._store, without)
            else:
                await runner.sweep()
    assert await runner.log.flush(timeout_s=60)
    await engine.close(draining(), flush_timeout_s=0.0)
    return after


async def key(admin: "Redis[bytes]", kind: str) -> bytes:
    (found,) = [each for each in await admin.keys("equipoise:{*") if each.endswith(f":{kind}".encode())]
    return found


async def break_entry(admin: "Redis[bytes]", version: int) -> None:
    """Flips a bit of a log entry."""
    log = await key(admin, "log")
    kept = await admin.xrange(log)
    await admin.delete(log)
    for entry_id, fields in kept:
        if entry_id == b"%d-0" % version:
            value = bytearray(fields[b"c"])
            value[5] ^= 1
            fields = fields | {b"c": bytes(value)}
        await admin.xadd(log, fields, id=entry_id)


async def break_field(admin: "Redis[bytes]", kind: str) -> None:
    """Flips a bit of a hash's longest field."""
    where = await key(admin, kind)
    fields = await admin.hgetall(where)
    name = max(fields, key=lambda name: len(fields[name]))
    value = bytearray(fields[name])
    value[len(value) // 2] ^= 1
    await admin.hset(where, name, bytes(value))


async def repaired(store: RedisStore, *, delete: bool = False, backup: str = BACKUP) -> Examined:
    """Repairs the one policy; it was damaged before and is whole behind it."""
    repair = PolicyRepair(store.salvage(), now=NOW, delete=delete, backup=backup)
    (examined,) = await examine_all(repair, store.salvage(), only=[])
    assert not examined.is_whole
    (again,) = await examine_all(repair, store.salvage(), only=[])
    assert again == examined  # to look changes nothing
    return await repair.mend(examined)


async def loaded(servers: Servers) -> PolicyRunner:
    engine = await servers.make("127.0.0.1:9")
    return await engine.runner("policy")


async def assert_is(servers: Servers, expected: Whole) -> PolicyRunner:
    runner = await loaded(servers)
    assert await everything(runner) == expected
    return runner


async def assert_refused(servers: Servers) -> None:
    engine = await servers.make("127.0.0.1:8")
    with pytest.raises(ServiceError, match="equipoise repair"):
        await engine.runner("policy")


async def test_what_is_whole_stays_so(servers: Servers, store: RedisStore) -> None:
    await history(servers)
    repair = PolicyRepair(store.salvage(), now=NOW)
    (examined,) = await examine_all(repair, store.salvage(), only=["policy"])
    assert examined.is_whole
    assert not examined.diagnosis.damage
    assert await repair.mend(examined) == examined


@pytest.mark.parametrize(("version", "lost"), [(4, "steps 4 to 6"), (5, "steps 5 to 6"), (6, "step 6")])
async def test_a_log_is_cut_before_the_entry_that_is_damaged(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]", version: int, lost: str
) -> None:
    after = await history(servers)
    await break_entry(admin, version)
    await assert_refused(servers)
    examined = await repaired(store)
    assert examined.done == "repaired"
    assert examined.diagnosis.lost == (lost, *examined.diagnosis.lost[1:])
    if version < 6:  # of an entry that is damaged itself nobody knows whose it is
        assert examined.diagnosis.lost[1] == f"these are of trainer 'trainer' from sequence {version + 1} on"
    runner = await assert_is(servers, after[version - 1])
    given = steps(NUM_EXAMPLES, first=version)
    answer = await send(runner, next(given))  # the trainer sends it again
    assert (answer.sequence, answer.version) == (version, version)


async def test_a_copy_of_what_was_changed_is_kept(servers: Servers, store: RedisStore, admin: "Redis[bytes]") -> None:
    await history(servers)
    await break_entry(admin, 5)
    log = await key(admin, "log")
    before = await admin.xrange(log)
    await repaired(store)
    copy = BACKUP.encode() + log.removeprefix(b"equipoise")
    assert await admin.xrange(copy) == before
    assert len(await admin.xrange(log)) == 1


async def test_an_entry_that_is_missing_ends_the_log(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]"
) -> None:
    after = await history(servers)
    await admin.xdel(await key(admin, "log"), "5-0")
    await assert_refused(servers)
    assert "log entry 5: it is gone" in (await repaired(store)).diagnosis.damage
    await assert_is(servers, after[4])


async def test_a_damaged_entry_that_pages_hold_already_is_not_needed(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]"
) -> None:
    after = await history(servers, without="trim")
    await break_entry(admin, 2)
    examined = await repaired(store)
    assert examined.diagnosis.lost == ()
    await assert_is(servers, after[6])


async def test_a_page_is_made_anew_from_a_log_that_was_never_trimmed(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]"
) -> None:
    after = await history(servers, without="trim")
    await break_field(admin, "page:1")
    await admin.delete(await key(admin, "page:0"))
    await assert_refused(servers)
    examined = await repaired(store)
    assert examined.diagnosis.lost == ()
    await assert_is(servers, after[6])


async def test_so_is_all_when_the_header_is_lost(servers: Servers, store: RedisStore, admin: "Redis[bytes]") -> None:
    after = await history(servers, without="trim")
    await break_field(admin, "progress")
    await assert_refused(servers)
    assert (await repaired(store)).diagnosis.lost == ()
    await assert_is(servers, after[6])


async def test_pages_that_are_ahead_of_a_log_that_was_cut_are_not_used(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]"
) -> None:
    after = await history(servers, without="write_header")
    await break_entry(admin, 2)
    examined = await repaired(store)
    assert any("ahead of what can be had of the others" in text for text in examined.diagnosis.damage)
    await assert_is(servers, after[1])


@pytest.mark.parametrize("rule", ["ema_sign", "exponentiated_gradient", "projected_gradient"])
async def test_a_page_that_nothing_can_bring_back_counts_as_never_scored(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]", rule: str
) -> None:
    after = await history(servers, rule=rule)
    await break_field(admin, "page:1")
    await assert_refused(servers)
    examined = await repaired(store)
    assert examined.diagnosis.lost == ("page 1: all about its examples, which count as never scored",)
    runner = await loaded(servers)
    found = await everything(runner)
    assert found.header == after[6].header
    for name, column in found.columns.items():
        size = len(column) // NUM_EXAMPLES
        assert column[: PAGE * size] == after[6].columns[name][: PAGE * size]
        assert column[2 * PAGE * size :] == after[6].columns[name][2 * PAGE * size :]
    given = steps(NUM_EXAMPLES, first=7)
    answer = await send(runner, next(given))
    assert answer.version == 7
    weights = await runner.read(lambda policy: policy.weights(None))
    np.testing.assert_allclose(weights.mean(dtype=np.float64), 1.0, rtol=1e-5)


@pytest.mark.parametrize("kind", ["owner", "manifest"])
async def test_a_record_that_is_lost_is_made_anew(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]", kind: str
) -> None:
    after = await history(servers)
    await admin.delete(await key(admin, kind))
    await assert_refused(servers)
    assert (await repaired(store)).diagnosis.lost == ()
    runner = await assert_is(servers, after[6])
    assert runner.epoch > 1
    assert kind != "owner" or runner.epoch > NOW.timestamp()  # above all there can have been


async def test_owner_and_manifest_may_be_lost_together(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]"
) -> None:
    after = await history(servers)
    await admin.delete(await key(admin, "owner"), await key(admin, "manifest"))
    assert (await repaired(store)).diagnosis.lost == ()
    await assert_is(servers, after[6])


async def test_without_its_log_a_policy_is_as_it_was_swept(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]"
) -> None:
    after = await history(servers)
    await admin.delete(await key(admin, "log"))
    await assert_refused(servers)
    assert (await repaired(store)).diagnosis.lost == ("every step behind 3, of which the pages were written last",)
    runner = await assert_is(servers, after[3])
    answer = await send(runner, next(steps(NUM_EXAMPLES, first=4)))
    assert answer.version == 4
    assert await runner.log.flush(timeout_s=60)


@pytest.mark.parametrize("kind", ["spec", "progress"])
@pytest.mark.parametrize("gone", [True, False])
async def test_what_nothing_can_bring_back_is_deleted_when_told_to(
    servers: Servers, store: RedisStore, admin: "Redis[bytes]", kind: str, gone: bool
) -> None:
    await history(servers)
    if gone:
        await admin.delete(await key(admin, kind))
    else:
        await break_field(admin, kind)
    examined = await repaired(store)
    assert not examined.is_whole
    assert examined.done == ""
    assert "--delete" in examined.diagnosis.lost[0]
    assert (await repaired(store, delete=True)).done == "deleted"
    assert await admin.keys("equipoise:{*") == [b"equipoise:{policy}:owner"]
    assert await admin.ttl(b"equipoise:{policy}:owner") > 0
    engine = await servers.make("127.0.0.1:7")
    _, created = await engine.create(spec())
    assert created
    runner = await engine.runner("policy")
    assert runner.epoch > 1  # the tombstone has kept the last one


async def test_what_a_server_has_in_service_is_left_alone(servers: Servers, store: RedisStore) -> None:
    engine = await servers.make("127.0.0.1:5", instance="there")
    await store.heartbeat("there", address="127.0.0.1:5", ttl_s=60)
    await engine.create(spec())
    await engine.runner("policy")
    repair = PolicyRepair(store.salvage(), now=NOW)
    (examined,) = await examine_all(repair, store.salvage(), only=[])
    assert examined.server == "127.0.0.1:5"
    damaged = replace(examined, server="", diagnosis=replace(examined.diagnosis, damage=("made up",)))
    assert "127.0.0.1:5" in (await PolicyRepair(store.salvage(), now=NOW, delete=True).mend(damaged)).failure
