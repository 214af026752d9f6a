"""Whether a Redis does all that the store asks of it: permissions, writes, and that it forgets nothing by itself."""

import re
import secrets

from equipoise_server.store.commands import Commands
from equipoise_server.store.errors import Unavailable
from equipoise_server.store.scripts import Script

_EVICTION = re.compile(rb"^maxmemory_policy:(\S+)", re.MULTILINE)

# KEYS two of one slot. Every command that a script of the store uses; one that Redis refuses is named.
PROBE = Script("""
local commands = {
  {'HSET', KEYS[1], 'a', 1, 'b', 2}, {'HSETNX', KEYS[1], 'c', 3}, {'HGET', KEYS[1], 'a'}, {'HMGET', KEYS[1], 'a', 'b'},
  {'HGETALL', KEYS[1]}, {'HEXISTS', KEYS[1], 'a'}, {'HINCRBY', KEYS[1], 'a', 1}, {'HDEL', KEYS[1], 'b'},
  {'EXPIRE', KEYS[1], 10}, {'PERSIST', KEYS[1]}, {'RENAME', KEYS[1], KEYS[2]}, {'EXISTS', KEYS[1]}, {'GET', KEYS[1]},
  {'XADD', KEYS[1], '1-0', '', ''}, {'XINFO', 'STREAM', KEYS[1]}, {'XLEN', KEYS[1]}, {'MEMORY', 'USAGE', KEYS[1]},
  {'XTRIM', KEYS[1], 'MINID', '1-0'}, {'DEL', KEYS[1]}, {'UNLINK', KEYS[1], KEYS[2]}
}
for _, command in ipairs(commands) do
  local answer = redis.pcall(unpack(command))
  if type(answer) == 'table' and answer.err then
    redis.pcall('DEL', KEYS[1], KEYS[2])
    return {'REFUSED', command[1], answer.err}
  end
end
return {'OK'}
""")


async def probe(commands: Commands, *, prefix: str, replicas: int = 0) -> None:
    """Raises Unavailable, which says what is wrong, for a Redis that cannot keep policies.

    It may be one that only reads, is full, forbids a command, is a node of a cluster, evicts what it has taken, or has
    fewer replicas than have to have every step.
    """
    tag = secrets.token_hex(8)
    keys = [f"{prefix}:probe:{{{tag}}}:{number}" for number in (1, 2)]
    await commands.script("probe", PROBE, policy="", keys=keys)
    await commands.run("probe", "SET", keys[0], "1", "NX", "PX", 10_000)
    if replicas:
        await commands.wait_replicas("probe", key=keys[0], replicas=replicas)
    await commands.run("probe", "EXISTS", keys[0])
    await commands.run("probe", "UNLINK", keys[0])
    await commands.run("probe", "ZADD", keys[0], 0, "a")
    await commands.run("probe", "ZRANGEBYLEX", keys[0], "-", "+", "LIMIT", 0, 1)
    await commands.run("probe", "ZREM", keys[0], "a")
    await commands.run("probe", "XRANGE", keys[0], "-", "+", "COUNT", 1)
    await commands.run("probe", "HGETALL", keys[0])
    if (policy := await _eviction_policy(commands)).startswith("allkeys"):
        raise Unavailable(
            f"Redis evicts keys when its memory is full (maxmemory-policy {policy}) and would lose policies in"
            " silence: set maxmemory-policy to noeviction, or give Equipoise a Redis of its own",
            kind="evicts",
        )


async def _eviction_policy(commands: Commands) -> str:
    """What Redis does when its memory is full; empty: it does not tell."""
    try:
        found = _EVICTION.search(_raw(await commands.run("probe", "INFO", "memory")))
    except Unavailable as error:
        if error.kind in ("auth", "other"):  # INFO may be forbidden, and is not needed for anything else
            return ""
        raise
    return found[1].decode() if found else ""


def _raw(answer: object) -> bytes:
    """INFO as it came, or as redis-py has parsed it."""
    if isinstance(answer, bytes):
        return answer
    if isinstance(answer, str):
        return answer.encode()
    if isinstance(answer, dict):
        return b"\n".join(f"{key}:{value}".encode() for key, value in answer.items())
    return b""
