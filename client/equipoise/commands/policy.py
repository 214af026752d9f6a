"""List, show, export, import, delete and watch policies."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from equipoise import errors
from equipoise.admin import PolicyAdmin
from equipoise.archive import ArchiveError, PolicyArchive, export_policy, import_policy
from equipoise.channel import Server
from equipoise.commands.tables import row_of, table
from equipoise.policies import PolicyStatus
from equipoise.security import Security

FAILED = 1
USAGE_ERROR = 2
NOT_FOUND = 3
UNREACHABLE = 4
EXIT_STATUSES = "exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 no such policy, 4 the server is not reached"

SECURITY_FILES = {
    "root_certificates": "encrypt, trusting these authorities (PEM)",
    "client_certificate": "certificate to show (PEM)",
    "client_key": "private key of the certificate (PEM)",
    "token_file": "file that holds the token; EQUIPOISE_TOKEN may hold the token itself",
}

Options: TypeAlias = argparse.Namespace


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise policy ...` and returns its exit status."""
    options = _parser().parse_args(arguments)
    run: Callable[[Options], int] = options.run
    try:
        return run(options)
    except errors.PolicyNotFoundError as error:
        return _failed(error, NOT_FOUND)
    except errors.UnavailableError as error:
        return _failed(error, UNREACHABLE)
    except (errors.EquipoiseError, ArchiveError) as error:
        return _failed(error, FAILED)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else error, FAILED)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--server", default="localhost:50051", metavar="HOST:PORT", help="default: %(default)s")
    common.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="default: %(default)s")
    guarded = common.add_argument_group("guarded servers", "Each has a variable too, such as EQUIPOISE_TOKEN_FILE.")
    guarded.add_argument("--tls", action="store_true", default=None, help="encrypt, trusting the usual authorities")
    for name, help_text in SECURITY_FILES.items():
        guarded.add_argument(f"--{name.replace('_', '-')}", metavar="FILE", help=help_text)
    common.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser = argparse.ArgumentParser(prog="equipoise policy", description=__doc__, epilog=EXIT_STATUSES)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(
        name: str, run: Callable[[Options], int], help_text: str, *, policy: bool = True
    ) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=help_text, description=help_text, parents=[common], epilog=EXIT_STATUSES)
        added.set_defaults(run=run)
        if policy:
            added.add_argument("policy", help="name of the policy")
        return added

    listing = action("list", _list, "list policies", policy=False)
    listing.add_argument("--prefix", default="", help="only names that start with this")
    action("show", _show, "show how a policy stands")
    exporting = action("export", _export, "write the whole state of a policy to a file")
    exporting.add_argument("file", type=Path, help="a .npz file; numpy.load reads it")
    importing = action("import", _import, "create a policy with the state from a file")
    importing.add_argument("file", type=Path, help="a file that `export` wrote")
    deleting = action("delete", _delete, "delete a policy and all that was learnt")
    deleting.add_argument("--yes", action="store_true", help="do not ask")
    watching = action("watch", _watch, "follow a policy: one line for each change")
    watching.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="default: %(default)s")
    return parser


def _list(options: Options) -> int:
    with _admin(options) as admin:
        policies = list(admin.list_policies(options.prefix))
    if options.json:
        print(_json([asdict(policy) for policy in policies]))
        return 0
    rows = [(p.spec.name, p.spec.num_examples, p.spec.rule, p.spec.durability, _time(p.create_time)) for p in policies]
    print(table(("NAME", "EXAMPLES", "RULE", "DURABILITY", "CREATED"), rows) if rows else "no policies")
    return 0


def _show(options: Options) -> int:
    with _admin(options) as admin:
        status = admin.get(options.policy)
    print(_json(asdict(status)) if options.json else table(("FIELD", "VALUE"), _facts(status)))
    return 0


def _export(options: Options) -> int:
    archive = export_policy(_server(options), options.policy)
    archive.save(options.file)
    _done(options, f"{options.policy} at version {archive.version} is in {options.file}", version=archive.version)
    return 0


def _import(options: Options) -> int:
    status = import_policy(_server(options), PolicyArchive.load(options.file), options.policy)
    _done(options, f"{options.policy} has the state of {options.file}", uid=status.uid)
    return 0


def _delete(options: Options) -> int:
    with _admin(options) as admin:
        status = admin.get(options.policy)
        if not options.yes and not _confirmed(status):
            return _failed(f"{options.policy} was not deleted; --yes deletes without asking", USAGE_ERROR)
        admin.delete(options.policy, uid=status.uid)
    _done(options, f"{options.policy} is deleted", uid=status.uid)
    return 0


WATCHED: dict[str, Callable[[PolicyStatus], object]] = {
    "VERSION": lambda s: s.version,
    "DURABLE": lambda s: s.durable_version,
    "STEP": lambda s: s.training_step,
    "EFFECTIVE": lambda s: s.effective_examples / s.spec.num_examples,
    "SIM": lambda s: s.sim,
    "POSITIVE": lambda s: s.positive_share,
    "TARGET LOSS": lambda s: s.target_loss,
    "GUARD LOSS": lambda s: s.guard_loss,
    "GUARD": lambda s: s.guard_strength,
}
"""Columns of `watch`."""


def _watch(options: Options) -> int:
    widths = [max(len(head), 10) for head in WATCHED]
    if not options.json:
        print(row_of(list(WATCHED), widths))
    with _admin(options) as admin, suppress(KeyboardInterrupt):
        for status in admin.watch(options.policy, min_interval=options.interval):
            line = (
                json.dumps(asdict(status), default=_plain)
                if options.json
                else row_of([value(status) for value in WATCHED.values()], widths)
            )
            print(line, flush=True)
    return 0


def _admin(options: Options) -> PolicyAdmin:
    return PolicyAdmin(options.server, timeout=options.timeout, security=_security(options))


def _server(options: Options) -> Server:
    return Server(options.server, _security(options))


def _security(options: Options) -> Security:
    """Flags, then the environment."""
    names = ("tls", *SECURITY_FILES)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if "token_file" in given:
        given["token"] = None  # the flag takes the place of a token in the environment
    return replace(Security.from_environment(), **given)


def _facts(status: PolicyStatus) -> list[tuple[str, object]]:
    facts = asdict(status)
    spec = facts.pop("spec")
    settings = spec.pop("settings")
    named = list(spec.items()) + [(f"settings.{name}", value) for name, value in settings.items()]
    named += list((facts | {"create_time": _time(status.create_time)}).items())
    return [(name.replace("_", " "), value) for name, value in named]


def _confirmed(status: PolicyStatus) -> bool:
    question = f"delete {status.spec.name}, {status.spec.num_examples} examples, version {status.version}? [y/N] "
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _done(options: Options, sentence: str, **facts: object) -> None:
    print(_json({"policy": options.policy, **facts}) if options.json else sentence)


def _failed(error: object, status: int) -> int:
    print(f"equipoise policy: {error}", file=sys.stderr)
    return status


def _json(value: object) -> str:
    return json.dumps(value, indent=2, default=_plain)


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _time(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")
