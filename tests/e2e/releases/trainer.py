"""One trainer's steps with a policy of every rule, and what it learns of a policy; the generated stubs alone."""

import itertools
from collections.abc import Iterator

import numpy as np

from equipoise.v1 import policy_pb2 as pb
from equipoise.v1 import policy_pb2_grpc as rpc

TRAINER = "trainer"
NUM_EXAMPLES = 300
ROWS = 4
"""Of the trajectory: steps of its training run."""


class Trainer:
    """Sends steps and reads policies, one call after another."""

    def __init__(self, stub: rpc.PolicyServiceStub) -> None:
        self._stub = stub

    def create(self, rule: str) -> None:
        """Creates the policy of a rule, named for it."""
        given = {"rows": ROWS, "learning_rate": 0.01} if rule == "trajectory" else {}
        spec = pb.PolicySpec(
            name=named(rule),
            num_examples=NUM_EXAMPLES,
            rule=pb.RuleSpec(name=rule, settings={key: pb.SettingValue(number=value) for key, value in given.items()}),
            reference_nats=2.5,
        )
        self._stub.CreatePolicy(pb.CreatePolicyRequest(policy=spec), timeout=60)

    def step(self, policy: str, step: pb.StepRequest) -> pb.StepResponse:
        """The answer to a step."""
        request = pb.UpdateWeightsRequest(policy=policy, trainer_id=TRAINER, step=step)
        return self._stub.UpdateWeights(request, timeout=60, wait_for_ready=True).step

    def status(self, policy: str) -> pb.PolicyStatus:
        """The policy's picture of now."""
        return self._stub.GetPolicy(pb.GetPolicyRequest(policy=policy), timeout=60).status

    def weights(self, policy: str) -> bytes:
        """All its weights, float32; of a trajectory row after row."""
        rows = ROWS if policy == named("trajectory") else 0
        request = pb.ReadWeightsRequest(policy=policy, field=pb.FIELD_WEIGHT, num_rows=rows)
        return b"".join(chunk.values for chunk in self._stub.ReadWeights(request, timeout=60))


def named(rule: str) -> str:
    """The name of a rule's policy."""
    return rule.replace("_", "-")


def steps(rule: str, *, first: int, batch: int) -> Iterator[pb.StepRequest]:
    """An endless run of made-up statistics: ids that repeat, rows that are not scored, all kinds of losses.

    Args:
        rule: of the policy.
        first: sequence of the first step.
        batch: rows of each.
    """
    random = np.random.default_rng([first, *rule.encode()])
    for sequence in itertools.count(first):
        step = pb.StepRequest(sequence=sequence, step=sequence, target_loss=3.0 / sequence)
        if sequence % 3:  # up and down, so that the guard has trials to judge
            step.guard_loss = 2.0 + float(np.sin(sequence))
        if rule == "trajectory":
            step.step = (sequence - 1) % ROWS
            step.all_examples = True
            arrays = {"contributions": random.standard_normal(NUM_EXAMPLES)}
        else:
            ids = random.integers(0, NUM_EXAMPLES, batch)
            step.example_ids = ids.astype("<u8").tobytes()
            step.scored = (random.random(batch) < 0.9).astype("u1").tobytes()
            arrays = {"losses": random.uniform(0.1, 4.0, batch)}
            if rule in ("excess_loss", "rho"):
                arrays["reference_losses"] = random.uniform(0.1, 4.0, batch)
            elif rule != "loss_linear_upper":
                arrays["contributions"] = random.standard_normal(batch) + 0.5 * np.sin(ids)
        for name, values in arrays.items():
            setattr(step, name, values.astype("<f4").tobytes())
        yield step
