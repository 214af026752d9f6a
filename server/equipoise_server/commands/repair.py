"""Find out what of damaged state can be saved, and save it."""

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise_server.settings import Settings, SettingsError, load

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from equipoise_server.repair import Examined, FileDamage
    from equipoise_server.store import RedisStore
    from equipoise_server.store.salvage import Salvage

PROGRAM = "equipoise repair"
DAMAGED = 1
USAGE_ERROR = 2

EPILOG = """\
Give it the data directory of a server whose own Redis does not start, or that answers STATE_DAMAGED; the server must
be stopped. Without one it takes what `equipoise serve` would: redis_url (redis_url_file, redis_password_file, ...) or
data_dir, from flags such as --redis-url, EQUIPOISE_* variables, or the TOML file of --config.

Nothing is changed without --apply. Then, of a directory, the files as they were are in DATA_DIR/backup-TIME: to go
back, stop the server and put them into the place of the new ones. In a Redis of yours, copies of the keys that were
changed begin with `equipoise:backup-TIME:`; delete them when all is well.

Exit status: 0, all is whole (now); 1, something is damaged (still); 2, it cannot be looked at.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs `equipoise repair ...`; returns the exit status."""
    # Before the flags: of those that are the server's settings the parser cannot tell the values from a directory.
    data_dir = [Path(argument).resolve() for argument in arguments[:1] if not argument.startswith("-")]
    options, settings_flags = _parser().parse_known_args(arguments[len(data_dir) :])
    options.data_dir = data_dir[0] if data_dir else None
    try:
        settings = load(settings_flags, program=PROGRAM)
        if options.data_dir is not None and not options.data_dir.is_dir():
            return _failed(f"{options.data_dir}: there is no such directory")
        return asyncio.run(_run(options, settings))
    except SettingsError as error:
        return _failed(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [DATA_DIR] [--policy NAME]... [--delete] [--apply] [--SETTING VALUE]...",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--policy", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--delete", action="store_true", help="delete the policies of which nothing can be saved")
    parser.add_argument("--apply", action="store_true", help="change what is said")
    return parser


async def _run(options: argparse.Namespace, settings: Settings) -> int:
    from equipoise_server.store import StoreError  # after the settings, as `serve` does

    try:
        if options.data_dir is None and settings.redis is not None:
            return await _repair_redis(options, settings)
        return await _repair_directory(options, options.data_dir or settings.data_dir)
    except (StoreError, OSError) as error:
        return _failed(error)


async def _repair_directory(options: argparse.Namespace, path: Path) -> int:
    """Everything is done in a copy; with --apply it takes the place of the directory's files."""
    from equipoise_server.repair import PolicyRepair, examine_all, repaired
    from equipoise_server.store import RedisStore

    now = datetime.now(UTC)
    async with repaired(path, told=_progress) as directory:
        async with _salvage(RedisStore.connect(directory.url)) as salvage:
            repair = PolicyRepair(salvage, now=now, delete=options.delete)
            examined = await examine_all(repair, salvage, only=options.policy)
            examined = [await repair.mend(each) for each in examined]
        _tell_files(directory.damage)
        for each in examined:
            _tell(each, cut=directory.damage.steps, apply=options.apply)
        if not options.policy:
            _tell_gone(directory.damage, {each.diagnosis.policy for each in examined})
        changed = bool(directory.damage.cuts) or any(each.done for each in examined)
        if changed and options.apply:
            print(f"done; what was there before is in {await directory.replace(now=now)}")
    return _conclude(options, changed=changed, examined=examined)


async def _repair_redis(options: argparse.Namespace, settings: Settings) -> int:
    from equipoise_server.repair import PolicyRepair, examine_all
    from equipoise_server.store import RedisStore

    url = settings.redis
    assert url is not None
    now = datetime.now(UTC)
    backup = f"equipoise:backup-{now:%Y%m%dT%H%M%SZ}"
    store = RedisStore.connect(url, access=settings.redis_access, command_timeout_s=settings.redis_timeout_s)
    async with _salvage(store) as salvage:
        repair = PolicyRepair(salvage, now=now, backup=backup, delete=options.delete)
        examined = await examine_all(repair, salvage, only=options.policy)
        changed = any(not each.is_whole and (each.diagnosis.changes or options.delete) for each in examined)
        if options.apply:
            examined = [await repair.mend(each) for each in examined]
        for each in examined:
            _tell(each, cut={}, apply=options.apply)
        if any(each.done for each in examined):
            print(f"done; copies of what was there before: keys that begin with {backup}:")
    return _conclude(options, changed=changed, examined=examined)


@asynccontextmanager
async def _salvage(store: "RedisStore") -> "AsyncIterator[Salvage]":
    try:
        yield store.salvage()
    finally:
        await store.close()


def _tell_files(damage: "FileDamage") -> None:
    for cut in damage.cuts:
        print(f"{cut}: from here on it cannot be read, and is cut off")


def _tell(examined: "Examined", *, cut: Mapping[str, tuple[int, int]], apply: bool) -> None:
    found = examined.diagnosis
    if examined.server:
        print(f"{found.policy}: in service at {examined.server}")
        return
    if examined.newer:
        print(f"{found.policy}: left as it is: {examined.newer}")
        return
    state = "whole" if found.is_whole else "DAMAGED"
    if apply and not found.is_whole:
        state = examined.done or "DAMAGED"
    at = "" if found.remains.last_version is None or not found.is_whole else f", at step {found.remains.last_version:,}"
    print(f"{found.policy}: {state}{at}")
    first, last = cut.get(found.policy, (0, 0))
    if found.remains.last_version is not None and last > found.remains.last_version:
        print(f"  lost:   steps {max(first, found.remains.last_version + 1)} to {last}, which were in what is cut off")
    for word, texts in (
        ("damage", found.damage),
        ("lost", found.lost),
        ("saved", (found.saved,) if found.damage and found.saved else ()),
        ("failed", (examined.failure,) if examined.failure else ()),
    ):
        for text in texts:
            print(f"  {word + ':':7} {text}")


def _tell_gone(damage: "FileDamage", known: set[str]) -> None:
    for policy in sorted(damage.steps.keys() - known):
        first, last = damage.steps[policy]
        print(f"{policy}: gone with steps {first} to {last}, or deleted later: its creation was cut off, too")


def _conclude(options: argparse.Namespace, *, changed: bool, examined: "Sequence[Examined]") -> int:
    if changed and not options.apply:
        print("nothing was changed; --apply does it")
        return DAMAGED
    if all(each.is_whole for each in examined):
        if not changed:
            print("nothing is damaged")
        return 0
    return DAMAGED


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _failed(error: object) -> int:
    print(f"{PROGRAM}: {error}", file=sys.stderr)
    return USAGE_ERROR
