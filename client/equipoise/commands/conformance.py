"""Check whether a server keeps the contract."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import grpc

from equipoise import contract, errors
from equipoise.channel import Server
from equipoise.commands import guarded
from equipoise.conformance import kit
from equipoise.conformance.check import Check
from equipoise.conformance.kit import Result
from equipoise.conformance.target import Target

FAILED = 1
USAGE_ERROR = 2
PREFIX = r"([a-z0-9][a-z0-9._-]{0,99})?"
UNREACHABLE = 4
EPILOG = (
    "Needs the scopes read, train and admin where the server asks for tokens. Exit status: 0 every check passed, "
    "1 some did not, 2 wrong usage, 4 the server is not reached."
)


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise conformance ...` and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        checks = _chosen(kit.all_checks(options.vectors, exact=options.exact), options.only)
        if options.list:
            print("\n".join(each.name for each in checks))
            return 0
        server = Server(options.address, guarded.security(options))
        target = Target(server, prefix=options.prefix, timeout_s=options.timeout)
    except (errors.EquipoiseError, ValueError) as error:
        print(f"equipoise conformance: {error}", file=sys.stderr)
        return USAGE_ERROR
    try:
        target.connect()
        return _run(target, checks, as_json=options.json)
    except grpc.RpcError as failure:
        told = errors.from_rpc(failure, address=options.address)
        print(f"equipoise conformance: GetServerInfo: {told}", file=sys.stderr)
        return UNREACHABLE if isinstance(told, errors.UnavailableError) else FAILED
    finally:
        target.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="equipoise conformance", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "address", metavar="HOST:PORT", nargs="?", default="localhost:50051", help="default: %(default)s"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="BEGINNING", help="checks whose names begin so; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the checks and make none")
    parser.add_argument("--exact", action="store_true", help="rules must answer every bit, not within the tolerance")
    parser.add_argument(
        "--prefix", default="conformance-", help="beginning of the policies' names, deleted at the end: %(default)s"
    )
    parser.add_argument(
        "--vectors", type=Path, default=contract.folder() / "vectors", metavar="FOLDER", help="golden vectors"
    )
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="longest wait for an answer: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    guarded.add_security_options(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError naming option, value and rule."""
    if not options.timeout > 0:
        raise ValueError(f"--timeout {options.timeout:g}: must be positive")
    if not re.fullmatch(PREFIX, options.prefix):
        raise ValueError(f"--prefix {options.prefix!r}: must match {PREFIX}, the beginning of a policy's name")


def _chosen(checks: Sequence[Check], beginnings: Sequence[str]) -> list[Check]:
    chosen = [each for each in checks if not beginnings or each.name.startswith(tuple(beginnings))]
    if not chosen:
        raise ValueError(f"--only {' --only '.join(beginnings)}: no check's name begins so; --list shows them")
    return chosen


def _run(target: Target, checks: Sequence[Check], *, as_json: bool) -> int:
    results: list[Result] = []
    width = max(len(each.name) for each in checks)
    left: list[str] = []
    try:
        for result in kit.run(target, checks):
            results.append(result)
            if not as_json:
                print(_line(result, width), flush=True)
    finally:
        left = target.clean_up()
        if left:
            print(f"equipoise conformance: perhaps not deleted: {', '.join(left)}", file=sys.stderr)
    failed = sum(result.verdict == "FAILED" for result in results)
    skipped = sum(result.verdict == "skipped" for result in results)
    if as_json:
        facts = {"server": target.server.address, "build": target.info.build_version, "failed": failed}
        print(json.dumps(facts | {"checks": [asdict(result) for result in results]}, indent=2))
    else:
        print(f"{len(results) - failed - skipped} ok, {failed} failed, {skipped} skipped")
    return FAILED if failed else 0


def _line(result: Result, width: int) -> str:
    return f"{result.verdict:<7}  {result.name:<{width}}  expected: {result.expected}; came: {result.found}"
