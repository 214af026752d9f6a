"""A far network: a TCP proxy in a process of its own that delivers every byte a fixed time later."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

CHUNK_BYTES = 1 << 16


@contextmanager
def delayed(address: str, *, one_way_s: float) -> Iterator[str]:
    """An address behind which the given one is, `one_way_s` away in each direction."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_process, args=(address, one_way_s, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _process(address: str, one_way_s: float, ready: Connection) -> None:
    asyncio.run(_serve(address, one_way_s, ready))


async def _serve(address: str, one_way_s: float, ready: Connection) -> None:
    host, _, port = address.rpartition(":")

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_carry(reader, back, one_way_s), _carry(there, writer, one_way_s))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    ready.send(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await server.serve_forever()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one_way_s: float) -> None:
    """Bytes keep their distance in time: much may be under way at once."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    async def deliver() -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    delivery = asyncio.create_task(deliver())
    try:
        data = b"-"
        while data:
            data = await reader.read(CHUNK_BYTES)
            under_way.put_nowait((loop.time() + one_way_s, data))
        await delivery
    except ConnectionError:
        delivery.cancel()
        writer.close()
