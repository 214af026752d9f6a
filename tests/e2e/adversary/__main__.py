"""What an adversary does to others: each attack alone, or all of them for a long time.

    python -m tests.e2e.adversary                    # a table: memory, and what another tenant feels
    python -m tests.e2e.adversary --minutes 30       # all in turn, beside two trainers who must get what is right

The server runs with README's "Secure it" settings, TLS aside: tokens and quotas. The attacker's process is nice (10):
he has a machine of his own, and must not win by the CPU of this one.
"""

import argparse
import os
import random
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep

import numpy as np
from rich.console import Console
from rich.table import Table

from equipoise import PolicyAdmin, PolicyClient, Security
from equipoise.testing import ServerProcess, serve
from equipoise_server.security import Scope, entry, new_token
from tests.e2e.adversary.attacks import ATTACKS, PREFIX, attack
from tests.e2e.adversary.neighbour import NUM_EXAMPLES, TRAINER_ID, Neighbour, Stretch, rows
from tests.e2e.faults.gauges import gauges, own_bytes

MIB = 1 << 20
CALM_S = 10.0
WARM_UP_S = 3.0
AFTER_S = 5.0
SAMPLE_EVERY_S = 0.2
TENANTS = f"""
[tenants.mallory]
prefix = "{PREFIX}"
max_streams = 64
max_policies = 200
[tenants.alice]
prefix = "alice-"
[tenants.bob]
prefix = "bob-"
"""


class Guarded:
    """A server with tokens, in a folder that is removed at the end.

    Attributes:
        process: the server.
        security: what each tenant shows.
    """

    def __init__(self, process: ServerProcess, security: dict[str, Security]) -> None:
        self.process = process
        self.security = security

    @property
    def own_mib(self) -> float:
        """Memory that the server's process has taken, without that of Redis."""
        return own_bytes(self.process.pid) / MIB


