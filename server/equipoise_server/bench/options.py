"""What `equipoise bench` can be told: its parts, their options, and what they say of themselves."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_BLOCK_S = 3600
ROWS = (1, 64, 256, 1024, 4096, 16384, 65536)
MODES = ("one", "pipelined")
VIA = ("stubs", "aio", "client")
DURABILITIES = ("logged", "behind")
SECURITIES = ("plain", "tls", "tls+token")

STEPS = """\
What a step costs: servers with a Redis of their own, and an echo of the same bytes on bare grpc.aio, run on this
machine and take turns in short blocks. Ratios are medians over the turns of two blocks of one turn: they can be
compared between machines, times cannot. Each combination of --rows, --trainers, --modes, --rule and --sketch is a
case; within a case the sizes of --examples, --security, --processes, --durability and --via take turns.

  sent        one step in flight for each trainer, or pipelined: stubs keep 64 in flight, clients submit 256 (or 32 MiB)
              and wait for their answers
  server      the echo, or the policy server with steps that are answered once logged (`logged`) or at once (`behind`)
  via         bare stubs (as the echo is asked), equipoise.aio.PolicyClient, or equipoise.PolicyClient in threads
  p50, p99    of a step, from its sending to its answer; of pipelined stubs it tells how long the queue is
  p50/echo    p50 over the echo's; rate/echo the same of steps per second
  /first      p50 (pipelined: steps per second) over that of the first N and server of the same kind, with quartiles
  fair        steps of the trainer that made most over those of the one that made least
  server µs   processor time of the server for each step; of its Redis, and of the process that sends, the same
  CPU s/M     processor time of the server for a million examples, seconds
  B/ex        bytes of the policy's tables for each example
  RSS MB      memory of the server at the end, 10^6 bytes, with all policies of the case
  load        of the machine: threads that ran or waited for a core in the last minute
  most time   whose processor time is most of the wall time; above 100 %: more than one core. `waiting`: nobody's, for
              a core, a wake-up or the disk

Steps of rule trajectory are whole rows: its N is that of --rows. With --rule all a rule that cannot have so many
examples, or no sketches, is left out, and told.

--reverb PYTHON compares with DeepMind Reverb, whose step is a mutate_priorities of as many items: an interpreter that
has dm-reverb 0.14 and tensorflow-cpu 2.14. TLS needs openssl on PATH. The plot needs matplotlib. What is missing is
told, and the rest runs. A run takes about (turns + 2) x seconds for each line of the table.
"""
RESTORE = """\
How fast a policy comes back: a server is killed and started again on a Redis that stays, and asked for the policy; in
turn with that, this process reads the same bytes from the same Redis and does nothing with them.

  from        pages: those of N examples, all of them scored, after a sweep; log: steps that no sweep has shortened
  ratio       seconds of that reading over seconds of the restore: median over the turns, with quartiles
  server s    processor time of the server for a restore, seconds; of Redis the same; read CPU s that of the reading
"""
SWEEP = """\
Whether steps notice a sweep: one trainer makes steps of 64 rows, answered at once, one in flight, while the server
writes the changed pages of a policy of N examples to Redis, and afterwards.
"""
PROJECTION = """\
The exact projection onto the simplex that rule trajectory makes with each row, beside one by a sort in torch, for a
block of rows at once, and one by cvxpy, for some rows: they take turns.

  ms/row      processor time of a row; wall ms the same of the clock
  /ours       median over the turns of processor time over ours, with quartiles
  difference  largest difference of a weight (1 on average) from ours
"""
SCRAPE = """\
What a scrape of `/metrics` costs with so many policies, each of which has made a step.

  processor   time of the whole server for a scrape, without what it takes at rest
"""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the benchmarks.

    Attributes:
        summary: in a few words.
        told: what its help says.
        add: gives a parser its options.
    """

    summary: str
    told: str
    add: Callable[[argparse.ArgumentParser], None]


def parser_of(name: str) -> argparse.ArgumentParser:
    """Of the options of a part."""
    part = PARTS[name]
    others = "\n".join(f"  {each:<12}{PARTS[each].summary}" for each in PARTS)
    parser = argparse.ArgumentParser(
        prog=f"equipoise bench {name}",
        usage="equipoise bench [PART] [options]" if name == "steps" else None,
        description=f"Parts, of which `steps` need not be named; each has a help of its own:\n\n{others}",
        epilog=f"{part.told}\nThe JSON file has what the table has, and more, unrounded, with the unit in each name.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    part.add(parser)
    told = "JSON file; default: bench.json, of other parts bench-PART.json"
    default = Path("bench.json" if name == "steps" else f"bench-{name}.json")
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help=told)
    return parser


