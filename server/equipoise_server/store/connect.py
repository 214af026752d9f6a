"""From a URL to a Redis client whose every wait is bounded.

redis-py's defaults retry for many seconds and share one unbounded pool: nothing is left to them here.
"""

from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from equipoise_server.store.commands import Client
from equipoise_server.store.errors import InvalidStoreUrl

COMMAND_TIMEOUT_S = 1.0
"""Seconds a command may take: above a busy machine's hiccups; callers who need an answer sooner wait less."""

CONNECTIONS = 8
"""Connections to one Redis: one policy's long write leaves the others free."""

HEALTH_CHECK_S = 15
"""Seconds after which an idle connection is tried before it is used."""

_SCHEMES = "redis://, rediss://, unix://, redis+sentinel://h:p,h:p/master/db, redis+cluster://h:p,h:p"


def client_for(url: str, *, command_timeout_s: float = COMMAND_TIMEOUT_S) -> Client:
    """A client for a URL; opens no connection yet.

    Raises:
        InvalidStoreUrl: not a URL of a kind this store knows; the message hides the password.
    """
    parts = urlsplit(url)
    options = _options(command_timeout_s)
    match parts.scheme:
        case "redis" | "rediss" | "unix":
            return _single(url, parts, options=options, command_timeout_s=command_timeout_s)
        case "redis+sentinel":
            return _sentinel(parts, options=options)
        case "redis+cluster":
            return _cluster(parts, options=options)
    raise _invalid(parts, f"unknown scheme {parts.scheme!r}; known: {_SCHEMES}")


async def close_client(client: Client) -> None:
    """Close all connections of a client, those to its sentinels too."""
    await client.aclose()
    if isinstance(client, Redis) and isinstance(client.connection_pool, SentinelConnectionPool):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def without_password(url: str) -> str:
    """The URL as it may be shown in logs and messages."""
    return _shown(urlsplit(url))


def _options(command_timeout_s: float) -> dict[str, Any]:
    return {
        "socket_timeout": command_timeout_s,
        "socket_connect_timeout": command_timeout_s,
        "health_check_interval": HEALTH_CHECK_S,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }


def _single(url: str, parts: SplitResult, *, options: dict[str, Any], command_timeout_s: float) -> Redis:
    if parts.scheme == "unix" and not parts.path:
        raise _invalid(parts, "a unix URL needs the path of a socket, as in unix:///run/redis.sock")
    if parts.scheme != "unix" and not parts.hostname:
        raise _invalid(parts, "no host")
    _port(parts, parts.netloc.rpartition("@")[2])
    try:
        pool = BlockingConnectionPool.from_url(url, max_connections=CONNECTIONS, timeout=command_timeout_s, **options)
    except ValueError as error:
        raise _invalid(parts, str(error)) from None
    return Redis.from_pool(pool)


def _sentinel(parts: SplitResult, *, options: dict[str, Any]) -> Redis:
    master, _, database = parts.path.strip("/").partition("/")
    if not master:
        raise _invalid(parts, "no master's name, as in redis+sentinel://h:26379,h:26379/master/0")
    if database and not database.isdigit():
        raise _invalid(parts, f"database {database!r} is not a number")
    query = parse_qs(parts.query)
    guards = {name.removeprefix("sentinel_"): query[name][0] for name in query if name.startswith("sentinel_")}
    # redis-py's Sentinel class carries no types.
    sentinel_class: Any = Sentinel
    sentinel = sentinel_class(_hosts(parts, default_port=26379), sentinel_kwargs={**options, **guards})
    options |= _credentials(parts)
    client: Redis = sentinel.master_for(master, db=int(database or 0), max_connections=8 * CONNECTIONS, **options)
    return client


def _cluster(parts: SplitResult, *, options: dict[str, Any]) -> RedisCluster:
    if parts.path.strip("/"):
        raise _invalid(parts, "a cluster has no databases: nothing may follow the hosts")
    nodes = [ClusterNode(host, port) for host, port in _hosts(parts, default_port=6379)]
    options |= _credentials(parts)
    return RedisCluster(startup_nodes=nodes, max_connections=8 * CONNECTIONS, **options)


def _hosts(parts: SplitResult, *, default_port: int) -> list[tuple[str, int]]:
    hosts = parts.netloc.rpartition("@")[2].split(",")
    found = []
    for host in hosts:
        name = urlsplit(f"//{host}").hostname
        if not name:
            raise _invalid(parts, f"empty host in {','.join(hosts)!r}")
        found.append((name, _port(parts, host) or default_port))
    return found


def _port(parts: SplitResult, host: str) -> int | None:
    try:
        return urlsplit(f"//{host}").port
    except ValueError as error:
        raise _invalid(parts, str(error)) from None


def _credentials(parts: SplitResult) -> dict[str, str]:
    user, at, _ = parts.netloc.rpartition("@")
    if not at:
        return {}
    name, _, password = user.partition(":")
    given = {"username": unquote(name), "password": unquote(password)}
    return {key: value for key, value in given.items() if value}


def _shown(parts: SplitResult) -> str:
    user, at, hosts = parts.netloc.rpartition("@")
    hidden = f"{user.partition(':')[0]}:***@" if at and ":" in user else f"{user}{at}"
    return f"{parts.scheme}://{hidden}{hosts}{parts.path}"


def _invalid(parts: SplitResult, why: str) -> InvalidStoreUrl:
    return InvalidStoreUrl(f"store URL {_shown(parts)}: {why}")
