"""Make tokens for a server that asks for them."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from equipoise_server.security import Scope, TokenFile, TokenFileError, entry, new_token

USAGE_ERROR = 2
FAILED = 1

EXAMPLE = """\
The tokens file, in TOML, has a table for each tenant and an entry for each token:

  [tenants.vision]
  prefix = "vision-"          # the names of his policies begin with this; "" is an operator, who has all
  max_policies = 20           # quotas, each may be left out: policies,
  max_examples = 100_000_000  # examples of all of them,
  max_streams = 64            # streams at once, on one server

  equipoise token create --tenant vision --scopes read,train --tokens-file tokens.toml --output trainer.token

appends an entry with the token's SHA-256, and writes the token to a file of its own. A running server notices. To take
a token back, remove its entry: what it has open ends within seconds.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise token ...`; returns the exit status: 2 for wrong usage, 1 when a file cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        return _create(options)
    except TokenFileError as error:
        return _failed(error, FAILED)
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}", FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="equipoise token",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a token", description="Make a token.")
    create.add_argument("--tenant", required=True, help="to whom it belongs: a table of the tokens file")
    create.add_argument(
        "--scopes",
        type=_scopes,
        default=_scopes("read,train"),
        metavar="SCOPE,...",
        help="what it allows: read (look, sample, export), train (create policies, send steps),"
        " admin (delete, import); default: read,train",
    )
    create.add_argument("--days", type=int, metavar="N", help="days until it expires; default: never")
    create.add_argument("--tokens-file", type=Path, metavar="FILE", help="append its entry here instead of printing it")
    create.add_argument(
        "--output", type=Path, metavar="FILE", help="write it here, readable by you alone; must not exist"
    )
    return parser


def _scopes(text: str) -> tuple[Scope, ...]:
    try:
        return tuple(Scope(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: must be of {', '.join(Scope)}, separated by commas") from error


def _create(options: argparse.Namespace) -> int:
    expires = None
    if options.days is not None:
        if options.days < 1:
            return _failed(f"--days: {options.days}, must be at least 1", USAGE_ERROR)
        expires = datetime.now(UTC) + timedelta(days=options.days)
    token, kept = new_token(tenant=options.tenant, scopes=options.scopes, expires=expires)
    if options.tokens_file is not None:
        _check_tenant(options.tokens_file, options.tenant)
    if options.output is None:
        print(token)
    else:
        _write_secret(options.output, token)
    if options.tokens_file is None:
        print(f"\n{entry(kept)}", end="")
    else:
        with options.tokens_file.open("a", encoding="utf-8") as file:
            file.write(f"\n{entry(kept)}")
    return 0


def _check_tenant(path: Path, tenant: str) -> None:
    if tenant not in TokenFile.read(path).tenants:
        raise TokenFileError(f"{path}: there is no table [tenants.{tenant}]; write it first, with the tenant's prefix")


def _write_secret(path: Path, token: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(f"{token}\n")


def _failed(error: object, status: int) -> int:
    print(f"equipoise token: {error}", file=sys.stderr)
    return status
