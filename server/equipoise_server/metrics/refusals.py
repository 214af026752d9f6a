"""Who was turned away, and why: every refusal is counted once, in the family of its kind, by the ErrorInfo's reason."""

from prometheus_client import CollectorRegistry, Counter

from equipoise_server.metrics.names import PREFIX

ACCESS_REASONS = (
    "POLICY_FORBIDDEN", "SCOPE_MISSING", "TOKEN_EXPIRED", "TOKEN_INVALID", "TOKEN_MISSING", "TOKEN_REVOKED",
)  # fmt: skip
"""It was refused because of who asked: UNAUTHENTICATED and PERMISSION_DENIED."""

VALUE_REASONS = (
    "EMPTY_REQUEST", "ID_OUT_OF_RANGE", "INVALID_CLIENT_ID", "INVALID_FIELD", "INVALID_PAGE_TOKEN",
    "INVALID_POLICY_NAME", "INVALID_SETTING", "INVALID_STATE", "INVALID_TRAINER_ID", "MALFORMED_REQUEST",
    "NON_FINITE_STAT", "OUT_OF_RANGE_VALUE", "POLICY_MISMATCH", "REQUEST_TOO_LARGE", "SEQUENCE_ON_READ",
    "SHAPE_MISMATCH", "TOO_MANY_EXAMPLES", "UNKNOWN_RULE", "UNUSABLE_STATISTICS",
)  # fmt: skip
"""It was refused because of what was asked: INVALID_ARGUMENT."""

STATE_REASONS = (
    "BUG", "DEVICE_FULL", "DEVICE_LOST", "DRAINING", "FENCED", "LOADING", "MOVING", "NOT_OPENED", "NOT_OWNER",
    "NOT_READ", "NO_MESSAGE", "POLICY_DELETED", "POLICY_EXISTS", "POLICY_NOT_FOUND", "POLICY_TOO_NEW", "QUEUE_FULL",
    "QUOTA_CALLS", "QUOTA_EXAMPLES", "QUOTA_POLICIES", "QUOTA_STREAMS", "SEQUENCE_GAP", "STALE_OPENING",
    "STATE_DAMAGED", "STATE_STORE_DOWN", "TOO_MANY_CALLS", "TOO_MANY_IMPORTS", "TOO_MANY_PROBES", "TOO_MANY_READERS",
    "TOO_MANY_STREAMS", "TOO_MANY_TRAINERS", "TRAINER_REPLACED", "UID_MISMATCH", "UNLOADED",
)  # fmt: skip
"""It was refused because of how things stand: every other code."""

UNKNOWN_REASON = "OTHER"
"""Of a reason that is in none of these lists: a bug, but no reason to lose a count."""

LEFT_REASONS = ("BUG", "DEVICE_LOST", "DRAINING", "FENCED", "MOVING", "POLICY_DELETED", "UNLOADED", UNKNOWN_REASON)
"""Why a policy leaves memory."""

LOAD_REASONS = (
    "BUG", "DEVICE_FULL", "DEVICE_LOST", "NOT_OWNER", "POLICY_NOT_FOUND", "POLICY_TOO_NEW", "STATE_DAMAGED",
    "STATE_STORE_DOWN", UNKNOWN_REASON,
)  # fmt: skip
"""Why a policy cannot be brought into memory."""


class ReasonCounter:
    """A counter by reason, every one of which is there from the start. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, name: str, help_text: str, reasons: tuple[str, ...]) -> None:
        family = Counter(PREFIX + name, help_text, ("reason",), registry=registry)
        self._counters = {reason: family.labels(reason) for reason in reasons}

    def __contains__(self, reason: str) -> bool:
        return reason in self._counters

    def count(self, reason: str) -> None:
        """It happened for this reason."""
        self._counters[reason if reason in self._counters else UNKNOWN_REASON].inc()


class Refusals:
    """Counts calls, and steps within streams, that were refused. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._access = ReasonCounter(
            registry, "auth_failures", "Calls refused because of who made them.", ACCESS_REASONS
        )
        self._values = ReasonCounter(
            registry, "rejected_values", "Calls and steps refused because of a value in them.", VALUE_REASONS
        )
        self._state = ReasonCounter(
            registry,
            "refusals",
            "Calls and steps refused because of how things stand; NOT_OWNER: sent to the owner.",
            (*STATE_REASONS, UNKNOWN_REASON),
        )

    def count(self, reason: str) -> None:
        """A call or step was refused for `reason` (the ErrorInfo's)."""
        for family in (self._access, self._values):
            if reason in family:
                family.count(reason)
                return
        self._state.count(reason)
