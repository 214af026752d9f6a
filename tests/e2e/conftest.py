"""Real servers in processes of their own."""

from collections.abc import Iterator

import grpc
import pytest

from equipoise.v1 import policy_pb2_grpc
from tests.servers import ServerProcess, serve


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A server that the tests of a file share; each uses policies of its own."""
    with serve(metrics_max_policies=1000) as process:
        yield process


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[policy_pb2_grpc.PolicyServiceStub]:
    """The generated stub, without our client."""
    with grpc.insecure_channel(server.address) as channel:
        yield policy_pb2_grpc.PolicyServiceStub(channel)
