"""A small honest policy service over a real socket, that does what a test scripts: falls silent, ends streams, lags.

Its rule: the weight of an example is 1 + the number of steps that scored it, so that weights count applications.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from uuid import uuid4

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from typing_extensions import override

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceServicer, add_PolicyServiceServicer_to_server
from tests.ports import free_port

REFUSED_STEP = 666
"""A step with this training step is refused."""


@dataclass
class Memory:
    """What outlives a server: its store."""

    spec: pb.PolicySpec = field(default_factory=pb.PolicySpec)  # nameless: there is no policy
    uid: str = ""
    epoch: int = 1
    version: int = 0
    counts: Counter[int] = field(default_factory=Counter)
    applied: dict[str, list[int]] = field(default_factory=dict)

    def status(self) -> pb.PolicyStatus:
        return pb.PolicyStatus(spec=self.spec, uid=self.uid, epoch=self.epoch, version=self.version)


class Service(PolicyServiceServicer):
    """The service; tests turn its knobs while it runs."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.lock = threading.Lock()
        self.speaking = threading.Event()
        self.speaking.set()
        self.durable_lag = 0
        self.end_after: int | None = None
        self.end_with: tuple[grpc.StatusCode, status_pb2.Status] | None = None
        self.fail_with: tuple[grpc.StatusCode, status_pb2.Status] | None = None
        self.reconnect_after: int | None = None
        self.opened: list[pb.OpenRequest] = []
        self.chunk_offsets = [0, 3]
        self.received: list[int] = []
        self.headers: list[str] = []

    @override
    def CreatePolicy(self, request: pb.CreatePolicyRequest, context: grpc.ServicerContext) -> pb.CreatePolicyResponse:
        with self.lock:
            created = not self.memory.spec.name
            if created:
                self.memory.spec, self.memory.uid = request.policy, uuid4().hex
            elif self.memory.spec.num_examples != request.policy.num_examples:
                context.abort(grpc.StatusCode.ALREADY_EXISTS, "num_examples differs")
            return pb.CreatePolicyResponse(status=self.memory.status(), created=created)

    @override
    def GetPolicy(self, request: pb.GetPolicyRequest, context: grpc.ServicerContext) -> pb.GetPolicyResponse:
        if self.fail_with is not None:
            abort_with(context, *self.fail_with)
        self._check_exists(request.policy, context)
        return pb.GetPolicyResponse(status=self.memory.status())

    @override
    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(api_version="v1", max_batch_examples=1000)

    @override
    def ListPolicies(self, request: pb.ListPoliciesRequest, context: grpc.ServicerContext) -> pb.ListPoliciesResponse:
        start = int(request.page_token or 0)
        page = [pb.ListedPolicy(spec=pb.PolicySpec(name=f"{request.prefix}{i}")) for i in range(start, start + 2)]
        return pb.ListPoliciesResponse(policies=page, next_page_token=str(start + 2) if start < 4 else "")

    @override
    def ReadWeights(
        self, request: pb.ReadWeightsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ReadWeightsResponse]:
        for offset in self.chunk_offsets:
            values = np.arange(offset, offset + 3, dtype="<f4").tobytes()
            yield pb.ReadWeightsResponse(offset=offset, values=values, version=offset)

    @override
    def WatchPolicy(
        self, request: pb.WatchPolicyRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchPolicyResponse]:
        for version in range(3):
            yield pb.WatchPolicyResponse(status=pb.PolicyStatus(version=version))
        abort(context, grpc.StatusCode.NOT_FOUND, "POLICY_DELETED")

    @override
    def Exchange(
        self, requests: Iterator[pb.ExchangeRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ExchangeResponse]:
        self.headers += [str(value) for key, value in context.invocation_metadata() if key == "x-equipoise-policy"]
        self.speaking.wait()
        opening = next(requests).open
        self._check_exists(opening.policy, context)
        if opening.uid and opening.uid != self.memory.uid:
            abort(context, grpc.StatusCode.FAILED_PRECONDITION, "UID_MISMATCH")
        self.opened.append(opening)
        applied = self.memory.applied.setdefault(opening.trainer_id, [])
        yield pb.ExchangeResponse(
            opened=pb.OpenResponse(
                max_batch_examples=1000,
                uid=self.memory.uid,
                epoch=self.memory.epoch,
                version=self.memory.version,
                last_sequence=len(applied),
                durable_sequence=max(0, len(applied) - self.durable_lag),
                num_examples=self.memory.spec.num_examples,
            )
        )
        for answers, request in enumerate(requests):
            self.speaking.wait()
            if self.end_after is not None and answers >= self.end_after:
                self.end_after = None
                assert self.end_with is not None
                code, status = self.end_with
                abort_with(context, code, status)
            with self.lock:
                answer = self._apply(request.step, applied, context)
            yield pb.ExchangeResponse(step=answer)
            if answers + 1 == self.reconnect_after:
                self.reconnect_after = None
                yield pb.ExchangeResponse(reconnect=pb.ReconnectRequest(within_ms=10))

    def _apply(self, step: pb.StepRequest, applied: list[int], context: grpc.ServicerContext) -> pb.StepResponse:
        self.received.append(step.sequence)
        ids = (
            range(self.memory.spec.num_examples)
            if step.all_examples
            else np.frombuffer(step.example_ids, "<u8").tolist()
        )
        outcome = pb.OUTCOME_READ
        if step.sequence > len(applied) + 1:
            abort(context, grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE_GAP", expected=str(len(applied) + 1))
        elif step.sequence == len(applied) + 1:
            outcome = pb.OUTCOME_REFUSED if step.step == REFUSED_STEP else pb.OUTCOME_APPLIED
            applied.append(step.step)
            self.memory.version += 1
            if outcome == pb.OUTCOME_APPLIED:
                self.memory.counts.update(set(ids))
        elif step.sequence:
            outcome = pb.OUTCOME_DUPLICATE
        answered = np.frombuffer(step.weights_for, "<u8").tolist() if step.HasField("weights_for") else ids
        weights = np.array([1 + self.memory.counts[i] for i in answered], "<f4")
        answer = pb.StepResponse(
            sequence=step.sequence,
            epoch=self.memory.epoch,
            version=self.memory.version,
            durable_sequence=max(0, len(applied) - self.durable_lag),
            outcome=outcome,
            weights=weights.tobytes(),
        )
        if outcome == pb.OUTCOME_REFUSED:
            answer.weights = b""
            answer.error.CopyFrom(refusal())
        return answer

    def _check_exists(self, policy: str, context: grpc.ServicerContext) -> None:
        if self.memory.spec.name != policy:
            abort(context, grpc.StatusCode.NOT_FOUND, "POLICY_NOT_FOUND")


class ScriptedServer:
    """A server on a loopback port that can be killed and started again on it."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.port = free_port()
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts (again), with what memory holds."""
        self.service = Service(self.memory)  # type: ignore[abstract]  # the calls it lacks answer UNIMPLEMENTED
        options = [("grpc.so_reuseport", 0), ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000)]
        self._server = grpc.server(ThreadPoolExecutor(max_workers=16), options=options)
        add_PolicyServiceServicer_to_server(self.service, self._server)
        self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def kill(self) -> None:
        """Ends every call and lets the port go; nothing in flight is answered."""
        self.service.speaking.set()
        self._server.stop(grace=0).wait(5)
        self.memory.epoch += 1


def status_of(code: grpc.StatusCode, reason: str, **metadata: str) -> status_pb2.Status:
    """A status with an ErrorInfo."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="equipoise", metadata=metadata)
    return status_pb2.Status(code=code.value[0], message=reason.lower(), details=[packed(info)])


def refusal() -> status_pb2.Status:
    """What a refused step is answered with."""
    info = error_details_pb2.ErrorInfo(
        reason="NON_FINITE_STATISTIC", domain="equipoise", metadata={"index": "1", "value": "nan", "rule": "finite"}
    )
    violation = error_details_pb2.BadRequest.FieldViolation(field="contributions", description="must be finite")
    request = error_details_pb2.BadRequest(field_violations=[violation])
    return status_pb2.Status(
        code=code_pb2.INVALID_ARGUMENT, message="contributions[1] = nan", details=[packed(info), packed(request)]
    )


def packed(message: object) -> any_pb2.Any:
    wrapped = any_pb2.Any()
    wrapped.Pack(message)  # type: ignore[arg-type]
    return wrapped


def abort(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, **metadata: str) -> None:
    """Ends a call with a reason."""
    abort_with(context, code, status_of(code, reason, **metadata))


def abort_with(context: grpc.ServicerContext, code: grpc.StatusCode, status: status_pb2.Status) -> None:
    """Ends a call with a status."""
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, status.message)
