"""List, show, export, import, delete and watch policies, and read their weights."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from equipoise import errors
from equipoise.admin import PolicyAdmin
from equipoise.archive import ArchiveError
from equipoise.commands.guarded import add_security_options, security
from equipoise.commands.tables import row_of, table
from equipoise.commands.weights import Selection, Table, count, key_table, row_range, table_file, writer
from equipoise.policies import PolicyStatus

FAILED = 1
USAGE_ERROR = 2
NOT_FOUND = 3
UNREACHABLE = 4
EXIT_STATUSES = "exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 no such policy, 4 the server is not reached"

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
    add_security_options(common)
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
    weighing = action("weights", _weights, "write the weights and scores of a policy's examples as a table")
    weighing.add_argument(
        "--output", type=table_file, metavar="FILE", help="a .csv or .parquet file; default: CSV to standard output"
    )
    weighing.add_argument(
        "--sort", choices=("weight", "score"), help="lowest first, never scored last; default: by row and id"
    )
    weighing.add_argument("--descending", action="store_true", help="with --sort: highest first")
    weighing.add_argument("--limit", type=count, metavar="K", help="the first K lines alone")
    weighing.add_argument(
        "--rows", type=row_range, metavar="FIRST:END", help="of a trajectory, these training steps; default: all"
    )
    weighing.add_argument(
        "--keys",
        type=key_table,
        metavar="FILE",
        help="names of the examples, which then are a column: what `ExampleKeys.save` or a Trainer wrote",
    )
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
    if status.strata and not options.json:
        print("", table(STRATA, _strata(status)), sep="\n")
    return 0


def _weights(options: Options) -> int:
    if options.json and options.output is None:
        return _failed("--json says what was written: give --output FILE too", USAGE_ERROR)
    if options.descending and options.sort is None:
        return _failed("--descending: give --sort weight or --sort score too", USAGE_ERROR)
    chosen = Selection(
        sort=options.sort,
        descending=options.descending,
        limit=options.limit,
        rows=options.rows,
        keys=options.keys,
    )
    with _admin(options) as admin:
        status = admin.get(options.policy)
        weights = Table(admin, status, chosen)
        with writer(options.output, status) as file:
            for piece in weights.pieces():
                file.write(piece)
    first, last = min(weights.versions), max(weights.versions)
    if first != last:
        moved = (
            f"{options.policy} went from version {first} to {last} while it was read: lines are of different versions"
        )
        print(f"equipoise policy: {moved}", file=sys.stderr)
    if options.output is not None:
        sentence = f"{weights.lines} lines of {options.policy} at version {last} are in {options.output}"
        _done(options, sentence, version=last, lines=weights.lines)
    return 0


def _export(options: Options) -> int:
    with _admin(options) as admin:
        version = admin.export_policy(options.policy, options.file)
    _done(options, f"{options.policy} at version {version} is in {options.file}", version=version)
    return 0


def _import(options: Options) -> int:
    with _admin(options) as admin:
        status = admin.import_policy(options.file, options.policy)
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
    return PolicyAdmin(options.server, timeout=options.timeout, security=security(options))


def _facts(status: PolicyStatus) -> list[tuple[str, object]]:
    facts = asdict(status)
    spec = facts.pop("spec")
    settings = spec.pop("settings")
    facts.pop("strata")
    if not status.strata:
        facts.pop("strata_contrast")
    named = list(spec.items()) + [(f"settings.{name}", value) for name, value in settings.items()]
    named += list((facts | {"create_time": _time(status.create_time)}).items())
    return [(name.replace("_", " "), value) for name, value in named]


STRATA = ("GROUP", "STRATUM", "EXAMPLES", "ABOVE LOSS", "CONTRIBUTIONS", "MEAN", "ERROR", "Z", "RATIO", "WEIGHT", "")
BAR = 20
"""Characters of a bar that stands for the largest weight."""


def _strata(status: PolicyStatus) -> list[tuple[object, ...]]:
    """A line for each stratum; a bar draws its weight."""
    largest = max(each.weight for each in status.strata) or 1.0
    return [(*asdict(each).values(), "#" * max(1, round(BAR * each.weight / largest))) for each in status.strata]


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
