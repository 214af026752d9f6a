"""How many policies and examples a tenant may store."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from equipoise_server.errors import Code, ServiceError
from equipoise_server.security.tenants import Tenant


class StorageQuotas:
    """Holds tenants to `max_policies` and `max_examples`; for one event loop.

    What is stored is counted in the store when something is to be added, so the count cannot drift. Only one of the
    servers that share a store adds for a tenant at a time.

    Args:
        sizes: number of examples of each policy whose name begins with a prefix.
        lock: surrounds what only one server at a time may do, by name.
    """

    def __init__(
        self,
        sizes: Callable[[str], Awaitable[list[int]]],
        lock: Callable[[str], AbstractAsyncContextManager[None]],
    ) -> None:
        self._sizes = sizes
        self._lock = lock
        self._locks: dict[str, asyncio.Lock] = {}

    async def check(self, tenant: Tenant, *, num_examples: int) -> None:
        """Raises as `adding` does, if it would now: so that nobody sends in vain."""
        if tenant.max_policies is not None or tenant.max_examples is not None:
            _check(tenant, await self._sizes(tenant.prefix), num_examples)

    @asynccontextmanager
    async def adding(self, tenant: Tenant, *, num_examples: int) -> AsyncIterator[None]:
        """Surrounds the creation of a policy. Raises ServiceError (QUOTA_POLICIES, QUOTA_EXAMPLES)."""
        if tenant.max_policies is None and tenant.max_examples is None:
            yield
            return
        async with self._locks.setdefault(tenant.name, asyncio.Lock()), self._lock(f"quota:{tenant.name}"):
            _check(tenant, await self._sizes(tenant.prefix), num_examples)
            yield


def _check(tenant: Tenant, sizes: list[int], num_examples: int) -> None:
    if tenant.max_policies is not None and len(sizes) >= tenant.max_policies:
        message = f"{len(sizes)} policies are stored, the tenant's quota max_policies is {tenant.max_policies}"
        raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUOTA_POLICIES", message)
    stored = sum(sizes)
    if tenant.max_examples is not None and stored + num_examples > tenant.max_examples:
        message = (
            f"{num_examples} examples more than the {stored} that are stored would exceed the tenant's quota"
            f" max_examples, {tenant.max_examples}"
        )
        raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUOTA_EXAMPLES", message)
