"""Nothing needs Python stubs: a step is sent with descriptors that the server itself gives."""

import grpc
import numpy as np
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from equipoise.testing import ServerProcess

SERVICE = "equipoise.v1.PolicyService"


def test_a_step_by_reflection_alone(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
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

        call("CreatePolicy", policy={"name": "by-reflection", "num_examples": 4})
        step = {
            "example_ids": np.arange(4, dtype="<u8").tobytes(),
            "contributions": np.array([1, 1, -1, -1], "<f4").tobytes(),
        }
        answer = call("UpdateWeights", policy="by-reflection", step=step)
        weights = np.frombuffer(answer.step.weights, "<f4")  # type: ignore[attr-defined]
    np.testing.assert_allclose(weights, np.array([2, 2, 0.02, 0.02]) / 1.01, rtol=1e-6)
