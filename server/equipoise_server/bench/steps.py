"""What a step costs: cases one after another, each an interleaved comparison."""

import argparse
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from itertools import product

import torch

from equipoise_server.bench.comparison import Field, compare
from equipoise_server.bench.echo import echo
from equipoise_server.bench.load import CONTRIBUTIONS, Case, SettingValue
from equipoise_server.bench.plot import NoPlotError, save_plot
from equipoise_server.bench.report import Report, digits, progress, quartiles
from equipoise_server.bench.result import Result, results
from equipoise_server.bench.reverb import NoReverbError, ReverbServer, reverb_server
from equipoise_server.bench.servers import NoTLSError, PolicyServer, start
from equipoise_server.rules import build, names

REVERB_ITEMS = 100_000
"""In its table, at least."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Cases, and why others were left out, by name."""

    cases: list[Case]
    left_out: dict[str, str]


def plan(options: argparse.Namespace) -> Plan:
    """What the options ask for. Raises ValueError."""
    settings = dict(_setting(text) for text in options.setting)
    known = options.rule == "all"
    rules = names() if known else options.rule.split(",")
    cases: list[Case] = []
    left_out: dict[str, str] = {}
    if options.trainers and (fewest := min(options.trainers)) < options.policies:
        raise ValueError(f"--policies {options.policies}: more than --trainers {fewest}; each needs a trainer")
    for rule, sketch in product(rules, options.sketch):
        try:
            _check(rule, settings, sketch, options)
        except ValueError as error:
            if not known:
                raise
            left_out[f"rule {rule}"] = str(error)
            continue
        cases += [
            Case(
                rows=rows,
                trainers=trainers,
                pipelined=mode == "pipelined",
                rule=rule,
                settings=settings,
                sketch=sketch,
            )
            for rows, trainers, mode in product(options.rows, options.trainers, options.modes)
        ]
    if not cases:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in left_out.items()))
    return Plan(cases, left_out)


def _check(rule: str, settings: Mapping[str, SettingValue], sketch: int, options: argparse.Namespace) -> None:
    """Raises ValueError for what no server would take."""
    case = Case(rows=max(options.rows), trainers=1, pipelined=False, rule=rule, settings=settings, sketch=sketch)
    if sketch and Case(rows=1, trainers=1, pipelined=False, rule=rule).statistics != CONTRIBUTIONS:
        raise ValueError(f"--sketch {sketch}: rule {rule} does not live on contributions alone")
    for size in _sizes(case, options):
        if case.rows > size:
            raise ValueError(f"--rows {case.rows}: more than --examples {size}; ids of a step are distinct")
        build(rule, case.settings_for(size)).init(size, device=torch.device("meta"))


def _sizes(case: Case, options: argparse.Namespace) -> tuple[int, ...]:
    """N of the policies; a step of a trajectory is a whole row."""
    return (case.rows,) if case.rule == "trajectory" else options.examples


async def run(options: argparse.Namespace, plan: Plan, report: Report) -> None:
    """Measures all cases."""
    report.not_run.update(plan.left_out)
    found: list[Result] = []
    async with AsyncExitStack() as stack:
        inner = stack.enter_context(ExitStack())
        servers: list[PolicyServer] = []
        for security, processes in product(options.security, options.processes):
            try:
                servers.append(start(inner, security=security, processes=processes, rows=max(options.rows)))
            except NoTLSError as error:
                report.not_run[security] = str(error)
        if not servers:
            raise RuntimeError("; ".join(report.not_run.values()))
        floor = stack.enter_context(echo())
        rival = await _reverb(stack, options, report)
        for number, case in enumerate(plan.cases):
            field = Field(
                servers=servers,
                echo=floor,
                reverb=rival if case.rule == plan.cases[0].rule and not case.sketch else None,
                durabilities=options.durability,
                via=options.via,
                examples=_sizes(case, options),
                policies=options.policies,
            )
            new = results(case, await compare(case, field, turns=options.turns, seconds=options.seconds))
            found += new
            for each in new:
                report.add(each.as_json(), _line(each))
            report.write()
            sent = "pipelined" if case.pipelined else "one in flight"
            told = f"{case.rule}, {case.rows} rows, {case.trainers} trainers, {sent}"
            progress(f"measured {number + 1} of {len(plan.cases)}: {told}")
    picture = options.plot or options.output.with_suffix(".png")
    try:
        save_plot(found, picture)
        report.notes.append(f"plot: {picture}")
    except NoPlotError as error:
        report.not_run["plot"] = str(error)


async def _reverb(stack: AsyncExitStack, options: argparse.Namespace, report: Report) -> ReverbServer | None:
    report.not_run["Reverb"] = "--reverb was not given"
    if not options.reverb:
        return None
    try:
        items = min(max(options.examples), max(REVERB_ITEMS, 2 * max(options.rows)))
        rival = await stack.enter_async_context(reverb_server(options.reverb, items=items))
    except NoReverbError as error:
        report.not_run["Reverb"] = str(error)
        return None
    del report.not_run["Reverb"]
    return rival


def _line(result: Result) -> dict[str, object]:
    case, of_first = result.case, result.latency_of_first or result.rate_of_first
    server = [result.contender, *([result.security] if result.security != "plain" else [])]
    server += [f"x{result.processes}"] if result.processes > 1 else []
    return {
        "rows": case.rows,
        "trainers": case.trainers,
        "sent": "pipelined" if case.pipelined else "one",
        "rule": case.rule,
        "sketch": case.sketch,
        "N": f"{result.num_examples:.3g}" if result.num_examples else None,
        "server": " ".join(server),
        "via": result.via,
        "p50 ms": digits(result.p50_ms),
        "p99 ms": digits(result.p99_ms),
        "p50/echo": digits(result.latency_ratio.median if result.latency_ratio else None),
        "steps/s": f"{result.steps_per_s:,.0f}",
        "rate/echo": digits(result.rate_ratio.median),
        "/first": quartiles(of_first.median, of_first.low, of_first.high),
        "examples/s": f"{result.examples_per_s:,.0f}",
        "fair": digits(result.fairness),
        "server µs": f"{result.server_us:,.0f}",
        "redis µs": f"{result.redis_us:,.0f}",
        "client µs": f"{result.client_us:,.0f}",
        "CPU s/M": digits(result.server_cpu_s_per_million),
        "B/ex": digits(result.bytes_per_example),
        "RSS MB": f"{result.resident_mb:,.0f}",
        "load": f"{result.load:.0f}",
        "most time": result.bound,
    }


def _setting(text: str) -> tuple[str, SettingValue]:
    key, equals, value = text.partition("=")
    try:
        return key, value == "true" if value in ("true", "false") else float(value)
    except ValueError:
        given = f"{key} = {value!r}: must be a number, true or false" if equals else f"{text}: must be KEY=VALUE"
        raise ValueError(f"--setting {given}") from None
