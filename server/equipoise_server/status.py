"""Errors as google.rpc.Status."""

import math

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from equipoise_server.errors import ServiceError

DOMAIN = "equipoise"


def to_status(error: ServiceError) -> status_pb2.Status:
    """The error with its ErrorInfo, and BadRequest and RetryInfo where they apply."""
    status = status_pb2.Status(code=error.code.value, message=str(error))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if error.violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)
            for violation in error.violations
        ]
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=fields))
    if error.retry_after_s is not None:
        nanos, seconds = math.modf(error.retry_after_s)
        delay = Duration(seconds=int(seconds), nanos=int(nanos * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def grpc_code(error: ServiceError) -> grpc.StatusCode:
    """The error's code as grpc names it."""
    return grpc.StatusCode[error.code.name]


def trailing_metadata(error: ServiceError) -> tuple[tuple[str, bytes | str], ...]:
    """Metadata that carries the details behind a status.

    Whoever learns that a policy is being loaded has waited for it until shortly before his deadline: gRPC's own
    retries, which its pushback ends, would only turn the answer into DEADLINE_EXCEEDED.
    """
    details = ("grpc-status-details-bin", to_status(error).SerializeToString())
    return (details, ("grpc-retry-pushback-ms", "-1")) if error.reason == "LOADING" else (details,)
