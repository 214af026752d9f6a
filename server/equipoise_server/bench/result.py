"""What came of a case: times, and ratios of blocks of the same turn."""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from equipoise_server.bench.comparison import Block, Contender
from equipoise_server.bench.load import Case


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median over the turns, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        """Of values, one for each turn."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a contender in a case.

    Attributes:
        case: the case.
        contender: `echo`, `logged`, `behind` or `reverb`.
        via: what sent.
        security: `plain`, `tls` or `tls+token`.
        processes: that the server consists of.
        num_examples: N; 0 for those that have no policy.
        policies: among which the trainers were shared out.
        steps: how many.
        p50_ms: of a step, from its sending to its answer; None where clients do not tell.
        p99_ms: the same.
        steps_per_s: over all trainers.
        examples_per_s: rows that were applied.
        latency_ratio: p50 over the echo's; None where steps are pipelined and p50 tells how long the queue is.
        rate_ratio: steps per second over the echo's.
        latency_of_first: p50 over that of the first server's, and first N's, contender of the same kind; None as above.
        rate_of_first: the same of steps per second.
        fairness: steps of the trainer that made most over those of the one that made least; None where clients submit
            many at once and a block ends among them.
        server_us: processor time of the server per step, microseconds; of Redis and of who sends the same.
        redis_us: see above.
        client_us: see above.
        server_cpu_s_per_million: processor time of the server per million examples, seconds.
        cores: that server, Redis and client kept busy.
        resident_mb: memory of the server at the end, 10^6 bytes: of all policies of the case.
        bytes_per_example: of the policy's tables; None for those that have none.
        load: of the machine, the mean number of threads that ran or waited for a core in the last minute.
        bound: what takes most of the time.
    """

    case: Case
    contender: str
    via: str
    security: str
    processes: int
    num_examples: int
    policies: int
    steps: int
    p50_ms: float | None
    p99_ms: float | None
    steps_per_s: float
    examples_per_s: float
    latency_ratio: Ratio | None
    rate_ratio: Ratio
    latency_of_first: Ratio | None
    rate_of_first: Ratio
    fairness: float | None
    server_us: float
    redis_us: float
    client_us: float
    server_cpu_s_per_million: float
    cores: dict[str, float]
    resident_mb: float
    bytes_per_example: float | None
    load: float
    bound: str

    def as_json(self) -> dict[str, Any]:
        """As it is written to a file."""
        return asdict(self)


def results(case: Case, contenders: Sequence[Contender]) -> list[Result]:
    """Of the contenders of a case, of which the echo is the first."""
    firsts: dict[tuple[str, str], Contender] = {}
    for contender in contenders:
        firsts.setdefault((contender.name, contender.via), contender)
    return [_result(case, each, contenders[0], firsts[each.name, each.via]) for each in contenders]


def _result(case: Case, contender: Contender, echo: Contender, first: Contender) -> Result:
    blocks = contender.blocks
    steps, wall = sum(each.steps for each in blocks), sum(each.wall_s for each in blocks)
    latencies = [each for block in blocks for each in block.latencies_s]
    of_trainers = [sum(steps for steps, _ in sent) for sent in zip(*(each.sent for each in blocks), strict=True)]
    used = {
        "server": sum(each.server_s for each in blocks),
        "redis": sum(each.redis_s for each in blocks),
        "client": sum(each.client_s for each in blocks),
    }
    cores = {name: seconds / wall for name, seconds in used.items()}
    return Result(
        case=case,
        contender=contender.name,
        via=contender.via,
        security=contender.security,
        processes=contender.processes,
        num_examples=contender.num_examples,
        policies=contender.policies,
        steps=steps,
        p50_ms=1e3 * statistics.median(latencies) if latencies else None,
        p99_ms=1e3 * float(np.quantile(latencies, 0.99)) if latencies else None,
        steps_per_s=steps / wall,
        examples_per_s=steps * case.rows / wall,
        latency_ratio=None if case.pipelined else _ratio(contender, echo, lambda block: block.p50_s),
        rate_ratio=_ratio(contender, echo, lambda block: block.rate),
        latency_of_first=None if case.pipelined else _ratio(contender, first, lambda block: block.p50_s),
        rate_of_first=_ratio(contender, first, lambda block: block.rate),
        fairness=max(of_trainers) / min(of_trainers) if latencies else None,
        server_us=1e6 * used["server"] / steps,
        redis_us=1e6 * used["redis"] / steps,
        client_us=1e6 * used["client"] / steps,
        server_cpu_s_per_million=1e6 * used["server"] / (steps * case.rows),
        cores=cores,
        resident_mb=contender.resident / 1e6,
        bytes_per_example=contender.policy_bytes / contender.num_examples if contender.num_examples else None,
        load=os.getloadavg()[0],
        bound=_bound(cores),
    )


def _ratio(mine: Contender, other: Contender, figure: Callable[[Block], float]) -> Ratio:
    return Ratio.of([figure(a) / figure(b) for a, b in zip(mine.blocks, other.blocks, strict=True)])


def _bound(cores: dict[str, float]) -> str:
    """The process that works for most of the time, or waiting: for a turn of a core, a wake-up, the network."""
    shares = {**cores, "waiting": max(0.0, 1.0 - sum(cores.values()))}
    name = max(shares, key=shares.__getitem__)
    return f"{name} {shares[name]:.0%}"
