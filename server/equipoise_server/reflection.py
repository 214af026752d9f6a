"""Server reflection, v1 and v1alpha: the server describes its services to tools that have no stubs."""

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

OLD, NEW = "grpc.reflection.v1alpha", "grpc.reflection.v1"
FILE = "grpc/reflection/v1/reflection.proto"
METHOD = "ServerReflectionInfo"
SERVICE_NAMES = (f"{NEW}.ServerReflection", reflection.SERVICE_NAME)


def add_reflection(service_names: Iterable[str], server: grpc.aio.Server) -> None:
    """Serves reflection of these services, and of itself, under both names.

    grpcio-reflection brings v1alpha alone. v1 is the same protocol: the messages are equal but for the name of their
    package, which is not on the wire, so one servicer answers both.
    """
    _describe_v1()
    servicer: Any = reflection.aio.ReflectionServicer((*service_names, *SERVICE_NAMES))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, {METHOD: handler}) for name in SERVICE_NAMES)
    )


def _describe_v1() -> None:
    """Puts v1 into the pool, so that a tool that asks for its descriptors finds them; again: no effect."""
    file = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    file.name, file.package = FILE, NEW
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(f".{OLD}.", f".{NEW}.")
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{OLD}.", f".{NEW}.")
            method.output_type = method.output_type.replace(f".{OLD}.", f".{NEW}.")
    pool: Any = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
