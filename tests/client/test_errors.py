"""Every code and reason becomes one typed error that keeps the server's details, over a real socket."""

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from equipoise import PolicyAdmin, errors
from tests.client.scripted_server import ScriptedServer, packed, status_of

BY_CODE = {
    grpc.StatusCode.ABORTED: errors.UnavailableError,
    grpc.StatusCode.ALREADY_EXISTS: errors.PolicyExistsError,
    grpc.StatusCode.CANCELLED: errors.UnavailableError,
    grpc.StatusCode.DATA_LOSS: errors.StateLostError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.PolicyChangedError,
    grpc.StatusCode.INTERNAL: errors.ServerBugError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: errors.PolicyNotFoundError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AccessDeniedError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
    grpc.StatusCode.UNKNOWN: errors.ServerBugError,
}
BY_REASON = {
    "DRAINING": (grpc.StatusCode.UNAVAILABLE, errors.DrainingError),
    "FENCED": (grpc.StatusCode.ABORTED, errors.OwnershipError),
    "NOT_OWNER": (grpc.StatusCode.FAILED_PRECONDITION, errors.OwnershipError),
    "POLICY_DELETED": (grpc.StatusCode.NOT_FOUND, errors.PolicyDeletedError),
    "SEQUENCE_GAP": (grpc.StatusCode.OUT_OF_RANGE, errors.SequenceGapError),
    "TRAINER_REPLACED": (grpc.StatusCode.ABORTED, errors.TrainerReplacedError),
    "UID_MISMATCH": (grpc.StatusCode.FAILED_PRECONDITION, errors.PolicyChangedError),
}


def failure(server: ScriptedServer, code: grpc.StatusCode, status: status_pb2.Status) -> errors.EquipoiseError:
    server.service.fail_with = (code, status)
    with PolicyAdmin(server.address) as admin, pytest.raises(errors.EquipoiseError) as caught:
        admin.get("a")
    return caught.value


def test_every_code_has_an_error() -> None:
    assert set(BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("code", BY_CODE)
def test_a_code_becomes_its_error(server: ScriptedServer, code: grpc.StatusCode) -> None:
    error = failure(server, code, status_of(code, "SOME_REASON", owner="b:1"))
    assert type(error) is BY_CODE[code]
    assert (error.reason, error.metadata) == ("SOME_REASON", {"owner": "b:1"})
    assert str(error) == f"{server.address}: some_reason"


@pytest.mark.parametrize("reason", BY_REASON)
def test_a_reason_says_more_than_its_code(server: ScriptedServer, reason: str) -> None:
    code, kind = BY_REASON[reason]
    assert type(failure(server, code, status_of(code, reason))) is kind


def test_details_name_field_index_and_rule(server: ScriptedServer) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="losses[17]", description="must be finite")
    request = error_details_pb2.BadRequest(field_violations=[violation])
    status = status_pb2.Status(code=3, message="losses[17] = nan: must be finite", details=[packed(request)])
    error = failure(server, grpc.StatusCode.INVALID_ARGUMENT, status)
    assert isinstance(error, errors.InvalidRequestError)
    assert (error.field, error.index, error.rule) == ("losses", 17, "must be finite")


def test_a_server_can_say_when_to_retry(server: ScriptedServer) -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000))
    status = status_pb2.Status(code=8, message="full", details=[packed(retry)])
    assert failure(server, grpc.StatusCode.RESOURCE_EXHAUSTED, status).retry_after == 1.5


def test_a_server_that_is_not_there_is_named() -> None:
    with (
        PolicyAdmin("127.0.0.1:1", timeout=5.0) as admin,
        pytest.raises(errors.UnavailableError, match=r"127\.0\.0\.1:1"),
    ):
        admin.get("a")


def test_errors_are_also_what_python_calls_them() -> None:
    pairs = [
        (errors.InvalidRequestError, ValueError),
        (errors.PolicyNotFoundError, LookupError),
        (errors.UnavailableError, ConnectionError),
        (errors.DeadlineError, TimeoutError),
        (errors.AccessDeniedError, PermissionError),
    ]
    assert all(issubclass(ours, theirs) for ours, theirs in pairs)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {
        word for line in (errors.__doc__ or "").splitlines() for word in line.split()[:4] if word.endswith("Error")
    }
    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.EquipoiseError)
    }
    assert drawn == kinds
