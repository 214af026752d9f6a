"""Who makes a call, and what he may do."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from equipoise_server.errors import Code, ServiceError, quoted
from equipoise_server.security.tenants import Tenant
from equipoise_server.security.tokens import Scope, Token

ANY_SCOPE = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call.

    Attributes:
        tenant: to whom the token belongs.
        scopes: what it allows.
        token: the entry of the token; None: the server asks for none.
    """

    tenant: Tenant
    scopes: frozenset[Scope]
    token: Token | None = None

    def check_scope(self, *allowed: Scope, what: str) -> None:
        """Raises ServiceError (SCOPE_MISSING) unless one of these scopes is there."""
        if self.scopes.isdisjoint(allowed):
            message = f"{what} needs scope {' or '.join(allowed)}; this token has {', '.join(sorted(self.scopes))}"
            raise ServiceError(Code.PERMISSION_DENIED, "SCOPE_MISSING", message)

    def check_policy(self, policy: str, *, field: str) -> None:
        """Raises ServiceError (POLICY_FORBIDDEN) for another tenant's policy, whether it exists or not."""
        if not self.tenant.owns(policy):
            message = (
                f"{field}: {quoted(policy)} does not begin with {self.tenant.prefix!r}, as this token's policies do"
            )
            raise ServiceError(Code.PERMISSION_DENIED, "POLICY_FORBIDDEN", message)

    def visible_prefix(self, asked: str) -> str | None:
        """What names in a listing begin with, when names that begin with `asked` are wanted; None: nothing is visible.

        What a tenant may not see is left out and not refused: he lists the policies as if the others were not there.
        """
        prefix = self.tenant.prefix
        if asked.startswith(prefix):
            return asked
        return prefix if prefix.startswith(asked) else None


ANYBODY = Caller(Tenant(name="", prefix=""), ANY_SCOPE)
"""The caller of a server that asks for no tokens."""

_caller: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who makes the call that this task serves. Raises LookupError outside of calls."""
    return _caller.get()


@contextmanager
def calling(who: Caller) -> Iterator[None]:
    """Names the caller for this task until the block ends."""
    reset = _caller.set(who)
    try:
        yield
    finally:
        _caller.reset(reset)
