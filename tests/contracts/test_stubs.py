"""The committed stubs say what the contract says."""

import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.rpc import status_pb2

from equipoise.v1 import policy_pb2
from equipoise.v1.policy_pb2_grpc import PolicyServiceServicer

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / ".venv-proto" / "bin" / "python"


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> descriptor_pb2.FileDescriptorProto:
    """The contract as a compiler reads it today."""
    if not GENERATOR.exists():
        pytest.skip("the stub generator is not installed: make setup")
    image = tmp_path_factory.mktemp("contract") / "contract.binpb"
    includes = Path(status_pb2.__file__).parents[2]  # googleapis-common-protos brings the .proto files too
    subprocess.run(
        [
            *(GENERATOR, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"-I{includes}"),
            *(f"--descriptor_set_out={image}", "equipoise/v1/policy.proto"),
        ],
        check=True,
    )
    [file] = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file
    return file


def test_the_stubs_are_those_of_the_contract(contract: descriptor_pb2.FileDescriptorProto) -> None:
    committed = descriptor_pb2.FileDescriptorProto.FromString(policy_pb2.DESCRIPTOR.serialized_pb)
    for file in (contract, committed):
        _drop_json_names(file)
    assert committed == contract


def test_every_rpc_is_served_by_the_generated_servicer() -> None:
    service = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"]
    assert {method.name for method in service.methods} <= set(vars(PolicyServiceServicer))


def _drop_json_names(file: descriptor_pb2.FileDescriptorProto) -> None:
    """Compilers differ in whether they write them; they follow from the names."""
    messages = list(file.message_type)
    while messages:
        message = messages.pop()
        messages += message.nested_type
        for field in message.field:
            field.ClearField("json_name")
