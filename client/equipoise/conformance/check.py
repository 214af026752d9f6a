"""A check: what is expected of a server, and how to find out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from equipoise.conformance.target import Target
from equipoise.errors import STATUS_KEY

DOMAIN = "equipoise"
MAX_FOUND = 300
"""Characters of what came that are shown."""


class MismatchError(Exception):
    """The server answered something else than the contract says; the message tells what came."""


class InapplicableError(Exception):
    """The check cannot be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: `group/what`.
        expected: what the contract says, in a sentence.
        run: finds out; returns what came in a few words, or raises MismatchError or InapplicableError.
    """

    name: str
    expected: str
    run: Callable[[Target], str]


def check(name: str) -> Callable[[Callable[[Target], str | None]], Check]:
    """Makes a check of a function whose docstring says what is expected."""

    def made(function: Callable[[Target], str | None]) -> Check:
        assert function.__doc__, f"{name} says nothing"
        expected = " ".join(function.__doc__.split()).rstrip(".")
        return Check(name, expected, lambda target: function(target) or "as expected")

    return made


def expect(what: str, found: object, expected: object) -> None:
    """Raises MismatchError unless both are equal."""
    if found != expected:
        raise MismatchError(shortened(f"{what} is {found!r}, not {expected!r}"))


def shortened(text: str) -> str:
    """One line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_FOUND else f"{line[: MAX_FOUND - 1]}…"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A google.rpc.Status, unpacked: canonical code, reason, metadata, bad fields."""

    code: int
    reason: str
    domain: str
    metadata: Mapping[str, str]
    fields: tuple[str, ...]

    @classmethod
    def of(cls, status: status_pb2.Status) -> "Refusal":
        """The details that every error carries; empty where they are missing."""
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        for detail in status.details:
            detail.Unpack(info) or detail.Unpack(bad)
        fields = tuple(violation.field for violation in bad.field_violations)
        return cls(status.code, info.reason, info.domain, dict(info.metadata), fields)

    def check(self, *, code: grpc.StatusCode, reason: str, field: str = "") -> None:
        """Raises MismatchError unless it is this one."""
        expect("the code in the details", self.code, code.value[0])
        expect("the reason", self.reason, reason)
        expect("the domain", self.domain, DOMAIN)
        if field and field not in self.fields:
            raise MismatchError(f"BadRequest names the fields {list(self.fields)}, not {field!r}")


@dataclass(slots=True)
class Ended:
    """How a call ended: what its error carries in its metadata."""

    metadata: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def refused(*, code: grpc.StatusCode, reason: str, field: str = "") -> Iterator[Ended]:
    """The block must end with this error, details included."""
    ended = Ended()
    try:
        yield ended
    except grpc.RpcError as failure:
        expect("the code", failure.code().name, code.name)
        trailing: Any = failure.trailing_metadata()
        carried = [value for key, value in trailing or () if key == STATUS_KEY]
        if len(carried) != 1:
            raise MismatchError(f"{len(carried)} values of {STATUS_KEY} in the trailing metadata, not 1") from failure
        refusal = Refusal.of(status_pb2.Status.FromString(carried[0]))
        refusal.check(code=code, reason=reason, field=field)
        ended.metadata = refusal.metadata
    else:
        raise MismatchError(f"no error, where {code.name} {reason} was expected")


@contextmanager
def failing(code: grpc.StatusCode) -> Iterator[None]:
    """The block must end with this code, whatever the details."""
    try:
        yield
    except grpc.RpcError as failure:
        expect("the code", failure.code().name, code.name)
    else:
        raise MismatchError(f"no error, where {code.name} was expected")