def _steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows",
        type=_rows,
        default=(1, 64, 1024, 16384),
        metavar="B,...",
        help=f"of a step; all: {','.join(map(str, ROWS))}; default: 1,64,1024,16384",
    )
    parser.add_argument("--trainers", type=_numbers, default=(1,), metavar="N,...", help="streams at once; default: 1")
    for name, known, default in (
        ("modes", MODES, MODES),
        ("via", VIA, ("stubs", "client")),
        ("durability", DURABILITIES, DURABILITIES),
        ("security", SECURITIES, ("plain",)),
    ):
        told = f"of {', '.join(known)}; default: {','.join(default)}"
        parser.add_argument(f"--{name}", type=_words(known), default=default, metavar="NAME,...", help=told)
    told = "servers of so many processes; default: 1"
    parser.add_argument("--processes", type=_numbers, default=(1,), metavar="K,...", help=told)
    told = "share the trainers out among so many policies of each kind; default: 1"
    parser.add_argument("--policies", type=_number, default=1, metavar="P", help=told)
    told = "of a policy; default: 1e6"
    parser.add_argument("--examples", type=_numbers, default=(1_000_000,), metavar="N,...", help=told)
    parser.add_argument("--rule", default="ema_sign", metavar="NAME,...", help="or all; default: %(default)s")
    parser.add_argument("--setting", action="append", default=[], metavar="KEY=VALUE", help="of the rule; repeatable")
    told = "send gradient sketches of so many values in place of contributions; 0: contributions; default: 0"
    parser.add_argument("--sketch", type=_widths, default=(0,), metavar="K,...", help=told)
    _turns(parser, turns=12, seconds=0.25)
    parser.add_argument("--reverb", metavar="PYTHON", help="an interpreter that has dm-reverb")
    told = "PNG file; default: beside the JSON file"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=told)


def _restore(parser: argparse.ArgumentParser) -> None:
    _policy(parser, examples=(1_000_000,))
    told = "steps in the log; default: %(default)s"
    parser.add_argument("--entries", type=_number, default=20_000, metavar="N", help=told)
    parser.add_argument("--rows", type=_number, default=64, metavar="B", help="of a step; default: %(default)s")
    _turns(parser, turns=5)


def _sweep(parser: argparse.ArgumentParser) -> None:
    _policy(parser, examples=(10_000_000,))
    parser.add_argument("--seconds", type=_seconds, default=5.0, help="of steps without a sweep; default: %(default)s")


def _projection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=_number, default=4000, metavar="T", help="default: %(default)s")
    parser.add_argument("--examples", type=_number, default=16384, metavar="N", help="of a row; default: %(default)s")
    told = "that cvxpy projects; default: %(default)s"
    parser.add_argument("--cvxpy-rows", type=_number, default=5, metavar="N", help=told)


def _scrape(parser: argparse.ArgumentParser) -> None:
    told = "default: 1,200,1000"
    parser.add_argument("--policies", type=_numbers, default=(1, 200, 1000), metavar="N,...", help=told)
    _turns(parser, turns=40)


def _policy(parser: argparse.ArgumentParser, *, examples: Sequence[int]) -> None:
    told = f"of the policy; default: {','.join(f'{each:g}' for each in examples)}"
    parser.add_argument("--examples", type=_numbers, default=examples, metavar="N,...", help=told)
    parser.add_argument("--rule", default="ema_sign", metavar="NAME", help="default: %(default)s")


def _turns(parser: argparse.ArgumentParser, *, turns: int, seconds: float | None = None) -> None:
    parser.add_argument("--turns", type=_number, default=turns, help="of each that count; default: %(default)s")
    if seconds is not None:
        told = "length of a block; default: %(default)s"
        parser.add_argument("--seconds", type=_seconds, default=seconds, help=told)


PARTS: Mapping[str, Part] = {
    "steps": Part("what a step costs, beside an echo of the same bytes", STEPS, _steps),
    "restore": Part("how fast a policy comes back, beside reading the same bytes", RESTORE, _restore),
    "sweep": Part("whether steps notice that a large policy is written", SWEEP, _sweep),
    "projection": Part("an exact projection beside cvxpy's and one by a sort", PROJECTION, _projection),
    "scrape": Part("what a scrape of /metrics costs", SCRAPE, _scrape),
}
"""By name, as they are typed."""


def _number(text: str) -> int:
    return _integer(text, least=1)


def _integer(text: str, *, least: int) -> int:
    try:
        value = float(text)  # also 1e9
    except ValueError:
        value = math.nan
    if not (value >= least and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text}: must be an integer of at least {least}")
    return int(value)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_BLOCK_S:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most {LONGEST_BLOCK_S}")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return _distinct(tuple(_number(part) for part in text.split(",")))


def _widths(text: str) -> tuple[int, ...]:
    return _distinct(tuple(_integer(part, least=0) for part in text.split(",")))


def _rows(text: str) -> tuple[int, ...]:
    return ROWS if text == "all" else _numbers(text)


def _words(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        if unknown := set(words) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: must be of {', '.join(known)}")
        return _distinct(words)

    return parse


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise argparse.ArgumentTypeError(f"{value}: must be there once")
    return values
