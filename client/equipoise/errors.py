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
├── QuotaError                            the tenant may store no more policies or examples
├── UnsupportedError                      the server does not know this call
├── UnavailableError (ConnectionError)    worth a retry; says for which address
│   ├── DeadlineError (TimeoutError)      no answer in time
│   ├── OverloadedError                   the server has no room now
│   ├── DrainingError                     the server is going away
│   └── OwnershipError                    another server owns the policy (now)
├── SequenceGapError                      the server expected another sequence
├── ServerBugError                        INTERNAL or UNKNOWN; carries the server's error id
├── WindowFullError                       too many steps are waiting (`when_lost="wait"` alone)
└── ClientClosedError (RuntimeError)
"""

import re
from collections.abc import Mapping
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

STATUS_KEY = "grpc-status-details-bin"
"""Trailing metadata key that carries a serialised google.rpc.Status."""


class EquipoiseError(Exception):
    """Base of every error of this package.

    Attributes:
        reason: the server's UPPER_SNAKE reason; empty where the client itself raised.
        metadata: further details by name, as the server gave them.
        retry_after: seconds the server asks to wait before a retry; None: not given.
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
    """The caller's input breaks a rule.

    Attributes:
        field: the argument, such as `contributions`; empty where no single one is at fault.
        index: first bad position in it; None: the whole.
        value: the bad value as text.
        rule: the rule it breaks.
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
        text = message or (f"{place} = {value}: {rule}" if str(value) else f"{place}: {rule}")
        super().__init__(text, reason=reason, metadata=metadata, retry_after=retry_after)
        self.field = field
        self.index = index
        self.value = str(value)
        self.rule = rule


class StepRefusedError(InvalidRequestError):
    """The server refused a step: a bug of the caller, raised in both modes. The stream goes on.

    Attributes:
        sequence: sequence of the refused step; 0: a read.
    """

    sequence: int = 0


class PolicyNotFoundError(EquipoiseError, LookupError):
    """No policy has this name."""


class PolicyDeletedError(PolicyNotFoundError):
    """The policy was deleted."""


class PolicyExistsError(EquipoiseError):
    """A policy of this name exists and differs; the message names the first field that does."""


class PolicyChangedError(EquipoiseError):
    """The name belongs to another incarnation of the policy (another uid) now."""


class StateLostError(EquipoiseError):
    """What the server holds does not go together with what this trainer has seen."""


class TrainerReplacedError(EquipoiseError):
    """Another client opened the same trainer_id; two processes must not share one."""


class AccessDeniedError(EquipoiseError, PermissionError):
    """Credentials are missing, wrong, or do not allow this."""


class QuotaError(EquipoiseError):
    """The tenant may store no more policies or examples; the message names the quota."""


class UnsupportedError(EquipoiseError):
    """The server does not know this call."""


class UnavailableError(EquipoiseError, ConnectionError):
    """The server cannot be reached or cannot answer now; a retry may succeed."""


class DeadlineError(UnavailableError, TimeoutError):
    """No answer in time; whether the request had an effect is not known."""


class OverloadedError(UnavailableError):
    """The server has no room for this now."""


class DrainingError(UnavailableError):
    """The server is going away."""


class OwnershipError(UnavailableError):
    """Another server owns the policy; `metadata` may hold its address."""


class SequenceGapError(EquipoiseError):
    """The server expected another sequence."""


class ServerBugError(EquipoiseError):
    """A bug in the server; the message holds the id under which its log has the cause."""


class WindowFullError(EquipoiseError):
    """As many steps as the window holds are waiting for their answers."""


class ClientClosedError(EquipoiseError, RuntimeError):
    """The client was closed."""


_BY_REASON: Mapping[str, type[EquipoiseError]] = {
    "DRAINING": DrainingError,
    "FENCED": OwnershipError,
    "NOT_OWNER": OwnershipError,
    "POLICY_DELETED": PolicyDeletedError,
    "QUOTA_EXAMPLES": QuotaError,
    "QUOTA_POLICIES": QuotaError,
    "SEQUENCE_GAP": SequenceGapError,
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
    """The typed error for a failed RPC, sync or asyncio; its message names the server's address."""
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
    """The typed error for a step that was answered REFUSED."""
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
