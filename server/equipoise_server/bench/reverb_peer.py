"""Run by an interpreter that has dm-reverb, and not imported here: its server, or what sends to one.

    python reverb_peer.py serve ITEMS                       prints the port, serves until its input ends
    python reverb_peer.py send PORT ROWS TRAINERS THREADS   sends for as many seconds as each line of its input says

A step is one `mutate_priorities` of so many items: what Reverb does for a training job that weighs its examples.
"""

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import reverb  # type: ignore[import-not-found]  # of the other interpreter

TABLE = "examples"


def serve(items: int) -> None:
    """A server with a table of so many items."""
    table = reverb.Table(
        name=TABLE,
        sampler=reverb.selectors.Prioritized(1.0),
        remover=reverb.selectors.Fifo(),
        max_size=items,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    server = reverb.Server(tables=[table])
    client = reverb.Client(f"localhost:{server.port}")
    with client.trajectory_writer(num_keep_alive_refs=1) as writer:
        for number in range(items):
            writer.append({"id": number})
            writer.create_item(TABLE, priority=1.0, trajectory={"id": writer.history["id"][-1:]})
            if number % 64 == 63:
                writer.flush()
        writer.flush()
    print(server.port, flush=True)
    sys.stdin.read()
    server.stop()


def keys_of(client: "reverb.Client", wanted: int) -> list[int]:
    """Keys of so many different items."""
    found: set[int] = set()
    while len(found) < wanted:
        found.update(int(sample[0].info.key) for sample in client.sample(TABLE, num_samples=4 * wanted))
    return sorted(found)[:wanted]


def send(port: str, rows: int, trainers: int, threads: int) -> None:
    """Sends steps for as long as each line of the input says."""
    clients = [reverb.Client(f"localhost:{port}") for _ in range(trainers)]
    keys = keys_of(clients[0], rows)
    updates = [{key: random.random() for key in keys} for _ in range(8)]

    def work(client: "reverb.Client", end: float) -> list[float]:
        taken: list[float] = []
        now = time.perf_counter()
        while now < end or not taken:
            started = now
            client.mutate_priorities(TABLE, updates=updates[len(taken) % len(updates)])
            now = time.perf_counter()
            taken.append(now - started)
        return taken

    with ThreadPoolExecutor(trainers * threads) as pool:
        print("ready", flush=True)
        for line in sys.stdin:
            end = time.perf_counter() + float(line)
            sent = [[pool.submit(work, client, end) for _ in range(threads)] for client in clients]
            print(json.dumps([[taken for each in of for taken in each.result()] for of in sent]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        send(sys.argv[2], *(int(argument) for argument in sys.argv[3:6]))
