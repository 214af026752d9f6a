"""Every RPC against everybody who must not make it: the right code, and nothing happens."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2

from equipoise import PolicyAdmin, PolicySpec, Security
from equipoise.channel import Server
from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from equipoise_server.security import ALLOWED, Scope, new_token
from tests.e2e.security.conftest import Guarded

METHODS = tuple(method.name for method in pb.DESCRIPTOR.services_by_name["PolicyService"].methods)
STEP = pb.StepRequest(sequence=1, all_examples=True, target_loss=1.0)

REQUESTS: dict[str, Callable[[str], Any]] = {
    "CreatePolicy": lambda policy: pb.CreatePolicyRequest(policy=pb.PolicySpec(name=policy, num_examples=4)),
    "GetPolicy": lambda policy: pb.GetPolicyRequest(policy=policy),
    "ListPolicies": lambda policy: pb.ListPoliciesRequest(prefix=policy),
    "DeletePolicy": lambda policy: pb.DeletePolicyRequest(policy=policy),
    "Exchange": lambda policy: iter(
        [
            pb.ExchangeRequest(open=pb.OpenRequest(policy=policy, trainer_id="intruder")),
            pb.ExchangeRequest(step=STEP),
        ]
    ),
    "UpdateWeights": lambda policy: pb.UpdateWeightsRequest(policy=policy, trainer_id="intruder", step=STEP),
    "ReadWeights": lambda policy: pb.ReadWeightsRequest(policy=policy),
    "SampleExamples": lambda policy: pb.SampleExamplesRequest(policy=policy, count=1),
    "WatchPolicy": lambda policy: pb.WatchPolicyRequest(policy=policy),
    "ExportPolicy": lambda policy: pb.ExportPolicyRequest(policy=policy),
    "ImportPolicy": lambda policy: iter(
        [pb.ImportPolicyRequest(header=pb.StateHeader(spec=pb.PolicySpec(name=policy, num_examples=4)))]
    ),
    "GetServerInfo": lambda policy: pb.GetServerInfoRequest(),
}

STRANGER, _ = new_token(tenant="red", scopes=Scope)


@pytest.fixture(scope="module")
def state(guarded: Guarded) -> Iterator[Callable[[], object]]:
    """All there is, as the operator sees it."""
    server = Server(guarded.process.address, guarded.security("operator"))
    with PolicyAdmin(server.address, security=server.security) as admin:
        for name in ("red-1", "blue-1"):
            admin.create(PolicySpec(name=name, num_examples=4))
        yield lambda: [admin.get(policy.spec.name) for policy in admin.list_policies()]


def call(server: Server, method: str, policy: str, *, header: str | None = None) -> Any:
    """All that the method answers."""
    metadata = (*server.security.headers(), *((("x-equipoise-policy", header),) if header else ()))
    with server.channel() as channel:
        answer = getattr(PolicyServiceStub(channel), method)(REQUESTS[method](policy), timeout=60, metadata=metadata)
        return next(iter(answer)) if hasattr(answer, "__next__") else answer


def refusal(server: Server, method: str, policy: str, *, header: str | None = None) -> tuple[grpc.StatusCode, str]:
    """Code and reason."""
    with pytest.raises(grpc.RpcError) as caught:
        call(server, method, policy, header=header)
    info = error_details_pb2.ErrorInfo()
    for key, value in caught.value.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status_pb2.Status.FromString(value).details[0].Unpack(info)
    return caught.value.code(), info.reason


def failures(guarded: Guarded) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{guarded.process.metrics_address}/metrics") as page:
        lines = page.read().decode().splitlines()
    found = (line.rpartition(" ") for line in lines if line.startswith("equipoise_server_auth_failures_total{"))
    return {name.split('"')[1]: float(value) for name, _, value in found}


def test_the_matrix_has_every_method() -> None:
    assert set(REQUESTS) == set(METHODS) == set(ALLOWED)


@pytest.mark.parametrize("method", METHODS)
def test_nobody_gets_in(guarded: Guarded, state: Callable[[], object], method: str) -> None:
    def at(security: Security) -> Server:
        return Server(guarded.process.address, security)

    before, counted = state(), failures(guarded)
    without = guarded.security()
    unauthenticated, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED

    assert refusal(at(without), method, "red-1") == (unauthenticated, "TOKEN_MISSING")
    for wrong in (STRANGER, guarded.tokens["red"][:-1] + "!", guarded.tokens["red"][:-2] + "zz", "x"):
        assert refusal(at(replace(without, token=wrong)), method, "red-1") == (unauthenticated, "TOKEN_INVALID")
    expected = {"TOKEN_MISSING": 1, "TOKEN_INVALID": 4, "POLICY_FORBIDDEN": 0, "SCOPE_MISSING": 0}

    if method not in ("GetServerInfo", "ListPolicies"):
        blue = at(guarded.security("blue"))
        for policy in ("red-1", "red-none", "blu", "unclaimed"):  # whether it exists or not: one answer
            assert refusal(blue, method, policy) == (denied, "POLICY_FORBIDDEN")
        assert refusal(blue, method, "red-1", header="blue-1") == (denied, "POLICY_FORBIDDEN")
        assert refusal(blue, method, "blue-1", header="red-1")[0] is grpc.StatusCode.INVALID_ARGUMENT
        expected["POLICY_FORBIDDEN"] = 5
    for scope in set(Scope) - set(ALLOWED[method]):
        assert refusal(at(guarded.security(f"red {scope}")), method, "red-1") == (denied, "SCOPE_MISSING")
        expected["SCOPE_MISSING"] += 1

    expired = guarded.with_certificate(guarded.authority.issue("expired", ends=timedelta(hours=-1)), "red")
    nobody = replace(guarded.security("red"), client_certificate=None, client_key=None)
    for security in (expired, nobody):
        assert refusal(at(security), method, "red-1")[0] is grpc.StatusCode.UNAVAILABLE  # no connection

    assert state() == before
    now = failures(guarded)
    assert {reason: now[reason] - counted[reason] for reason in expected} == expected


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"DeletePolicy", "ImportPolicy"}))
def test_whoever_may_gets_in(guarded: Guarded, state: Callable[[], object], method: str) -> None:
    state()
    scope = "read" if Scope.READ in ALLOWED[method] else "train"
    call(Server(guarded.process.address, guarded.security(f"red {scope}")), method, "red-1", header="red-1")


def test_a_listing_shows_the_tenants_own_policies_alone(guarded: Guarded, state: Callable[[], object]) -> None:
    state()
    address = guarded.process.address
    with PolicyAdmin(address, security=guarded.security("blue")) as admin:
        for prefix in ("", "b", "blue-"):
            assert {policy.spec.name for policy in admin.list_policies(prefix)} == {"blue-1"}
        for prefix in ("red", "red-1", "blue-2", "c"):
            assert list(admin.list_policies(prefix)) == []
    stub_answer = call(Server(address, guarded.security("blue")), "ListPolicies", "")
    everything = json.dumps(json_format.MessageToDict(stub_answer))
    assert "red" not in everything


def test_a_fork_needs_both_policies_and_may_be_looked_at(guarded: Guarded, state: Callable[[], object]) -> None:
    before = state()
    address = guarded.process.address
    fork = pb.CreatePolicyRequest(policy=pb.PolicySpec(name="blue-2"))
    setattr(fork, "from", "red-1")
    for token, request, reason in (
        ("blue", fork, "POLICY_FORBIDDEN"),
        ("red train", _fork("red-1", "red-2"), "SCOPE_MISSING"),
        ("red", _fork("red-1", "blue-2"), "POLICY_FORBIDDEN"),
    ):
        server = Server(address, guarded.security(token))
        with server.channel() as channel, pytest.raises(grpc.RpcError) as caught:
            PolicyServiceStub(channel).CreatePolicy(request, metadata=server.headers())
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert reason in str(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
    assert state() == before


def _fork(source: str, name: str) -> pb.CreatePolicyRequest:
    request = pb.CreatePolicyRequest(policy=pb.PolicySpec(name=name))
    setattr(request, "from", source)
    return request


def test_methods_beside_the_contract_need_a_token_but_for_health(guarded: Guarded) -> None:
    server = Server(guarded.process.address, guarded.security())
    with server.channel() as channel:
        health = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert health(b"", timeout=10) == b"\x08\x01"
        for package in ("v1", "v1alpha"):
            reflection = channel.stream_stream(f"/grpc.reflection.{package}.ServerReflection/ServerReflectionInfo")
            with pytest.raises(grpc.RpcError) as caught:
                list(reflection(iter([b""]), timeout=10))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_secrets_are_in_neither_log_nor_metrics_nor_process_list(guarded: Guarded) -> None:
    with urllib.request.urlopen(f"http://{guarded.process.metrics_address}/metrics") as page:
        metrics = page.read().decode()
    with open(f"/proc/{guarded.process.pid}/cmdline", "rb") as arguments:
        shown = guarded.process.log + metrics + arguments.read().decode()
    for token in guarded.tokens.values():
        assert token.split("_", 2)[2] not in shown  # eq_<id>_<secret>, and the secret may hold another _
        assert token[16:] not in shown
