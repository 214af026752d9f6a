"""The committed stubs say what the contract says."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2, status_pb2

from equipoise.v1 import policy_pb2
from equipoise.v1.policy_pb2_grpc import PolicyServiceServicer

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / ".venv-proto" / "bin" / "python"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The contract and the details of errors as a compiler reads them today, with nothing but the folder `proto`."""
    if not GENERATOR.exists():
        pytest.skip("the stub generator is not installed: make setup")
    image = tmp_path_factory.mktemp("contract") / "contract.binpb"
    subprocess.run(
        [
            *(GENERATOR, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", "--include_imports"),
            *(f"--descriptor_set_out={image}", "equipoise/v1/policy.proto", "google/rpc/error_details.proto"),
        ],
        check=True,
    )
    return {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file}


def test_the_stubs_are_those_of_the_contract(files: dict[str, descriptor_pb2.FileDescriptorProto]) -> None:
    contract = files["equipoise/v1/policy.proto"]
    committed = descriptor_pb2.FileDescriptorProto.FromString(policy_pb2.DESCRIPTOR.serialized_pb)
    for file in (contract, committed):
        _drop_json_names(file)
    assert committed == contract


@pytest.mark.parametrize("module", [status_pb2, error_details_pb2], ids=["status", "error_details"])
def test_the_protos_of_google_beside_the_contract_are_googles(
    files: dict[str, descriptor_pb2.FileDescriptorProto], module: Any
) -> None:
    ours = files[module.DESCRIPTOR.name]
    theirs = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
    for file in (ours, theirs):
        _drop_json_names(file)
    assert ours.message_type == theirs.message_type


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
