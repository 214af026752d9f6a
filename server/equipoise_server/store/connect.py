"""From a URL to a Redis client whose every wait is bounded.

redis-py's defaults retry for many seconds and share one unbounded pool: nothing is left to them here.
"""

from typing import Any

from redis.asyncio import (
    BlockingConnectionPool,
    Connection,
    Redis,
    RedisCluster,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from equipoise_server.redis_url import RedisAccess, RedisUrl
from equipoise_server.store.commands import Client
from equipoise_server.store.direct import DirectConnections
from equipoise_server.store.errors import InvalidStoreUrl

COMMAND_TIMEOUT_S = 1.0
"""Seconds a command may take: above a busy machine's hiccups; callers who need an answer sooner wait less."""

CONNECTIONS = 8
"""Connections to one Redis: one policy's long write leaves the others free."""

RESERVED_CONNECTIONS = 3
"""Of these: pages and logs that are read, and pages that are written, leave them to everything else; of those that
appends have, large ones leave as many to the others."""

HEALTH_CHECK_S = 15
"""Seconds after which an idle connection is tried before it is used."""


def client_for(
    url: RedisUrl | str, *, access: RedisAccess | None = None, command_timeout_s: float = COMMAND_TIMEOUT_S
) -> Client:
    """A client for a URL; opens no connection yet.

    Raises:
        InvalidStoreUrl: not a URL of a kind this store knows; the message repeats no secret.
    """
    if isinstance(url, str):
        try:
            url = RedisUrl.parse(url)
        except ValueError as error:
            raise InvalidStoreUrl(f"a store's URL {error}") from None
    access = access or RedisAccess()
    options: dict[str, Any] = {
        "socket_timeout": command_timeout_s,
        "socket_connect_timeout": command_timeout_s,
        "health_check_interval": HEALTH_CHECK_S,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    entering = _credentials(access.username or url.username, access.password or url.password)
    match url.topology:
        case "single":
            return _single(url, options=options | entering | (_tls(access) if url.tls else {}))
        case "sentinel":
            return _sentinel(url, access=access, options=options, entering=entering)
        case "cluster":
            secure = {"ssl": True, **_tls(access)} if url.tls else {}
            nodes = [ClusterNode(host, port) for host, port in url.hosts]
            return RedisCluster(startup_nodes=nodes, max_connections=8 * CONNECTIONS, **options, **entering, **secure)


def direct_connections(client: Client, *, timeout_s: float) -> DirectConnections | None:
    """Connections for what steps wait for, beside a client's own; None: a cluster's, which alone knows its nodes."""
    if isinstance(client, RedisCluster):
        return None
    return DirectConnections(client.connection_pool, at_most=CONNECTIONS, timeout_s=timeout_s)


async def close_client(client: Client) -> None:
    """Close all connections of a client, those to its sentinels too."""
    await client.aclose()
    if isinstance(client, Redis) and isinstance(client.connection_pool, SentinelConnectionPool):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _single(url: RedisUrl, *, options: dict[str, Any]) -> Redis:
    if url.socket:
        place: dict[str, Any] = {"connection_class": UnixDomainSocketConnection, "path": url.socket}
    else:
        ((host, port),) = url.hosts[:1]
        place = {"connection_class": SSLConnection if url.tls else Connection, "host": host, "port": port}
    pool = BlockingConnectionPool(
        max_connections=CONNECTIONS, timeout=options["socket_connect_timeout"], db=url.database, **place, **options
    )
    return Redis.from_pool(pool)


def _sentinel(url: RedisUrl, *, access: RedisAccess, options: dict[str, Any], entering: dict[str, Any]) -> Redis:
    secure = {"ssl": True, **_tls(access)} if url.tls else {}
    # redis-py's Sentinel class carries no types.
    sentinel_class: Any = _Sentinels
    guards = _credentials(access.sentinel_username, access.sentinel_password)
    sentinel = sentinel_class(list(url.hosts), sentinel_kwargs={**options, **guards, **secure})
    client: Redis = sentinel.master_for(
        url.master, db=url.database, max_connections=8 * CONNECTIONS, **options, **entering, **secure
    )
    return client


class _Sentinels(Sentinel):
    """Says why no Sentinel names a master: redis-py shows its settings instead."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Address of the master."""
        try:
            address: tuple[str, int] = await super().discover_master(service_name)
        except MasterNotFoundError as error:
            reasons: dict[str, None] = {}
            for sentinel in self.sentinels:
                try:
                    await sentinel.ping()
                except (RedisError, OSError) as reason:
                    reasons[str(reason)] = None
            told = ": " + "; ".join(reasons) if reasons else ""
            raise MasterNotFoundError(f"no Sentinel names the master {service_name!r}{told}") from error
        return address


def _tls(access: RedisAccess) -> dict[str, Any]:
    return {
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": access.tls_check_hostname,
        "ssl_ca_certs": _text(access.tls_ca),
        "ssl_certfile": _text(access.tls_certificate),
        "ssl_keyfile": _text(access.tls_key),
    }


def _text(path: object) -> str | None:
    return None if path is None else str(path)


def _credentials(username: str, password: str) -> dict[str, Any]:
    given = {"username": username, "password": password}
    return {key: value for key, value in given.items() if value}
