"""Checks of the server as a whole: what it says of itself, health, reflection, tokens."""

from collections.abc import Iterator
from dataclasses import replace

import grpc
from google.protobuf import descriptor_pb2

from equipoise.channel import Server
from equipoise.conformance.check import InapplicableError, MismatchError, check, expect, failing, refused
from equipoise.conformance.target import Target
from equipoise.v1 import policy_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["PolicyService"]
HEALTH = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
"""A HealthCheckResponse with this status."""

# Fields of ServerReflectionRequest and -Response, the same in v1 and v1alpha.
_ASK_SYMBOL, _ASK_SERVICES = 4, 7
_FILES, _SERVICES = 4, 6


@check("server/info")
def info(target: Target) -> str:
    """GetServerInfo tells api_version v1, limits above 0, and the sorted names of rules."""
    found = target.info
    expect("api_version", found.api_version, "v1")
    for name in ("max_batch_examples", "max_examples", "max_message_bytes"):
        if not getattr(found, name) > 0:
            raise MismatchError(f"{name} is {getattr(found, name)}")
    expect("rules", list(found.rules), sorted(set(found.rules)))
    return f"build {found.build_version}, device {found.device}, {len(found.rules)} rules"


@check("server/unknown method")
def unknown_method(target: Target) -> None:
    """An unknown method is UNIMPLEMENTED."""
    with failing(grpc.StatusCode.UNIMPLEMENTED):
        target.raw(f"/{SERVICE.full_name}/Nothing", b"")


@check("server/malformed message")
def malformed(target: Target) -> None:
    """Bytes that are no valid message: INVALID_ARGUMENT MALFORMED_REQUEST."""
    for method in ("GetPolicy", "Exchange"):
        with refused(code=grpc.StatusCode.INVALID_ARGUMENT, reason="MALFORMED_REQUEST"):
            target.raw(f"/{SERVICE.full_name}/{method}", b"\xff\xff\xff")


@check("server/health")
def health(target: Target) -> None:
    """Health, without a token: SERVING for the server and for the policy service, NOT_FOUND for others."""
    for service in ("", SERVICE.full_name):
        [answer] = target.raw(HEALTH, _field(1, service.encode()) if service else b"", metadata=())
        expect(f"the status of {service!r}", answer, SERVING)
    with failing(grpc.StatusCode.NOT_FOUND):
        target.raw(HEALTH, _field(1, b"nothing"), metadata=())


@check("server/reflection v1")
def reflection(target: Target) -> str:
    """grpc.reflection.v1 lists the services, and describes PolicyService as the contract does."""
    return _reflect(target, "v1")


@check("server/reflection v1alpha")
def reflection_alpha(target: Target) -> str:
    """grpc.reflection.v1alpha does the same."""
    return _reflect(target, "v1alpha")


@check("server/token missing")
def token_missing(target: Target) -> None:
    """A call without a token: UNAUTHENTICATED TOKEN_MISSING."""
    _needs_token(target)
    request = pb.GetServerInfoRequest()
    with refused(code=grpc.StatusCode.UNAUTHENTICATED, reason="TOKEN_MISSING"):
        target.call("GetServerInfo", request, metadata=())


@check("server/token wrong")
def token_wrong(target: Target) -> None:
    """A call with a token that nobody was given: UNAUTHENTICATED TOKEN_INVALID."""
    _needs_token(target)
    security = replace(target.server.security, token="eq_nobody_was_given_this", token_file=None)
    metadata = Server(target.server.address, security).headers()
    with refused(code=grpc.StatusCode.UNAUTHENTICATED, reason="TOKEN_INVALID"):
        target.call("GetServerInfo", pb.GetServerInfoRequest(), metadata=metadata)


def _needs_token(target: Target) -> None:
    if not target.server.security.headers():
        raise InapplicableError("no token was given to this command")


def _reflect(target: Target, version: str) -> str:
    service = f"grpc.reflection.{version}.ServerReflection"
    method = f"/{service}/ServerReflectionInfo"
    asked = (_field(_ASK_SERVICES, b""), _field(_ASK_SYMBOL, SERVICE.full_name.encode()))
    services, described = target.raw(method, *asked)
    names = [name.decode() for one in _in(services, _SERVICES, 1) for name in _values(one, 1)]
    for name in (SERVICE.full_name, "grpc.health.v1.Health", service):
        if name not in names:
            raise MismatchError(f"the services {names} are without {name}")
    files = [descriptor_pb2.FileDescriptorProto.FromString(data) for data in _in(described, _FILES, 1)]
    own = [one for file in files if file.package == "equipoise.v1" for one in file.service]
    expect("services described", [one.name for one in own], [SERVICE.name])
    methods = {m.name: (m.client_streaming, m.server_streaming, m.input_type, m.output_type) for m in own[0].method}
    proto = descriptor_pb2.ServiceDescriptorProto()
    SERVICE.CopyToProto(proto)
    for one in proto.method:
        expected = (one.client_streaming, one.server_streaming, one.input_type, one.output_type)
        expect(f"method {one.name}", methods.get(one.name), expected)
    return f"{len(names)} services, {len(methods)} methods"


# The wire format of fields with bytes (protobuf.dev, "Encoding"): enough for health and reflection, whose stubs the
# client does not bring.


def _field(number: int, value: bytes) -> bytes:
    assert number < 16
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def _in(data: bytes, outer: int, inner: int) -> Iterator[bytes]:
    for value in _values(data, outer):
        yield from _values(value, inner)


def _values(data: bytes, number: int) -> Iterator[bytes]:
    """Values of a field with bytes; other fields are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            if key >> 3 == number:
                yield data[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[kind]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
