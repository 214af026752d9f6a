"""Which of a server's processes one is: what the parent of several tells each of them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from equipoise_server.addresses import host_and_port, joined
from equipoise_server.settings import MIB, Settings

DIVIDED = ("max_inflight_bytes", "max_import_bytes", "max_backlogs_bytes")
"""Bounds of the memory of a whole server: each process has an equal part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process among several of a server.

    Attributes:
        number: of the process, from 0.
        processes: how many there are.
        shared: address HOST:PORT at which all of them listen.
        own: address HOST:PORT at which it alone listens.
        advertise: address HOST:PORT under which trainers reach it; empty: what follows from `own`.
        redis_url: of the Redis that the parent runs; empty: the settings name one.
        directory: private folder of the server, for `socket` and `ready_file`.
    """

    number: int
    processes: int
    shared: str
    own: str
    advertise: str
    redis_url: str
    directory: str

    @property
    def socket(self) -> Path:
        """Unix socket of its metrics and checks."""
        return Path(self.directory, f"{self.number}.sock")

    @property
    def ready_file(self) -> Path:
        """File that appears once it serves."""
        return Path(self.directory, f"{self.number}.json")

    def settings(self, whole: Settings) -> Settings:
        """Its settings, of those of the whole server."""
        return whole.model_copy(
            update={
                "ready_file": self.ready_file,
                "metrics_max_policies": self._share(whole.metrics_max_policies),
                **{name: max(MIB, self._share(getattr(whole, name))) for name in DIVIDED},
            }
        )

    def order(self, settings: Settings) -> bytes:
        """All this as one line, with secrets: for a pipe, not for a command line.

        Without the file of settings, which is read once: by the parent.
        """
        given = {name: _plain(getattr(settings, name)) for name in Settings.model_fields} | {"config": None}
        return json.dumps({"part": asdict(self), "settings": given}).encode() + b"\n"

    @classmethod
    def from_order(cls, line: bytes) -> "tuple[Part, Settings]":
        """What `order` was made of."""
        given: dict[str, Any] = json.loads(line)
        return cls(**given["part"]), Settings(**given["settings"])

    def _share(self, whole: int) -> int:
        return whole // self.processes + (self.number < whole % self.processes)


def own_addresses(settings: Settings) -> list[tuple[str, str]]:
    """Where each process listens alone, and what it advertises: at the ports behind the shared one.

    With `listen` at port 0 it is a free port each. What follows from `listen` is advertised as an empty text.
    """
    return [
        (_behind(settings.listen, number), settings.advertise and _behind(settings.advertise, number))
        for number in range(settings.processes)
    ]


def _behind(address: str, number: int) -> str:
    host, port = host_and_port(address)
    return joined(host, port and port + 1 + number)


def _plain(value: object) -> object:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value) if isinstance(value, Path) else value
