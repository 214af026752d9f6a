"""The whole service against a model: whatever is asked in whatever order, every answer is the model's."""

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import seed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1.policy_pb2_grpc import PolicyServiceStub
from tests.e2e.fuzz.model import DECAY, FLOOR, Model
from tests.e2e.fuzz.seeds import SEED, announce, effort
from tests.servers import serve

NUM_EXAMPLES = 12
TIMEOUT_S = 60
RUNS = itertools.count()

names = st.sampled_from(["a", "b", "b.c"])
trainers = st.sampled_from(["t1", "t2", "t3"])
scores = st.dictionaries(st.integers(0, NUM_EXAMPLES - 1), st.sampled_from([-1, 1]), min_size=1, max_size=NUM_EXAMPLES)
some_ids = st.lists(st.integers(0, NUM_EXAMPLES - 1), min_size=1, max_size=5)

BAD: dict[str, dict[str, Any]] = {
    "ID_OUT_OF_RANGE": {"example_ids": np.array([0, NUM_EXAMPLES], "<u8").tobytes(), "contributions": b"\0" * 8},
    "NON_FINITE_STAT": {"example_ids": b"\0" * 8, "contributions": np.array([np.nan], "<f4").tobytes()},
    "SHAPE_MISMATCH": {"example_ids": b"\0" * 8, "contributions": b"\0" * 8},
    "TOO_MANY_EXAMPLES": {"example_ids": b"\0" * 8 * 65, "contributions": b"\0" * 4 * 65},
    "UNUSABLE_STATISTICS": {"example_ids": b"\0" * 8, "losses": b"\0" * 4},
}
"""Steps that every server refuses, by reason."""

moves = st.one_of(
    st.tuples(st.just("step"), scores),
    st.tuples(st.just("repeat"), st.integers(0, 3)),
    st.tuples(st.just("bad"), st.sampled_from(sorted(BAD))),
    st.tuples(st.just("read"), some_ids),
)


