"""Authenticates every call before its body is read; ends the calls of tokens that are taken back."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import structlog

from equipoise_server.errors import Code, ServiceError
from equipoise_server.security.caller import ANYBODY, Caller, calling
from equipoise_server.security.files import Stamp, stamp
from equipoise_server.security.tenants import Tenant
from equipoise_server.security.tokens import Scope, Token, TokenFile, TokenFileError, find

log = structlog.get_logger("equipoise.access")

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]

SERVICE = "/equipoise.v1.PolicyService/"
HEALTH = "/grpc.health.v1.Health/"
"""Answers everybody: whoever restarts or balances servers has no token."""
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


class Access:
    """Who may call; for one event loop.

    Args:
        path: the tokens file; None: everybody may do everything.
        wall_clock: seconds since the epoch.
    """

    def __init__(self, path: Path | None, *, wall_clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall_clock = wall_clock
        self._stamp: Stamp = ()
        self._tokens: dict[str, Token] = {}
        self._tenants: Mapping[str, Tenant] = {}
        self._live: dict[asyncio.Task[object], tuple[Caller, bool]] = {}
        self._ended: dict[asyncio.Task[object], ServiceError] = {}

    def load(self) -> None:
        """Reads the tokens file. Raises TokenFileError."""
        if self._path is not None:
            self._stamp = stamp([self._path])  # before reading: a change meanwhile is noticed the next time
            file = TokenFile.read(self._path)
            self._tokens = {token.id: token for token in file.tokens}
            self._tenants = file.tenants

    def refresh(self) -> None:
        """Reads the file again if it has changed, and ends the calls of tokens that are no longer good.

        A file that cannot be used changes nothing: it may be half written.
        """
        if self._path is None:
            return
        if stamp([self._path]) != self._stamp:
            try:
                self.load()
                log.info("tokens loaded", tokens=len(self._tokens), tenants=len(self._tenants))
            except TokenFileError as error:
                log.error("the tokens file cannot be used; those known before still hold", error=str(error))
        self._end_revoked()

    def admit(self, method: str, metadata: Metadata) -> Caller:
        """Who calls `/package.Service/Method`. Raises ServiceError: UNAUTHENTICATED, or SCOPE_MISSING."""
        if self._path is None or method.startswith(HEALTH):
            return ANYBODY
        who = self._authenticate(metadata)
        service, _, name = method.rpartition("/")
        if f"{service}/" == SERVICE:
            who.check_scope(*ALLOWED.get(name, (Scope.ADMIN,)), what=name)
        return who

    @contextmanager
    def serving(self, who: Caller, *, streaming: bool) -> Iterator[None]:
        """Surrounds the serving of a call: `caller()` is known in it. Raises ServiceError (QUOTA_STREAMS)."""
        if streaming:
            self._check_streams(who.tenant)
        task = asyncio.current_task()
        assert task is not None, "calls are served by tasks"
        self._live[task] = who, streaming
        try:
            with calling(who):
                yield
        finally:
            del self._live[task]
            self._ended.pop(task, None)

    def ended(self) -> ServiceError | None:
        """Why we cancelled this task; None: it was cancelled by somebody else. To be asked within `serving`."""
        task = asyncio.current_task()
        assert task is not None, "calls are served by tasks"
        error = self._ended.get(task)
        if error is not None:
            task.uncancel()
        return error

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

    def _check_streams(self, tenant: Tenant) -> None:
        if tenant.max_streams is None:
            return
        names = [who.tenant.name for who, streaming in self._live.values() if streaming]
        if names.count(tenant.name) >= tenant.max_streams:
            message = f"{tenant.max_streams} streams are open, the tenant's quota max_streams"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUOTA_STREAMS", message, retry_after_s=1.0)

    def _end_revoked(self) -> None:
        now = self._wall_clock()
        for task, (who, _) in self._live.items():
            if who.token is None or task in self._ended:
                continue
            known = self._tokens.get(who.token.id)
            if known is not None and known.expired(now):
                self._ended[task] = _unauthenticated("TOKEN_EXPIRED", f"token {known.id} has expired")
            elif known != who.token or self._tenants[known.tenant].prefix != who.tenant.prefix:
                self._ended[task] = _unauthenticated("TOKEN_REVOKED", "the token was changed or taken back; reconnect")
            else:
                continue
            task.cancel()


def _unauthenticated(reason: str, message: str) -> ServiceError:
    return ServiceError(Code.UNAUTHENTICATED, reason, message)
