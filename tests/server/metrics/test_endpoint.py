"""The HTTP side door: metrics as of now, and whether the server lives and is ready."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

import pytest

from equipoise_server.engine import ServiceStatus
from equipoise_server.engine.progress import Progress
from equipoise_server.metrics import Endpoint, Metrics, ServerStatus
from tests.server.metrics.exposed import policy, series_of, value


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(build={"version": "1.2.3"}, max_policies=2)


def endpoint_of(
    metrics: Metrics, *, status: Callable[[], ServerStatus], checks: Callable[[], Mapping[str, str]]
) -> Endpoint:
    async def page(accept: str) -> tuple[bytes, str]:
        return await metrics.page(status, accept=accept)

    async def ready() -> Mapping[str, str]:
        return checks()

    return Endpoint(page, ready=ready)


@contextlib.asynccontextmanager
async def serving(
    metrics: Metrics,
    *,
    status: Callable[[], ServerStatus] = ServerStatus,
    checks: Callable[[], Mapping[str, str]] = dict,
) -> AsyncIterator[str]:
    endpoint = endpoint_of(metrics, status=status, checks=checks)
    address = await endpoint.start("127.0.0.1:0")
    try:
        yield address
    finally:
        await endpoint.stop()


async def sent(address: str, request: bytes) -> tuple[int, str, str]:
    """Status, head and body of the answer to raw bytes."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    writer.write_eof()
    answer = (await asyncio.wait_for(reader.read(), 60)).decode()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split(" ")[1]), head, body


async def got(address: str, path: str) -> tuple[int, str, str]:
    return await sent(address, f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\n\r\n".encode())


async def test_metrics_are_served_as_of_now(metrics: Metrics) -> None:
    versions = iter((1, 2))

    def status() -> ServerStatus:
        return ServerStatus(policies=(ServiceStatus(policy=policy(progress=Progress(version=next(versions)))),))

    async with serving(metrics, status=status) as address:
        for version in (1, 2):
            code, head, body = await got(address, "/metrics")
            assert code == 200
            assert "text/plain; version=" in head
            assert value(series_of(body), "equipoise_server_policy_version", policy="p") == version


@pytest.mark.parametrize("path", ["/readyz", "/healthz"])
async def test_readiness_is_served_with_its_reasons(metrics: Metrics, path: str) -> None:
    checks = {"startup": "", "redis": "redis has not been reached yet: refused"}
    async with serving(metrics, checks=lambda: checks) as address:
        code, _, body = await got(address, path)
        assert (code, body) == (503, "redis has not been reached yet: refused\n")
        code, _, body = await got(address, f"{path}?verbose")
        assert code == 503
        assert body.splitlines() == [
            "[+]startup ok",
            "[-]redis failed: redis has not been reached yet: refused",
            "not ok",
        ]
        checks["redis"] = ""
        assert (await got(address, path))[::2] == (200, "ok\n")
        code, _, body = await got(address, f"{path}?timeout=1&verbose")
        assert (code, body) == (200, "[+]startup ok\n[+]redis ok\nok\n")


async def test_a_server_that_is_not_ready_lives(metrics: Metrics) -> None:
    async with serving(metrics, checks=lambda: {"redis": "gone", "drain": "the server is stopping"}) as address:
        assert (await got(address, "/readyz"))[0] == 503
        assert (await got(address, "/livez"))[::2] == (200, "ok\n")
        assert (await got(address, "/livez?verbose"))[::2] == (200, "[+]event-loop ok\nok\n")


async def test_only_the_head_is_sent_to_who_asks_for_it(metrics: Metrics) -> None:
    async with serving(metrics) as address:
        code, head, body = await sent(address, b"HEAD /livez HTTP/1.1\r\n\r\n")
        assert (code, body) == (200, "")
        assert "Content-Length: 3" in head


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 400),
    ],
)
async def test_whatever_is_sent_is_answered(metrics: Metrics, request_bytes: bytes, status: int) -> None:
    async with serving(metrics) as address:
        assert (await sent(address, request_bytes))[0] == status
        assert (await got(address, "/healthz"))[0] == 200


async def test_a_status_that_fails_is_an_answer_too(metrics: Metrics) -> None:
    def fail() -> ServerStatus:
        raise RuntimeError("secret")

    async with serving(metrics, status=fail) as address:
        status, _, body = await got(address, "/metrics")
    assert status == 500
    assert "secret" not in body


async def test_a_second_endpoint_on_the_address_fails(metrics: Metrics) -> None:
    async with serving(metrics) as address:
        with pytest.raises(OSError, match="in use"):
            await endpoint_of(metrics, status=ServerStatus, checks=dict).start(address)
