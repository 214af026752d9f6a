"""Measure what the server costs on this machine, beside a bare gRPC echo and what else there is to compare with."""

import asyncio
import sys
from collections.abc import Sequence
from importlib import import_module

from equipoise_server.bench.options import PARTS, parser_of

USAGE_ERROR = 2
FAILED = 1


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise bench [PART] ...`; returns the exit status: 2 for wrong usage, 1 when something failed."""
    name, given = (
        ("steps", arguments) if not arguments or arguments[0].startswith("-") else (arguments[0], arguments[1:])
    )
    if name not in PARTS:
        return _failed(f"PART {name}: must be of {', '.join(PARTS)}", USAGE_ERROR)
    options = parser_of(name).parse_args(given)
    from equipoise import EquipoiseError  # after the options: help loads no gRPC
    from equipoise_server.bench.report import Report

    part = import_module(f"equipoise_server.bench.{name}")
    try:
        plan = part.plan(options)
    except ValueError as error:
        return _failed(error, USAGE_ERROR)
    try:
        with options.output.open("a"):  # before a long run, not after it
            pass
    except OSError as error:
        return _failed(error, FAILED)
    report = Report(name, options.output)
    try:
        asyncio.run(part.run(options, plan, report))
    except (EquipoiseError, RuntimeError, OSError) as error:
        if report.results:  # what was measured before is worth something
            report.show()
        return _failed(error, FAILED)
    report.write()
    report.show()
    return 0


def _failed(error: object, status: int) -> int:
    print(f"equipoise bench: {error}", file=sys.stderr)
    return status
