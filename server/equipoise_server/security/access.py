"""Authenticates every call before its body is read; knows which callers' tokens were taken back since."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import structlog

from equipoise_server.errors import Code, ServiceError
from equipoise_server.security.caller import ANYBODY, Caller
from equipoise_server.security.calls import PROBES
from equipoise_server.security.files import Reloads, Stamp, stamp
from equipoise_server.security.tenants import Tenant
from equipoise_server.security.tokens import Scope, Token, TokenFile, TokenFileError, find

log = structlog.get_logger("equipoise.access")

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

SERVICE = "/equipoise.v1.PolicyService/"
HEADER = "authorization"
SCHEME = "bearer "

ALLOWED: Mapping[str, tuple[Scope, ...]] = {
    "CreatePolicy": (Scope.TRAIN,),
    "GetPolicy": (Scope.READ,),
    "ListPolicies": (Scope.READ,),
    "DeletePolicy": (Scope.ADMIN,),
    "Exchange": (Scope.TRAIN,),
    "UpdateWeights": (Scope.TRAIN,),
    "ReadWeights": (Scope.READ,),
    "SampleExamples": (Scope.READ,),
    "WatchPolicy": (Scope.READ,),
    "ExportPolicy": (Scope.READ,),
    "ImportPolicy": (Scope.ADMIN,),
    "GetServerInfo": tuple(Scope),
}
"""Scopes of which a token needs one, by method; for a method that is not here it needs `admin`."""

MAX_OWNERS = 4096
"""Policies of which is remembered whose they are: with many tenants it takes a while to find out."""


class Access:
    """Who may call; for one event loop.

    Args:
        path: the tokens file; None: everybody may do everything.
        wall_clock: seconds since the epoch.

    Attributes:
        reloads: of the tokens file.
    """

    def __init__(self, path: Path | None, *, wall_clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall_clock = wall_clock
        self.reloads = Reloads()
        self._stamp: Stamp = ()
        self._tokens: dict[str, Token] = {}
        self._tenants: Mapping[str, Tenant] = {}
        self._owners: dict[str, str] = {}

    def load(self) -> None:
        """Reads the tokens file. Raises TokenFileError."""
        if self._path is not None:
            self._stamp = stamp([self._path])  # before reading: a change meanwhile is noticed the next time
            file = TokenFile.read(self._path)
            self._tokens = {token.id: token for token in file.tokens}
            self._tenants = file.tenants
            self._owners.clear()

    def refresh(self) -> None:
        """Reads the file again if it has changed.

        A file that cannot be used changes nothing: it may be half written.
        """
        if self._path is not None and stamp([self._path]) != self._stamp:
            try:
                self.load()
                self.reloads.ok += 1
                log.info("tokens loaded", tokens=len(self._tokens), tenants=len(self._tenants))
            except TokenFileError as error:
                self.reloads.failed += 1
                log.error("the tokens file cannot be used; those known before still hold", error=str(error))

    @property
    def tenants(self) -> list[Tenant]:
        """All tenants of the tokens file."""
        return list(self._tenants.values())

    def admit(self, method: str, metadata: Metadata) -> Caller:
        """Who calls `/package.Service/Method`. Raises ServiceError: UNAUTHENTICATED, or SCOPE_MISSING."""
        if self._path is None or method.startswith(PROBES):
            return ANYBODY
        who = self._authenticate(metadata)
        service, _, name = method.rpartition("/")
        if f"{service}/" == SERVICE:
            who.check_scope(*ALLOWED.get(name, (Scope.ADMIN,)), what=name)
        return who

    def tenant_of(self, policy: str) -> str:
        """Name of the tenant whose policies are called so; empty: nobody's but operators'."""
        known = self._owners.get(policy)
        if known is None:
            known = next((each.name for each in self._tenants.values() if each.prefix and each.owns(policy)), "")
            if len(self._owners) >= MAX_OWNERS:
                self._owners.clear()
            self._owners[policy] = known
        return known

    def objection(self, who: Caller) -> ServiceError | None:
        """Why somebody who was admitted would not be admitted now; None: he would."""
        if who.token is None:
            return None
        known = self._tokens.get(who.token.id)
        if known is not None and known.expired(self._wall_clock()):
            return _unauthenticated("TOKEN_EXPIRED", f"token {known.id} has expired")
        if known != who.token or self._tenants[known.tenant].prefix != who.tenant.prefix:
            return _unauthenticated("TOKEN_REVOKED", "the token was changed or taken back; reconnect")
        return None

    def share(self, policy: str) -> str:
        """Who shares what cannot be divided, when work on a policy asks for it: its tenant, or it alone."""
        tenant = self.tenant_of(policy)
        return self.share_of_tenant(tenant) if tenant else f"policy {policy}"

    @staticmethod
    def share_of_tenant(tenant: str) -> str:
        """What a tenant's work shares."""
        return f"tenant {tenant}"

    def _authenticate(self, metadata: Metadata) -> Caller:
        presented = [value for key, value in metadata if key == HEADER]
        if not presented:
            raise _unauthenticated("TOKEN_MISSING", "no token; send the header `authorization: Bearer TOKEN`")
        text = presented[0] if isinstance(presented[0], str) else presented[0].decode("ascii", "replace")
        if len(presented) > 1 or text[: len(SCHEME)].lower() != SCHEME:
            raise _unauthenticated("TOKEN_INVALID", "the header must be one `authorization: Bearer TOKEN`")
        token = find(self._tokens, text[len(SCHEME) :].strip())
        if token is None:
            raise _unauthenticated("TOKEN_INVALID", "the token is not known here, or no longer")
        if token.expired(self._wall_clock()):
            raise _unauthenticated("TOKEN_EXPIRED", f"token {token.id} has expired")
        return Caller(self._tenants[token.tenant], token.scopes, token)


def _unauthenticated(reason: str, message: str) -> ServiceError:
    return ServiceError(Code.UNAUTHENTICATED, reason, message)
