"""Nothing needs Python stubs: a step is sent with descriptors that the server itself gives."""

from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.servers import ServerProcess

SERVICE = "equipoise.v1.PolicyService"


class Renamed:
    """A channel to whose methods other packages are given: the database knows v1alpha alone."""

    def __init__(self, channel: grpc.Channel, package: str) -> None:
        self._channel = channel
        self._package = package

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._channel.stream_stream(method.replace("v1alpha", self._package), *arguments, **options)


@pytest.mark.parametrize("package", ["v1", "v1alpha"])
def test_a_step_by_reflection_alone(server: ServerProcess, package: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(Renamed(channel, package))
        reflections = {f"grpc.reflection.{name}.ServerReflection" for name in ("v1", "v1alpha")}
        assert set(database.get_services()) == {SERVICE, "grpc.health.v1.Health", *reflections}
        own = database.FindFileContainingSymbol(f"grpc.reflection.{package}.ServerReflection")
        assert own.package == f"grpc.reflection.{package}"
        assert own.service[0].method[0].input_type == f".grpc.reflection.{package}.ServerReflectionRequest"
        pool = descriptor_pool.DescriptorPool(database)  # a pool of its own: the generated stubs are not in it
        methods = pool.FindServiceByName(SERVICE).methods_by_name

        def call(name: str, **fields: object) -> object:
            method = methods[name]
            request = message_factory.GetMessageClass(method.input_type)(**fields)
            answer = message_factory.GetMessageClass(method.output_type)
            send = channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=answer.FromString,
            )
            return send(request, timeout=30)

        call("CreatePolicy", policy={"name": f"by-reflection-{package}", "num_examples": 4})
        step = {
            "example_ids": np.arange(4, dtype="<u8").tobytes(),
            "contributions": np.array([1, 1, -1, -1], "<f4").tobytes(),
        }
        answer = call("UpdateWeights", policy=f"by-reflection-{package}", step=step)
        weights = np.frombuffer(answer.step.weights, "<f4")  # type: ignore[attr-defined]
    np.testing.assert_allclose(weights, np.array([2, 2, 0.02, 0.02]) / 1.01, rtol=1e-6)


@pytest.mark.parametrize("package", ["v1", "v1alpha"])
def test_what_is_no_question_is_refused(server: ServerProcess, package: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(f"/grpc.reflection.{package}.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as caught:
            next(call(iter([b"\xff\xff"]), timeout=60))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
