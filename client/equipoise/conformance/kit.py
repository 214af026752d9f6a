"""The kit: all checks, run one after another, each with its verdict."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import grpc

from equipoise.conformance import golden, policies, reads, requests, sequences, server
from equipoise.conformance.check import Check, InapplicableError, MismatchError, shortened
from equipoise.conformance.target import Target
from equipoise.errors import from_rpc

Verdict: TypeAlias = Literal["ok", "FAILED", "skipped"]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a check: its name, what was expected, what came, and the verdict."""

    name: str
    verdict: Verdict
    expected: str
    found: str


def all_checks(vectors: Path, *, exact: bool) -> list[Check]:
    """Every check, in order; those of the rules from the golden vectors in a folder."""
    found: list[Check] = []
    for module in (server, policies, sequences):
        found += [value for value in vars(module).values() if isinstance(value, Check)]
    found += requests.checks()
    found += [value for value in vars(reads).values() if isinstance(value, Check)]
    return [*found, *golden.checks(vectors, exact=exact)]


def run(target: Target, checks: Sequence[Check]) -> Iterator[Result]:
    """The result of each check, as it is made."""
    for each in checks:
        verdict, found = _run(target, each)
        yield Result(each.name, verdict, each.expected, shortened(found))


def _run(target: Target, each: Check) -> tuple[Verdict, str]:
    try:
        return "ok", each.run(target)
    except InapplicableError as why:
        return "skipped", str(why)
    except MismatchError as mismatch:
        return "FAILED", str(mismatch)
    except grpc.RpcError as failure:
        error = from_rpc(failure, address=target.server.address)
        return "FAILED", f"{failure.code().name} {error.reason}: {error}"
    except Exception as error:  # an answer that nobody thought of is one more way to be wrong
        return "FAILED", f"{type(error).__name__}: {error}"
