"""The command line: one script whose subcommands belong to the packages that own them.

A subcommand is an entry point of group `equipoise.commands`: a callable that takes its arguments and returns the exit
status. It is loaded only when it is asked for, so that `equipoise --help` is quick and needs no extra.
"""

import ast
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from typing import TypeAlias

Command: TypeAlias = Callable[[Sequence[str]], int]
"""A subcommand: arguments after its name in, exit status out."""

GROUP = "equipoise.commands"
USAGE_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


class UnknownCommandError(Exception):
    """There is no such command; the message suggests one."""


class MissingExtraError(Exception):
    """A command's extra is not installed; the message says how to install it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 2 for a usage error, 130 when interrupted."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's remarks on connections that end are no news to a user
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except (UnknownCommandError, MissingExtraError) as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has left, as in `equipoise policy list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in the buffer must not fail too
        return BROKEN_PIPE
    return status


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, *rest = arguments
    if name in ("-V", "--version", "version"):
        print(f"equipoise {version('equipoise')}")
        return 0
    return load(name)(rest)


def commands() -> dict[str, EntryPoint]:
    """Entry points of all subcommands by name, none of them loaded."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def overview() -> str:
    """What `equipoise --help` prints."""
    lines = ["usage: equipoise COMMAND [OPTION]...", "", "commands:"]
    lines += [f"  {name:<11} {summary(point)}" for name, point in commands().items()]
    lines += ["", "`equipoise COMMAND --help` tells more; `equipoise --version` prints the version."]
    return "\n".join(lines)


def summary(point: EntryPoint) -> str:
    """First line of the docstring of a command's module, read without running the module."""
    spec = find_spec(point.module)
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        return ""
    source = spec.loader.get_source(point.module)
    docstring = ast.get_docstring(ast.parse(source)) if source else None
    return docstring.splitlines()[0].rstrip(".") if docstring else ""


def load(name: str) -> Command:
    """The subcommand of this name.

    Raises UnknownCommandError, or MissingExtraError when what the command needs is not installed.
    """
    known = commands()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(known)}"
        raise UnknownCommandError(f"no command {name!r}: {hint}")
    point = known[name]
    try:
        command: Command = point.load()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not point.extras or missing.startswith("equipoise"):  # our own module is missing: a bug, no missing extra
            raise
        cure = f"pip install 'equipoise[{','.join(point.extras)}]'"
        raise MissingExtraError(f"{name!r} needs {missing}, which is not installed: {cure}") from error
    return command