@contextmanager
def guarded() -> Iterator[Guarded]:
    """A server that asks for tokens."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.toml"
        security, text = {}, TENANTS
        for tenant in ("mallory", "alice", "bob"):
            token, kept = new_token(tenant=tenant, scopes=tuple(Scope))
            security[tenant], text = Security(token=token), text + entry(kept)
        file.write_text(text)
        file.chmod(0o600)
        with serve(tokens_file=file, device="cpu", log_level="warning") as process:
            yield Guarded(process, security)


class Mallory:
    """An attack in a process of its own, which ends by itself."""

    def __init__(self, server: Guarded, name: str, seconds: float) -> None:
        headers = tuple(server.security["mallory"].headers())
        arguments = (name, server.process.address, headers, seconds)
        self._process = get_context("spawn").Process(target=attack, args=arguments, daemon=True)
        self._process.start()
        os.setpriority(os.PRIO_PROCESS, self._process.pid or 0, 10)

    def wait(self, server: Guarded, seconds: float) -> float:
        """Returns when it has ended; the most memory of the server meanwhile, MiB."""
        most, end = server.own_mib, monotonic() + seconds + 30
        while self._process.is_alive():
            if monotonic() > end:
                self._process.kill()
            most = max(most, server.own_mib)
            sleep(SAMPLE_EVERY_S)
        return most


def judge(names: list[str], seconds: float, console: Console) -> None:
    """A table of attacks, each against a server of its own."""
    columns = (
        "attack",
        "before",
        "peak",
        "after",
        "calm p50",
        "p99",
        "attacked p50",
        "p99",
        "worst",
        "stop s",
        "INTERNAL",
    )
    table = Table(*columns, title="memory in MiB; steps of another tenant in ms")
    for name in names:
        with guarded() as server:
            neighbour = Neighbour(server.process.address, "alice-p", server.security["alice"])
            sleep(WARM_UP_S)
            neighbour.stretch()
            sleep(CALM_S)
            calm, before = neighbour.stretch(), server.own_mib
            peak = Mallory(server, name, seconds).wait(server, seconds)
            attacked = neighbour.stretch()
            sleep(AFTER_S)
            after = server.own_mib
            neighbour.stretch(end=True)
            started = monotonic()
            server.process.stop()
            stopped = monotonic() - started
            table.add_row(
                name,
                *(f"{value:.0f}" for value in (before, peak, after)),
                *(f"{calm.quantile_ms(share):.1f}" for share in (0.5, 0.99)),
                *(f"{attacked.quantile_ms(share):.1f}" for share in (0.5, 0.99, 1.0)),
                f"{stopped:.1f}",
                str(server.process.log.count("unexpected error")),
            )
            console.print(f"{name}: {len(attacked.seconds)} steps beside it")
    console.print(table)


def endure(minutes: float, seconds: float, *, seed: int, console: Console) -> bool:
    """All attacks in random order beside two trainers; whether those got what is right, and the memory came back."""
    chance = random.Random(seed)
    with guarded() as server:
        trainers = [Neighbour(server.process.address, f"{who}-p", server.security[who]) for who in ("alice", "bob")]
        sleep(WARM_UP_S)
        before, start = server.own_mib, monotonic()
        felt: list[Stretch] = []
        while monotonic() < start + 60 * minutes:
            name = chance.choice(sorted(ATTACKS))
            most = Mallory(server, name, seconds).wait(server, seconds)
            felt += (now := [trainer.stretch() for trainer in trainers])
            worst = max(stretch.quantile_ms(1.0) for stretch in now)
            minute = (monotonic() - start) / 60
            console.print(f"{minute:5.1f} min  {name}: worst step {worst:.0f} ms, memory at most {most:.0f} MiB")
        with PolicyAdmin(server.process.address, security=server.security["mallory"]) as admin:
            for listed in list(admin.list_policies()):
                admin.delete(listed.spec.name)
        for trainer in trainers:
            trainer.stretch(end=True)
        after, tails = settled(server.process)
        weights = [served(server, trainer) for trainer in trainers]
    expected, alone, alone_tails = undisturbed([trainer.steps for trainer in trainers])
    exact = all(np.array_equal(*pair) for pair in zip(weights, expected, strict=True))
    worst = max(max(stretch.seconds, default=0.0) for stretch in felt)
    console.print(f"steps {[trainer.steps for trainer in trainers]}, exact {exact}, worst step {worst:.2f} s")
    console.print(
        f"memory {before:.0f} MiB at the start, {after:.0f} at the end, {tails:.0f} of them the policies' logs; where"
        f" nobody attacked {alone:.0f}, {alone_tails:.0f} of them logs: {after / alone:.2f} times"
    )
    return exact and after < 1.1 * alone


def served(server: Guarded, trainer: Neighbour) -> np.ndarray:
    """A trainer's policy."""
    security = server.security[trainer.policy.partition("-")[0]]
    with PolicyAdmin(server.process.address, security=security) as admin:
        return np.asarray(admin.read_weights(trainer.policy))


def undisturbed(steps: list[int]) -> tuple[list[np.ndarray], float, float]:
    """The policies after the same steps on a server that nobody attacks, and its memory then, as of `settled`."""
    weights = []
    with serve(device="cpu", log_level="warning") as process, PolicyAdmin(process.address) as admin:
        for place, made in enumerate(steps):
            with PolicyClient(
                process.address, policy=f"p-{place}", num_examples=NUM_EXAMPLES, trainer_id=TRAINER_ID
            ) as client:
                for number in range(made):
                    ids, contributions = rows(number)
                    client.submit(ids, contributions=contributions, omit_weights=True)
                    if number % 100 == 0:  # the window has room for more
                        client.flush()
                client.flush()
            weights.append(np.asarray(admin.read_weights(f"p-{place}")))
        return weights, *settled(process)


def settled(process: ServerProcess) -> tuple[float, float]:
    """Memory of a server that nobody uses any more, and what the ends of its policies' logs have of it, MiB.

    Freed memory goes back every ten seconds. The end of a log stays until it is long enough to be swept.
    """
    sleep(5 * AFTER_S)
    return own_bytes(process.pid) / MIB, gauges(process)["log_memory_bytes"] / MIB


def main() -> int:
    """Runs what was asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="adversary", description=__doc__)
    parser.add_argument("attacks", nargs="*", help="parts of their names; default: all")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each takes")
    parser.add_argument("--minutes", type=float, help="all of them, for so long")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    options = parser.parse_args()
    console = Console(width=150)
    if options.minutes:
        console.print(f"seed {options.seed}")
        return 0 if endure(options.minutes, options.seconds, seed=options.seed, console=console) else 1
    names = [name for name in ATTACKS if not options.attacks or any(part in name for part in options.attacks)]
    judge(names, options.seconds, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