class Service(RuleBasedStateMachine):
    """What trainers and administrators do, in any order."""

    server: ClassVar[Any]
    stub: ClassVar[Any]

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"fuzz-{next(RUNS)}-"
        self.policies: dict[str, Model] = {}

    @rule(name=names)
    def create(self, name: str) -> None:
        answer = self.stub.CreatePolicy(pb.CreatePolicyRequest(policy=self.spec(name)), timeout=TIMEOUT_S)
        assert answer.created is (name not in self.policies)
        if answer.created:
            self.policies[name] = Model(answer.status.uid, NUM_EXAMPLES)
        self.check_status(name, answer.status)

    @rule(name=names)
    def create_another_of_the_name(self, name: str) -> None:
        if name in self.policies:
            spec = self.spec(name)
            spec.num_examples += 1
            self.expect("POLICY_EXISTS", lambda: self.stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec)))

    @rule(source=names, name=names)
    def fork(self, source: str, name: str) -> None:
        request = pb.CreatePolicyRequest(policy=pb.PolicySpec(name=self.prefix + name))
        setattr(request, "from", self.prefix + source)
        if name in self.policies:
            assert not self.stub.CreatePolicy(request, timeout=TIMEOUT_S).created
        elif source in self.policies:
            answer = self.stub.CreatePolicy(request, timeout=TIMEOUT_S)
            self.policies[name] = self.policies[source].fork(answer.status.uid)
            self.check_status(name, answer.status)
        else:
            self.expect("POLICY_NOT_FOUND", lambda: self.stub.CreatePolicy(request))

    @rule(name=names, by_uid=st.booleans())
    def delete(self, name: str, by_uid: bool) -> None:
        request = pb.DeletePolicyRequest(policy=self.prefix + name)
        if name not in self.policies:
            self.expect("POLICY_NOT_FOUND", lambda: self.stub.DeletePolicy(request))
            return
        request.uid = "0" * 32
        self.expect("UID_MISMATCH", lambda: self.stub.DeletePolicy(request))
        request.uid = self.policies[name].uid if by_uid else ""
        assert self.stub.DeletePolicy(request, timeout=TIMEOUT_S).uid == self.policies.pop(name).uid

    @rule(name=names, trainer=trainers, signs=scores, offset=st.sampled_from([1, 1, 1, 0, -1, 2, 9]))
    def update(self, name: str, trainer: str, signs: dict[int, int], offset: int) -> None:
        """One step by itself: the next, one sent before, or one that leaves a gap."""
        model = self.policies.get(name)
        last = model.trainers.get(trainer, 0) if model else 0
        sequence = max(1, last + offset)
        request = pb.UpdateWeightsRequest(
            policy=self.prefix + name, trainer_id=trainer, step=scored(signs, sequence=sequence)
        )
        if model is None:
            self.expect("POLICY_NOT_FOUND", lambda: self.stub.UpdateWeights(request))
        elif sequence > last + 1:
            error = self.expect("SEQUENCE_GAP", lambda: self.stub.UpdateWeights(request))
            assert error.metadata["expected_sequence"] == str(last + 1)
        elif reason := model.refused.get((trainer, sequence)):
            self.expect(reason, lambda: self.stub.UpdateWeights(request))
        else:
            answer = self.stub.UpdateWeights(request, timeout=TIMEOUT_S).step
            if sequence == last + 1:
                model.apply(signs)
                model.trainers[trainer] = sequence
                self.check_answer(model, answer, pb.OUTCOME_APPLIED, signs)
            else:
                self.check_answer(model, answer, pb.OUTCOME_DUPLICATE, signs)

    @rule(name=names, signs=scores)
    def update_without_deduplication(self, name: str, signs: dict[int, int]) -> None:
        if model := self.policies.get(name):
            request = pb.UpdateWeightsRequest(policy=self.prefix + name, step=scored(signs))
            answer = self.stub.UpdateWeights(request, timeout=TIMEOUT_S).step
            model.apply(signs)
            self.check_answer(model, answer, pb.OUTCOME_APPLIED, signs)

    @rule(name=names, reason=st.sampled_from(sorted(BAD)))
    def update_with_something_bad(self, name: str, reason: str) -> None:
        if name in self.policies:
            request = pb.UpdateWeightsRequest(policy=self.prefix + name, step=pb.StepRequest(**BAD[reason]))
            self.expect(reason, lambda: self.stub.UpdateWeights(request))

    @rule(name=names, trainer=trainers, moves=st.lists(moves, max_size=8), ends_with_a_gap=st.booleans())
    def exchange(self, name: str, trainer: str, moves: list[tuple[str, Any]], ends_with_a_gap: bool) -> None:
        """A stream with all its requests in flight."""
        opening = pb.ExchangeRequest(open=pb.OpenRequest(policy=self.prefix + name, trainer_id=trainer))
        model = self.policies.get(name)
        if model is None:
            self.expect("POLICY_NOT_FOUND", lambda: list(self.stub.Exchange(iter([opening]))))
            return
        last = model.trainers.get(trainer, 0)
        requests, checks = [opening], []
        opened_at = model.version, last
        for kind, what in moves:
            request, check = self.move(model, trainer, kind, what)
            requests.append(pb.ExchangeRequest(step=request))
            checks.append(check)
        if ends_with_a_gap:
            gap = scored({0: 1}, sequence=model.trainers.get(trainer, 0) + 2)
            requests.append(pb.ExchangeRequest(step=gap))
        answers = self.stub.Exchange(iter(requests), timeout=TIMEOUT_S)
        opened = next(answers).opened
        assert (opened.version, opened.last_sequence, opened.uid) == (*opened_at, model.uid)
        for check in checks:
            check(next(answers).step)
        if ends_with_a_gap:
            self.expect("SEQUENCE_GAP", lambda: next(answers))
        else:
            assert list(answers) == []

    def move(
        self, model: Model, trainer: str, kind: str, what: Any
    ) -> tuple[pb.StepRequest, Callable[[pb.StepResponse], None]]:
        """A request of a stream, applied to the model at once; and what its answer must be."""
        last = model.trainers.get(trainer, 0)
        if kind == "repeat" and last:
            signs, sequence = {0: 1}, max(1, last - what)
            request = scored(signs, sequence=sequence)
            if reason := model.refused.get((trainer, sequence)):
                return request, self.refused(model, reason)
            return request, self.later(model, pb.OUTCOME_DUPLICATE, signs)
        if kind == "bad":
            model.refuse()
            model.trainers[trainer] = last + 1
            model.refused[trainer, last + 1] = what
            return pb.StepRequest(sequence=last + 1, **BAD[what]), self.refused(model, what)
        if kind == "step":
            model.apply(what)
            model.trainers[trainer] = last + 1
            return scored(what, sequence=last + 1), self.later(model, pb.OUTCOME_APPLIED, what)
        ids = what if kind == "read" else [0]
        return pb.StepRequest(example_ids=u64(ids)), self.later(model, pb.OUTCOME_READ, ids)

    @rule(name=names, ids=st.none() | some_ids)
    def read(self, name: str, ids: list[int] | None) -> None:
        request = pb.ReadWeightsRequest(policy=self.prefix + name)
        if ids is not None:
            request.example_ids = u64(ids)
        model = self.policies.get(name)
        if model is None:
            self.expect("POLICY_NOT_FOUND", lambda: list(self.stub.ReadWeights(request)))
            return
        (chunk,) = self.stub.ReadWeights(request, timeout=TIMEOUT_S)
        assert floats(chunk.values) == pytest.approx(
            model.weights(range(NUM_EXAMPLES) if ids is None else ids), rel=1e-5
        )
        model.observe(chunk.epoch, chunk.version)
        request.field = pb.FIELD_SCORE
        (chunk,) = self.stub.ReadWeights(request, timeout=TIMEOUT_S)
        wanted = [model.averages.get(n, np.nan) for n in (range(NUM_EXAMPLES) if ids is None else ids)]
        assert floats(chunk.values) == pytest.approx(wanted, rel=1e-4, abs=1e-6, nan_ok=True)

    @rule(name=names, count=st.integers(1, 20), number=st.integers(0, 2**64 - 1))
    def sample(self, name: str, count: int, number: int) -> None:
        if model := self.policies.get(name):
            request = pb.SampleExamplesRequest(
                policy=self.prefix + name, count=count, with_replacement=True, seed=number
            )
            one, two = (self.stub.SampleExamples(request, timeout=TIMEOUT_S) for _ in range(2))
            assert one.example_ids == two.example_ids
            assert (np.frombuffer(one.example_ids, "<u8") < NUM_EXAMPLES).all()
            assert one.version == model.version

    @rule(size=st.integers(1, 3), prefix=st.sampled_from(["", "b", "b.", "c"]))
    def list_pages(self, size: int, prefix: str) -> None:
        found, token, more = [], "", True
        while more:
            request = pb.ListPoliciesRequest(page_size=size, page_token=token, prefix=self.prefix + prefix)
            page = self.stub.ListPolicies(request, timeout=TIMEOUT_S)
            assert len(page.policies) <= size
            found += [policy.spec.name.removeprefix(self.prefix) for policy in page.policies]
            token = page.next_page_token
            more = bool(token)
        assert found == sorted(name for name in self.policies if name.startswith(prefix))

    @precondition(lambda self: self.policies)
    @rule(chance=st.integers(0, 25))
    def kill_the_server(self, chance: int) -> None:
        """Whatever was answered was in the log: nothing is missing after a restart."""
        if chance == 13:
            type(self).server.restart()
            for name in self.policies:
                self.stub.GetPolicy(
                    pb.GetPolicyRequest(policy=self.prefix + name), wait_for_ready=True, timeout=TIMEOUT_S
                )

    def teardown(self) -> None:
        """In the end every policy is as the model says."""
        for name in self.policies:
            answer = self.stub.GetPolicy(pb.GetPolicyRequest(policy=self.prefix + name), timeout=TIMEOUT_S)
            self.check_status(name, answer.status)
            self.read(name, None)
            self.stub.DeletePolicy(pb.DeletePolicyRequest(policy=self.prefix + name), timeout=TIMEOUT_S)

    def spec(self, name: str) -> pb.PolicySpec:
        settings = {"ema_decay": pb.SettingValue(number=DECAY), "floor": pb.SettingValue(number=FLOOR)}
        rule = pb.RuleSpec(name="ema_sign", settings=settings)
        return pb.PolicySpec(name=self.prefix + name, num_examples=NUM_EXAMPLES, rule=rule)

    def check_status(self, name: str, status: pb.PolicyStatus) -> None:
        model = self.policies[name]
        model.observe(status.epoch, status.version)
        assert (status.uid, status.version) == (model.uid, model.version)
        assert status.scored_examples == len(model.averages)
        assert status.effective_examples == pytest.approx(model.effective_examples(), rel=1e-5)

    def check_answer(self, model: Model, answer: pb.StepResponse, outcome: int, ids: Any) -> None:
        self.later(model, outcome, ids)(answer)
        assert answer.durable_sequence == model.trainers.get("", 0) or answer.sequence <= answer.durable_sequence

    def refused(self, model: Model, reason: str) -> Callable[[pb.StepResponse], None]:
        """What the answer of a refused step must be."""
        version = model.version

        def check(answer: pb.StepResponse) -> None:
            assert (answer.outcome, answer.version) == (pb.OUTCOME_REFUSED, version)
            assert info_of(answer.error).reason == reason
            assert answer.weights == b""

        return check

    def later(self, model: Model, outcome: int, ids: Any) -> Callable[[pb.StepResponse], None]:
        """Compares an answer with the model as it is now."""
        version, weights = model.version, model.weights(ids)

        def check(answer: pb.StepResponse) -> None:
            assert (answer.outcome, answer.version) == (outcome, version)
            assert floats(answer.weights) == pytest.approx(weights, rel=1e-5)
            model.observe(answer.epoch, answer.version)

        return check

    def expect(self, reason: str, call: Callable[[], object]) -> error_details_pb2.ErrorInfo:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        carried = dict(caught.value.trailing_metadata()).get("grpc-status-details-bin", b"")
        info = info_of(status_pb2.Status.FromString(carried))
        assert info.reason == reason, caught.value
        return info


