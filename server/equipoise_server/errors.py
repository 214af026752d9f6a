"""Errors of the service: each knows its canonical code, its reason and what to tell the caller."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

MAX_VIOLATIONS = 5
MAX_TEXT = 600
"""Bytes of a message, of a violation and of a fact in the metadata; of longer ones the middle is left out.

Whatever a caller sends, he gets an answer that fits the 8 KiB that peers accept of a status."""


class Code(Enum):
    """Canonical gRPC codes that the service uses, with their numbers."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field: its path in the request, and what is wrong with which value under which rule."""

    field: str
    description: str


class ServiceError(Exception):
    """An answer to a caller who cannot be served.

    Attributes:
        code: canonical code.
        reason: UPPER_SNAKE word that programs match on (google.rpc.ErrorInfo).
        violations: bad fields, most important first (google.rpc.BadRequest).
        metadata: facts for programs, such as the expected sequence (ErrorInfo.metadata).
        retry_after_s: when to try again, seconds (google.rpc.RetryInfo); None: no use.
    """

    def __init__(
        self,
        code: Code,
        reason: str,
        message: str,
        *,
        violations: tuple[Violation, ...] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(shortened(message))
        self.code = code
        self.reason = reason
        self.violations = tuple(
            Violation(shortened(each.field), shortened(each.description)) for each in violations[:MAX_VIOLATIONS]
        )
        self.metadata = {key: shortened(value) for key, value in (metadata or {}).items()}
        self.retry_after_s = retry_after_s

    def bare(self) -> "ServiceError":
        """Itself, without the frames that it came through: they hold the request, until its caller has his answer."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)

    def again(self) -> "ServiceError":
        """The same error for another caller: one that is raised often would keep the frames of all who got it."""
        return ServiceError(
            self.code,
            self.reason,
            str(self),
            violations=self.violations,
            metadata=self.metadata,
            retry_after_s=self.retry_after_s,
        )


def shortened(text: str) -> str:
    """The text, or its beginning and end with a mark between them: values come first in our messages, rules last."""
    if len(text) <= MAX_TEXT and len(text.encode(errors="replace")) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    start = text[:half].encode(errors="replace")[:half].decode(errors="ignore")
    end = text[-half:].encode(errors="replace")[-half:].decode(errors="ignore")
    return f"{start} … {len(text) - len(start) - len(end)} characters … {end}"


def quoted(text: str) -> str:
    """Somebody's own text as it is shown to him; whatever it is, showing it takes no time and no memory."""
    return repr(shortened(text))


def invalid(reason: str, field: str, description: str) -> ServiceError:
    """INVALID_ARGUMENT for one field; `description` names the value and the rule."""
    violation = Violation(field, description)
    return ServiceError(Code.INVALID_ARGUMENT, reason, f"{field}: {description}", violations=(violation,))


def policy_not_found(name: str) -> ServiceError:
    """NOT_FOUND: no policy of this name."""
    return ServiceError(Code.NOT_FOUND, "POLICY_NOT_FOUND", f"policy {name!r} does not exist; create it first")


def policy_deleted(name: str) -> ServiceError:
    """NOT_FOUND: the policy was deleted while in use."""
    return ServiceError(Code.NOT_FOUND, "POLICY_DELETED", f"policy {name!r} was deleted")


def policy_exists(name: str, field: str, stored: object, asked: object) -> ServiceError:
    """ALREADY_EXISTS: the stored policy differs in a field."""
    description = f"the existing policy {name!r} has {stored!r}, this request asks for {asked!r}"
    violation = Violation(field, description)
    return ServiceError(
        Code.ALREADY_EXISTS, "POLICY_EXISTS", f"{field}: {description}; use another name", violations=(violation,)
    )


def uid_mismatch(name: str, stored: str, asked: str) -> ServiceError:
    """FAILED_PRECONDITION: the policy was deleted and created again since the caller knew it."""
    message = f"policy {name!r} is now incarnation {stored}, not {asked}: it was created again since"
    return ServiceError(Code.FAILED_PRECONDITION, "UID_MISMATCH", message, metadata={"uid": stored})


def fenced(name: str) -> ServiceError:
    """ABORTED: another server took the policy over."""
    message = f"policy {name!r} is owned by another server now; reconnect"
    return ServiceError(Code.ABORTED, "FENCED", message, retry_after_s=0.1)


def not_owner(name: str, address: str) -> ServiceError:
    """FAILED_PRECONDITION: another server owns the policy; the metadata tell where."""
    message = f"policy {name!r} belongs to the server at {address}"
    return ServiceError(Code.FAILED_PRECONDITION, "NOT_OWNER", message, metadata={"owner": address})


def moving(name: str) -> ServiceError:
    """UNAVAILABLE: the policy is being handed to a server that has fewer."""
    message = f"policy {name!r} is moving to another server; the next call finds it there"
    return ServiceError(Code.UNAVAILABLE, "MOVING", message, retry_after_s=0.1)


def unloaded(name: str) -> ServiceError:
    """UNAVAILABLE: the policy left memory because nobody used it; the next call brings it back."""
    message = f"policy {name!r} was idle and left memory; the next call brings it back"
    return ServiceError(Code.UNAVAILABLE, "UNLOADED", message, retry_after_s=0.0)


def sequence_gap(sequence: int, expected: int) -> ServiceError:
    """OUT_OF_RANGE: steps of this trainer are missing."""
    message = f"sequence {sequence} leaves a gap: this trainer's next step is {expected}"
    return ServiceError(
        Code.OUT_OF_RANGE,
        "SEQUENCE_GAP",
        message,
        violations=(Violation("sequence", message),),
        metadata={"expected_sequence": str(expected)},
    )


def too_many_trainers(known: int, idle_s: float) -> ServiceError:
    """RESOURCE_EXHAUSTED: the policy knows as many trainers as it may."""
    message = (
        f"{known} trainers of this policy are known, the server's limit max_trainers; one is forgotten after"
        f" {idle_s:g} s of silence: keep the id of a trainer that starts again"
    )
    return ServiceError(Code.RESOURCE_EXHAUSTED, "TOO_MANY_TRAINERS", message)


def store_down(detail: str) -> ServiceError:
    """UNAVAILABLE: Redis cannot be reached for something that needs it."""
    return ServiceError(Code.UNAVAILABLE, "STATE_STORE_DOWN", f"the state store failed: {detail}", retry_after_s=1.0)


def state_damaged(detail: str) -> ServiceError:
    """DATA_LOSS: what the store holds of a policy is not what was written."""
    return ServiceError(Code.DATA_LOSS, "STATE_DAMAGED", f"{detail}; `equipoise repair` shows what can be saved")


def too_new(detail: str, *, found: int, readable: int) -> ServiceError:
    """UNAVAILABLE: a newer release has stored the policy; a server of that release can serve it."""
    message = f"{detail}; run that release, or restore a backup of before (deploy/operations.md)"
    return ServiceError(
        Code.UNAVAILABLE,
        "POLICY_TOO_NEW",
        message,
        metadata={"format": str(found), "readable": str(readable)},
        retry_after_s=5.0,
    )


def device_full(name: str, *, needed: int, free: int, device: str) -> ServiceError:
    """RESOURCE_EXHAUSTED: the policy's tables do not fit the memory that is free."""
    message = f"policy {name!r} needs {needed} bytes of {device} memory, of which {free} are free"
    return ServiceError(Code.RESOURCE_EXHAUSTED, "DEVICE_FULL", message, retry_after_s=10.0)


def device_lost(detail: str) -> ServiceError:
    """UNAVAILABLE: the device that holds the tables failed; policies come back from the store, there or elsewhere."""
    return ServiceError(Code.UNAVAILABLE, "DEVICE_LOST", f"the device failed: {detail}", retry_after_s=1.0)


def loading(name: str, *, replayed: int, entries: int) -> ServiceError:
    """UNAVAILABLE: the policy is on its way into memory."""
    message = f"policy {name!r} is being loaded: {replayed} of {entries} log entries are replayed; try again"
    metadata = {"replayed": str(replayed), "entries": str(entries)}
    return ServiceError(Code.UNAVAILABLE, "LOADING", message, metadata=metadata, retry_after_s=0.5)


def internal(error_id: str) -> ServiceError:
    """INTERNAL: a bug; what happened is in the server's log under the id."""
    message = f"internal error {error_id}; please report it with the server's log"
    return ServiceError(Code.INTERNAL, "BUG", message, metadata={"error_id": error_id})


def draining() -> ServiceError:
    """UNAVAILABLE: the server is about to stop."""
    return ServiceError(Code.UNAVAILABLE, "DRAINING", "this server is stopping; reconnect", retry_after_s=0.5)
