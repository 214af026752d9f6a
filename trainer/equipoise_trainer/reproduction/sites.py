"""Where the rows of a run are held, and under which name, so that a killed run finds them again."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from equipoise_trainer.offline.rows import LocalRows, RowSettings
from equipoise_trainer.offline.served import ServedRows
from equipoise_trainer.reproduction.runs import Site, finished

RowsAt: TypeAlias = Literal["served", "local"]
"""Who holds the rows: a policy server, or this process."""

NAME_FILE = "policy.json"


@contextmanager
def open_site(
    directory: Path, settings: RowSettings, *, rows: RowsAt, address: str | None, label: str, reference_nats: float
) -> Iterator[Site]:
    """A holder for a run's rows; a policy on a server is deleted once the run is finished.

    Args:
        directory: the run's folder, made if need be.
        settings: the policy.
        rows: who holds it.
        address: `host:port` of the server; None: none, and `rows` is `local`.
        label: what the policy is called, before a random token that the folder remembers.
        reference_nats: ln|V|.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if rows == "local":
        _forget(directory)  # of a process whose rows are gone with it
        yield Site(directory=directory, holder=LocalRows(settings), rows="in process", address=address)
        return
    assert address is not None, "served rows need a server"
    policy = _policy_name(directory, label)
    with ServedRows(address, policy=policy, settings=settings, reference_nats=reference_nats) as holder:
        if not holder.moves():
            _forget(directory, but=NAME_FILE)  # of a server whose policy is gone
        yield Site(directory=directory, holder=holder, rows="on the server", address=address)
        if finished(directory):
            holder.delete()
            (directory / NAME_FILE).unlink()


def _policy_name(directory: Path, label: str) -> str:
    """The policy's name, the same at every start until the run is finished."""
    file = directory / NAME_FILE
    if not file.exists():
        file.write_text(json.dumps({"policy": f"reproduce-{label}-{secrets.token_hex(4)}"}), encoding="utf-8")
    return str(json.loads(file.read_text(encoding="utf-8"))["policy"])


def _forget(directory: Path, *, but: str = "") -> None:
    """Removes what a run that cannot go on has left."""
    for file in directory.iterdir():
        if file.name != but:
            file.unlink()