def u64(ids: Any) -> bytes:
    return np.array(list(ids), "<u8").tobytes()


def floats(data: bytes) -> list[float]:
    return np.frombuffer(data, "<f4").tolist()


def scored(signs: dict[int, int], *, sequence: int = 0) -> pb.StepRequest:
    """A step of these examples and one more whose row does not count."""
    values = np.array([*signs.values(), np.nan], "<f4").tobytes()
    mask = b"\1" * len(signs) + b"\0"
    return pb.StepRequest(
        sequence=sequence, example_ids=u64([*signs, 0]), contributions=values, scored=mask, weights_for=u64(signs)
    )


def info_of(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        detail.Unpack(info)
    return info


@pytest.mark.parametrize("examples", [12, pytest.param(250, marks=pytest.mark.slow)])
def test_every_answer_is_the_models(examples: int) -> None:
    announce()
    with serve(max_batch_examples=64) as server, grpc.insecure_channel(server.address, options=OPTIONS) as channel:
        Service.server, Service.stub = server, PolicyServiceStub(channel)
        run_state_machine_as_test(seed(SEED)(Service), settings=effort(examples, stateful_step_count=40))


OPTIONS = [("grpc.min_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200),
           ("grpc.initial_reconnect_backoff_ms", 50)]  # fmt: skip
