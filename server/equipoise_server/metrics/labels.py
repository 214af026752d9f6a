"""Which policies have series of their own: their number is capped, as Prometheus pays for each.

The places are shared among tenants: one with many policies leaves those of others theirs.
"""

import threading
from collections.abc import Callable, Iterable, Iterator

from equipoise_server.metrics.names import OTHER


class PolicyLabels:
    """Decides which policies get a label of their own. Thread-safe.

    Whoever comes while there is room gets one, until he vanishes; at each scrape the places are shared among tenants.

    Args:
        limit: places.
        tenant_of: whose a policy is.
    """

    def __init__(self, limit: int, *, tenant_of: Callable[[str], str] = lambda policy: "") -> None:
        self._limit = limit
        self._tenant_of = tenant_of
        self._shown: dict[str, None] = {}  # in the order of their coming
        self._lock = threading.Lock()

    def label(self, policy: str) -> str:
        """The policy's name, or `other` beyond the limit."""
        if policy in self._shown:
            return policy
        with self._lock:
            if len(self._shown) < self._limit and policy != OTHER:
                self._shown[policy] = None
                return policy
        return OTHER

    def shown(self) -> frozenset[str]:
        """Policies with a label of their own."""
        with self._lock:
            return frozenset(self._shown)

    def share(self, policies: Iterable[str], *, resting: Iterable[str] = (), known: frozenset[str]) -> frozenset[str]:
        """Takes labels from the policies that vanished, and from those of tenants that have more than their share.

        Args:
            policies: those in memory.
            resting: those that left it because nobody used them: they get what the others leave.
            known: `shown` before these were looked up: one that came since is there, too.

        Returns:
            Policies that have a label no more.
        """
        here = dict.fromkeys(policy for policy in policies if policy != OTHER)
        idle = dict.fromkeys(policy for policy in resting if policy != OTHER and policy not in here)
        with self._lock:
            before = frozenset(self._shown)
            used = [each for each in self._shown if each in here or (each not in known and each not in idle)]
            chosen = dict.fromkeys(self._chosen(dict.fromkeys(used) | here, self._limit))
            known_idle = dict.fromkeys(each for each in self._shown if each in idle)
            chosen |= dict.fromkeys(self._chosen(known_idle | idle, self._limit - len(chosen)))
            self._shown = chosen
            return before.difference(chosen)

    def _chosen(self, policies: Iterable[str], limit: int) -> Iterator[str]:
        """Max-min fair: no tenant has less so that another may have more than it. Those that come first stay first."""
        by_tenant: dict[str, list[str]] = {}
        for policy in policies:
            by_tenant.setdefault(self._tenant_of(policy), []).append(policy)
        shown = {tenant: sum(each in self._shown for each in wanting) for tenant, wanting in by_tenant.items()}
        # From the least wish to the greatest; of equal ones, those that have something keep it.
        order = sorted(by_tenant, key=lambda tenant: (len(by_tenant[tenant]), shown[tenant], tenant))
        left = limit
        for place, tenant in enumerate(order):
            some = by_tenant[tenant][: left // (len(order) - place)]
            left -= len(some)
            yield from some
