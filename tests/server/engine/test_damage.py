"""What Redis has lost of a policy, or holds damaged, is told, and never taken for what was never written."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from equipoise_server.errors import Code, ServiceError
from equipoise_server.store import EmbeddedRedis
from tests.server.engine.conftest import Servers
from tests.server.engine.runs import everything, send, spec, steps

NUM_EXAMPLES = spec().num_examples


@pytest.fixture
async def admin(redis: EmbeddedRedis) -> AsyncIterator["Redis[bytes]"]:
    client: Redis[bytes] = Redis(unix_socket_path=str(redis.socket))
    yield client
    await client.aclose()


async def stored(servers: Servers) -> None:
    """A policy with pages, a header and a log behind them, that nobody serves."""
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    given = steps(NUM_EXAMPLES)
    for _ in range(3):
        await send(runner, next(given))
    await runner._persistence.sweep()
    for _ in range(3):
        await send(runner, next(given))
    assert await runner.log.flush(timeout_s=60)


async def refusal_of(servers: Servers, address: str, *, create: bool = False) -> tuple[Code, str, str]:
    engine = await servers.make(address)
    with pytest.raises(ServiceError) as caught:
        await (engine.create(spec()) if create else engine.runner("policy"))
    return caught.value.code, caught.value.reason, str(caught.value)


LOST = {
    "page:1": "page 1 is damaged: Redis does not have it any more",
    "manifest": "the list of its pages is damaged: 0 of 3 are there",
    "progress": "the header is damaged: Redis does not have it any more",
    "log": "Redis holds nothing",
    "owner": "the record of its owner is damaged: Redis does not have it any more",
    "spec": "the specification is damaged: Redis does not have it any more",
}


@pytest.mark.parametrize("kind", LOST)
async def test_a_key_that_is_gone_as_where_redis_evicts_is_a_loss(
    servers: Servers, admin: "Redis[bytes]", kind: str
) -> None:
    await stored(servers)
    (key,) = [key for key in await admin.keys() if key.endswith(f":{kind}".encode())]
    await admin.delete(key)
    for address, create in (("127.0.0.1:2", kind == "spec"), ("127.0.0.1:3", kind == "spec")):  # it stays so
        code, reason, message = await refusal_of(servers, address, create=create)
        assert (code, reason) == (Code.DATA_LOSS, "STATE_DAMAGED")
        assert LOST[kind] in message
        assert "equipoise repair" in message


async def test_an_older_page_in_the_place_of_a_newer_one_is_found(servers: Servers, admin: "Redis[bytes]") -> None:
    engine = await servers.make()
    await engine.create(spec())
    runner = await engine.runner("policy")
    given = steps(NUM_EXAMPLES)
    await send(runner, next(given))
    await runner._persistence.sweep()
    (key,) = [key for key in await admin.keys() if key.endswith(b":page:0")]
    old = await admin.dump(key)
    await send(runner, next(given))
    await runner._persistence.sweep()
    await admin.restore(key, 0, old, replace=True)
    _, reason, message = await refusal_of(servers, "127.0.0.1:2")
    assert reason == "STATE_DAMAGED"
    assert "page 0 is damaged: it is not the one of version 2" in message


async def test_what_an_earlier_release_wrote_has_neither_checksums_nor_a_manifest(
    servers: Servers, admin: "Redis[bytes]"
) -> None:
    await stored(servers)
    expected = await everything(await (await servers.make("127.0.0.1:1")).runner("policy"))
    for key in await admin.keys():
        if key.endswith((b":page:0", b":page:1", b":page:2", b":progress")):
            await admin.hdel(key, "checksum")
        if key.endswith(b":manifest"):
            await admin.delete(key)
        if key.endswith(b":owner"):
            fields = await admin.hkeys(key)
            await admin.hdel(key, *(field for field in fields if field.startswith((b"manifest:", b"header:", b"uid"))))
        if key.endswith(b":spec"):
            text = await admin.hget(key, "spec")
            assert text is not None
            await admin.hset(key, "spec", text.rpartition(b"\n")[0])
        if key.endswith(b":log"):
            entries = await admin.xrange(key)
            await admin.xtrim(key, maxlen=0)
            last = int(entries[-1][0].split(b"-")[0])
            await admin.delete(key)
            for entry_id, fields_of in entries:
                await admin.xadd(key, {k: v for k, v in fields_of.items() if k != b"+"}, id=entry_id)
            assert last
    after = await everything(await (await servers.make("127.0.0.1:1")).runner("policy"))
    assert after == expected
