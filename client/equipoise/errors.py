"""Errors of the client, and the only mapping from gRPC's to ours.

EquipoiseError
├── InvalidRequestError (ValueError)      the caller's input: field, index, value, rule
│   └── StepRefusedError                  the server refused a step; it consumed its sequence and changed nothing
├── PolicyNotFoundError (LookupError)
│   └── PolicyDeletedError
├── PolicyExistsError                     same name, different fields
├── PolicyChangedError                    another incarnation of the policy has taken the name
├── StateLostError                        the server's state is older or newer than what it had acknowledged to us
├── TrainerReplacedError                  another client opened the same trainer_id
├── AccessDeniedError (PermissionError)
├── QuotaError                            no more policies, examples or trainers may be stored
├── UnsupportedError                      the server does not know this call
├── UnavailableError (ConnectionError)    worth a retry; says for which address
│   ├── DeadlineError (TimeoutError)      no answer in time
│   ├── OverloadedError                   the server has no room now
│   ├── DrainingError                     the server is going away
│   └── OwnershipError                    another server owns the policy (now)
├── SequenceGapError                      the server expected another sequence
├── ServerBugError                        INTERNAL or UNKNOWN; carries the server's error id
├── WindowFullError                       too many steps are waiting (`when_lost="wait"` alone)
├── EventLoopError (RuntimeError)         an asyncio client in another event loop than before
├── ForkError (RuntimeError)              in a process forked from one that was connected
└── ClientClosedError (RuntimeError)
"""

import operator
import re
from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

MAX_VALUE = 200
"""Characters of a value that a message repeats."""

STATUS_KEY = "grpc-status-details-bin"
"""Trailing metadata key that carries a serialised google.rpc.Status."""


class EquipoiseError(Exception):
    """Base class of every error that this package raises.

    Attributes:
        reason: the server's reason in upper snake case, such as `POLICY_NOT_FOUND`; empty if the client raised it.
        metadata: details that the server gave, by name.
        retry_after: seconds that the server asks to wait before a retry; None if it did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


class InvalidRequestError(EquipoiseError, ValueError):
    """An argument breaks a rule. Nothing was sent, or the server refused it as a whole.

    Attributes:
        field: name of the argument, such as `contributions`; empty where no single one is at fault.
        index: position of the first bad value in it; None if it is not about one value.
        value: the bad value as text, shortened.
        rule: the rule that it breaks.
    """

    def __init__(
        self,
        message: str = "",
        *,
        field: str = "",
        index: int | None = None,
        value: object = "",
        rule: str = "",
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        place = field if index is None else f"{field}[{index}]"
        value = _shortened(str(value))
        text = message or (f"{place} = {value}: {rule}" if value else f"{place}: {rule}")
        super().__init__(text, reason=reason, metadata=metadata, retry_after=retry_after)
        self.field = field
        self.index = index
        self.value = value
        self.rule = rule


def require(holds: bool, *, field: str, value: object, rule: str) -> None:
    """Raises InvalidRequestError, which names field, value and rule, unless the rule holds."""
    if not holds:
        raise InvalidRequestError(field=field, value=repr(value), rule=rule)


def is_integer(value: object, low: int, end: int) -> bool:
    """Whether a value is an integer in [low, end), be it Python's or NumPy's; a bool is none."""
    try:
        return not isinstance(value, bool) and low <= operator.index(value) < end  # type: ignore[arg-type]  # what is none raises
    except TypeError:
        return False


class StepRefusedError(InvalidRequestError):
    """The server refused a step. It changed nothing, and later steps are not affected.

    This is a bug of the caller, so it is raised with `when_lost="continue"` too. For a submitted step it is raised by
    the next call.

    Attributes:
        sequence: number of the refused step, from 1; 0: it was a read.
    """

    sequence: int = 0


class PolicyNotFoundError(EquipoiseError, LookupError):
    """There is no policy of this name."""


class PolicyDeletedError(PolicyNotFoundError):
    """The policy was deleted while it was in use."""


class PolicyExistsError(EquipoiseError):
    """A policy of this name exists and differs. The message names the first field that does."""


class PolicyChangedError(EquipoiseError):
    """The policy was deleted and made anew: the name now belongs to a policy with another uid."""


class StateLostError(EquipoiseError):
    """The server has lost steps that it had acknowledged, or holds steps that this trainer does not know."""


class EventLoopError(EquipoiseError, RuntimeError):
    """A client for asyncio was used in another event loop than before. Make a client for each loop."""


class ForkError(EquipoiseError, RuntimeError):
    """This process was forked from one that was connected to a server. gRPC does not work in such a process."""

    def __init__(self) -> None:
        super().__init__(
            "this process was forked from one that was connected to a server, and gRPC does not work in it: use clients"
            " in the main process alone, or start this one with multiprocessing's 'spawn' or 'forkserver' method, or"
            " before the main process makes its first call"
        )


class TrainerReplacedError(EquipoiseError):
    """Another client connected with the same `trainer_id`. Give each process an id of its own."""


class AccessDeniedError(EquipoiseError, PermissionError):
    """The credentials are missing or wrong, or they do not allow this call."""


class QuotaError(EquipoiseError):
    """There is no room for more policies, examples or trainers. The message names the quota."""


class UnsupportedError(EquipoiseError):
    """The server does not know this call: it is older than this client, or no Equipoise server."""


class UnavailableError(EquipoiseError, ConnectionError):
    """The server cannot be reached, or cannot answer now. A retry may succeed."""


class DeadlineError(UnavailableError, TimeoutError):
    """There was no answer in time. The request may have had its effect, or may still have it."""


class OverloadedError(UnavailableError):
    """The server has no room for this request now. `retry_after` may say when to try again."""


class DrainingError(UnavailableError):
    """The server is shutting down. Another server, or the same one after a restart, will answer."""


OWNER = "owner"
"""Name of the owner's address in the metadata of an `OwnershipError`."""


