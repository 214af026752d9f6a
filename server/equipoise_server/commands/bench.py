"""Measure what a step costs, beside a bare gRPC echo of the same bytes."""

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.commands.tables import table

if TYPE_CHECKING:
    from equipoise_server.bench.comparison import Result
    from equipoise_server.bench.load import Case

USAGE_ERROR = 2
FAILED = 1

ROWS = (1, 64, 256, 1024, 4096, 16384, 65536)
MODES = ("one", "pipelined")
VIA = ("stubs", "aio", "client")
DURABILITIES = ("logged", "behind")
HEADS = (
    "rows", "trainers", "sent", "server", "via", "p50 ms", "p99 ms", "p50/echo", "steps/s", "rate/echo", "examples/s",
    "server µs", "redis µs", "client µs", "CPU s/M", "RSS MB", "most time",
)  # fmt: skip

EPILOG = """\
A server with a Redis of its own, and an echo of the same bytes on bare grpc.aio, run on this machine and take turns in
short blocks. Ratios to the echo are medians over the turns: they can be compared between machines, times cannot. Each
combination of --rows, --trainers and --modes is a case.

  sent        one step in flight for each trainer, or pipelined: stubs keep 64 in flight, clients submit 256 and flush
  via         bare stubs (as the echo is asked), equipoise.aio.PolicyClient, or equipoise.PolicyClient in threads
  server µs   processor time of the server for each step; of its Redis, and of the process that sends, the same
  CPU s/M     processor time of the server for a million examples, seconds
  most time   whose processor time is most of the wall time; above 100 %: more than one core. `waiting`: nobody's, for
              a core, a wake-up or the disk

--reverb PYTHON compares with DeepMind Reverb, whose step is a mutate_priorities of as many items: an interpreter that
has dm-reverb 0.14 and tensorflow-cpu 2.14.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise bench ...`; returns the exit status: 2 for wrong usage, 1 when something failed."""
    options = _parser().parse_args(arguments)
    from equipoise import EquipoiseError  # after the options: help loads no gRPC
    from equipoise_server.bench.load import Case
    from equipoise_server.rules import RuleError, build

    try:
        settings = dict(_setting(text) for text in options.setting)
        build(options.rule, settings)
        cases = [
            Case(
                rows=rows,
                trainers=trainers,
                pipelined=mode == "pipelined",
                num_examples=options.examples,
                rule=options.rule,
                settings=settings,
            )
            for rows, trainers, mode in product(options.rows, options.trainers, options.modes)
        ]
        if (most := max(options.rows)) > options.examples:
            raise ValueError(f"--rows {most}: more than --examples {options.examples}; ids of a step are distinct")
    except (RuleError, ValueError) as error:
        print(f"equipoise bench: {error}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return asyncio.run(_run(options, cases))
    except (EquipoiseError, RuntimeError, OSError) as error:
        print(f"equipoise bench: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="equipoise bench",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rows",
        type=_numbers,
        default=(1, 64, 1024, 16384),
        metavar="B,...",
        help=f"of a step; all: {','.join(map(str, ROWS))}; default: 1,64,1024,16384",
    )
    parser.add_argument("--trainers", type=_numbers, default=(1,), metavar="N,...", help="streams at once; default: 1")
    for name, known, default in (
        ("modes", MODES, MODES),
        ("via", VIA, ("stubs", "client")),
        ("durability", DURABILITIES, DURABILITIES),
    ):
        told = f"of {', '.join(known)}; default: {','.join(default)}"
        parser.add_argument(f"--{name}", type=_words(known), default=default, metavar="NAME,...", help=told)
    parser.add_argument("--examples", type=_number, default=1_000_000, metavar="N", help="of the policy; default: 10^6")
    parser.add_argument("--rule", default="ema_sign", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--setting", action="append", default=[], metavar="KEY=VALUE", help="of the rule; repeatable")
    parser.add_argument("--turns", type=_number, default=12, help="blocks of each that count; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.25, help="length of a block; default: %(default)s")
    parser.add_argument("--reverb", metavar="PYTHON", help="an interpreter that has dm-reverb")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="JSON file; default: %(default)s")
    return parser


async def _run(options: argparse.Namespace, cases: "Sequence[Case]") -> int:
    from equipoise.testing import serve
    from equipoise_server.bench.comparison import compare
    from equipoise_server.bench.echo import echo
    from equipoise_server.bench.reverb import NoReverbError, reverb_server

    facts = _facts()
    results: list[Result] = []
    without = "--reverb was not given"
    async with AsyncExitStack() as stack:
        server = stack.enter_context(serve(max_batch_examples=max(65536, *options.rows)))
        floor = stack.enter_context(echo())
        rival = None
        if options.reverb:
            try:
                items = min(options.examples, max(100_000, 2 * max(options.rows)))
                rival = await stack.enter_async_context(reverb_server(options.reverb, items=items))
                without = ""
            except NoReverbError as error:
                without = str(error)
        for case in cases:
            results += await compare(
                case,
                server,
                echo=floor,
                reverb=rival,
                durabilities=options.durability,
                via=options.via,
                turns=options.turns,
                seconds=options.seconds,
            )
            facts["load_after"] = os.getloadavg()[0]
            found = {"facts": facts, "reverb_did_not_run": without, "results": [each.as_json() for each in results]}
            options.output.write_text(
                json.dumps(found, indent=1) + "\n"
            )  # after each: a run that is stopped keeps them
            sent = "pipelined" if case.pipelined else "one in flight"
            print(f"measured: {case.rows} rows, {case.trainers} trainers, {sent}", file=sys.stderr, flush=True)
    print(table(HEADS, map(_row, results)))
    if without:
        print(f"Reverb did not run: {without}")
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    print(f"written: {options.output}")
    return 0


def _facts() -> dict[str, Any]:
    versions = {name: version(name) for name in ("equipoise", "grpcio", "protobuf", "redis", "torch", "numpy")}
    return {
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def _row(result: "Result") -> tuple[object, ...]:
    sent = "pipelined" if result.case.pipelined else "one"
    return (
        result.case.rows, result.case.trainers, sent, result.contender, result.via,
        _digits(result.p50_ms), _digits(result.p99_ms), _digits(result.latency_ratio),
        f"{result.steps_per_s:,.0f}", _digits(result.rate_ratio), f"{result.examples_per_s:,.0f}",
        f"{result.server_us:,.0f}", f"{result.redis_us:,.0f}", f"{result.client_us:,.0f}",
        _digits(result.server_cpu_s_per_million), f"{result.resident_mb:,.0f}", result.bound,
    )  # fmt: skip


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _number(text: str) -> int:
    value = int(float(text))  # also 1e9
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return ROWS if text == "all" else tuple(_number(part) for part in text.split(","))


def _words(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        words = tuple(text.split(","))
        if unknown := set(words) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: must be of {', '.join(known)}")
        return words

    return parse


def _setting(text: str) -> tuple[str, float | bool]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--setting {text}: must be KEY=VALUE")
    return key, value == "true" if value in ("true", "false") else float(value)
