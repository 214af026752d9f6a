"""Finds the damaged policies of a Redis and mends them."""

from dataclasses import dataclass
from datetime import datetime

from equipoise_server.repair.diagnosis import Diagnosis, diagnose
from equipoise_server.store import OwnedElsewhere, StoreError, TooNew
from equipoise_server.store.salvage import Remains, Salvage


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A policy, and what became of it.

    Attributes:
        diagnosis: how it was.
        server: address of the server that serves it, and so knows that it is whole; empty: none.
        newer: why nobody could look at it: a newer release has stored it; empty: not so.
        done: what was done; empty: nothing.
        failure: why what was to be done was not; empty: it was.
    """

    diagnosis: Diagnosis
    server: str = ""
    newer: str = ""
    done: str = ""
    failure: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it is whole now, as far as this release can tell."""
        return bool(self.server or self.newer or self.diagnosis.is_whole or self.done)


class PolicyRepair:
    """The policies of one Redis.

    Args:
        salvage: way to it.
        now: the time.
        backup: prefix for the keys of copies of what is changed; empty: none are made.
        delete: whether policies that cannot be mended are deleted.
    """

    def __init__(self, salvage: Salvage, *, now: datetime, backup: str = "", delete: bool = False) -> None:
        self._salvage = salvage
        self._now = now
        self._backup = backup
        self._delete = delete

    async def examine(self, policy: str) -> Examined | None:
        """Looks at a policy; None: there is none of this name. Raises StoreError."""
        try:
            found = await diagnose(self._salvage, policy, now=self._now.timestamp())
        except TooNew as error:
            nothing = Diagnosis(policy=policy, remains=Remains(policy=policy))
            return Examined(diagnosis=nothing, newer=str(error))
        if found is None:
            return None
        # What is in service changes while it is looked at; a damaged policy cannot be loaded, so this one is whole.
        return Examined(diagnosis=found, server=await self._salvage.server(found.remains))

    async def mend(self, examined: Examined) -> Examined:
        """Does what the diagnosis says. Raises StoreError for a Redis that does not answer."""
        found = examined.diagnosis
        if examined.is_whole or (found.changes is None and not self._delete):
            return examined
        try:
            owner = await self._salvage.acquire(found.remains)
        except OwnedElsewhere as error:
            return Examined(diagnosis=found, failure=f"{error}: stop that server first")
        try:
            if found.changes is None:
                await self._salvage.delete(found.remains, owner=owner, backup=self._backup)
                return Examined(diagnosis=found, done="deleted")
            await self._salvage.write(found.remains, found.changes, owner=owner, backup=self._backup)
        finally:
            await self._salvage.release(owner)
        again = await diagnose(self._salvage, found.policy, now=self._now.timestamp())
        if again is None or not again.is_whole:
            damage = "; ".join(again.damage) if again else "it is gone"
            return Examined(diagnosis=found, failure=f"it is still damaged: {damage}")
        return Examined(diagnosis=found, done="repaired")


async def examine_all(repair: PolicyRepair, salvage: Salvage, *, only: list[str]) -> list[Examined]:
    """All policies, or those named."""
    found = []
    for name in only or await salvage.names():
        if (examined := await repair.examine(name)) is not None:
            found.append(examined)
        elif only:
            raise StoreError(f"there is no policy {name!r}")
    return found