class OwnershipError(UnavailableError):
    """Another server owns the policy. `metadata["owner"]` holds its address, if it is known."""


class SequenceGapError(EquipoiseError):
    """A step is missing: the server expected another sequence number. The client repairs this by itself."""


class ServerBugError(EquipoiseError):
    """A bug in the server. The message holds the id under which the server's log has the cause."""


class WindowFullError(EquipoiseError):
    """There is no room for another step: `limits` many wait for their answers. Raised with `when_lost="wait"`."""


class ClientClosedError(EquipoiseError, RuntimeError):
    """The client was used after `close`, or closed while a call was under way."""

    def __init__(self, message: str = "the client was closed") -> None:
        super().__init__(message)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE // 2]} … {text[-MAX_VALUE // 2 :]}"


_BY_REASON: Mapping[str, type[EquipoiseError]] = {
    "DRAINING": DrainingError,
    "FENCED": OwnershipError,
    "NOT_OWNER": OwnershipError,
    "POLICY_DELETED": PolicyDeletedError,
    "QUOTA_EXAMPLES": QuotaError,
    "QUOTA_POLICIES": QuotaError,
    "SEQUENCE_GAP": SequenceGapError,
    "TOO_MANY_TRAINERS": QuotaError,
    "TRAINER_REPLACED": TrainerReplacedError,
    "UID_MISMATCH": PolicyChangedError,
}

_BY_CODE: Mapping[grpc.StatusCode, type[EquipoiseError]] = {
    grpc.StatusCode.ABORTED: UnavailableError,
    grpc.StatusCode.ALREADY_EXISTS: PolicyExistsError,
    # A peer that cancels (a proxy or server going down) looks like this; our own cancellation never gets here.
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.DATA_LOSS: StateLostError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.FAILED_PRECONDITION: PolicyChangedError,
    grpc.StatusCode.INTERNAL: ServerBugError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: PolicyNotFoundError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAUTHENTICATED: AccessDeniedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.UNKNOWN: ServerBugError,
}

_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc(failure: grpc.RpcError, *, address: str) -> EquipoiseError:
    """Returns the error of this module for a failed call, sync or asyncio. Its message names the server's address."""
    trailing: Any = failure.trailing_metadata()  # pairs, which their stubs do not know
    for key, value in trailing or ():
        if key == STATUS_KEY and isinstance(value, bytes):
            status = status_pb2.Status.FromString(value)
            break
    else:
        status = status_pb2.Status(message=failure.details() or "")
    code = failure.code()
    status.message = f"{address}: {status.message or code.name}"
    return _typed(code, status)


def from_status(status: status_pb2.Status, *, sequence: int) -> StepRefusedError:
    """Returns the error of this module for a step that the server answered with REFUSED."""
    error = _typed(_CODES.get(status.code, grpc.StatusCode.UNKNOWN), status, kind=StepRefusedError)
    assert isinstance(error, StepRefusedError)
    error.sequence = sequence
    return error


def _typed(
    code: grpc.StatusCode, status: status_pb2.Status, *, kind: type[EquipoiseError] | None = None
) -> EquipoiseError:
    info, request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message in (info, request, retry):
            detail.Unpack(message)  # does nothing unless the types match
    metadata = dict(info.metadata)
    retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 or None
    kind = kind or _BY_REASON.get(info.reason) or _BY_CODE.get(code, ServerBugError)
    if not issubclass(kind, InvalidRequestError):
        return kind(status.message, reason=info.reason, metadata=metadata, retry_after=retry_after)
    violation = (
        request.field_violations[0] if request.field_violations else error_details_pb2.BadRequest.FieldViolation()
    )
    field, index = _place(violation.field or metadata.get("field", ""), metadata.get("index", ""))
    return kind(
        status.message,
        field=field,
        index=index,
        value=metadata.get("value", ""),
        rule=metadata.get("rule") or violation.description,
        reason=info.reason,
        metadata=metadata,
        retry_after=retry_after,
    )


def _place(field: str, index: str) -> tuple[str, int | None]:
    """Field and index from `contributions` and `17`, or from `contributions[17]`."""
    match = re.fullmatch(r"(.+)\[(\d+)\]", field)
    if match:
        return match[1], int(match[2])
    return field, int(index) if index.isdigit() else None
