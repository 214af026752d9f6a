"""Tenants: whose policies are whose, by the beginnings of their names, and how much of the server each may take."""

from collections.abc import Iterable
from itertools import permutations
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PREFIX_RULE = r"([a-z0-9][a-z0-9._-]{0,126})?"
"""Beginnings of policies' names; the empty one is that of all names."""

Limit = Annotated[int | None, Field(gt=0)]


class Quotas(BaseModel):
    """The most that a tenant may take; None: no bound but the server's own.

    Attributes:
        max_policies: policies stored.
        max_examples: examples of these together; a trajectory counts those of all its rows.
        max_calls: calls under way at once on one server, streams included; None: the server's max_tenant_rpcs.
        max_streams: streams open at once on one server, of every kind.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_policies: Limit = None
    max_examples: Limit = None
    max_calls: Limit = None
    max_streams: Limit = None


class Tenant(Quotas):
    """Somebody who has policies of his own.

    Attributes:
        name: for logs.
        prefix: what the names of his policies begin with; empty: an operator, to whom all policies belong.
    """

    name: str
    prefix: str = Field(pattern=rf"^{PREFIX_RULE}$")

    def owns(self, policy: str) -> bool:
        """Whether a policy of this name is, or would be, his."""
        return policy.startswith(self.prefix)


def check_apart(tenants: Iterable[Tenant]) -> None:
    """Raises ValueError when one tenant could see another's policies: only an operator may, whose prefix is empty."""
    for one, other in permutations(tenants, 2):
        if one.prefix and other.prefix.startswith(one.prefix):
            raise ValueError(
                f"tenants.{other.name}.prefix: {other.prefix!r} begins with {one.prefix!r}, the prefix of {one.name!r},"
                " who would see these policies too; end prefixes with a separator, such as 'vision-'"
            )
