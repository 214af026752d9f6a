"""The served policy as a weigher: statistics go to a policy server, weights come back."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from equipoise import PolicyClient, PolicySpec, Source, Timeout
from equipoise.options import WhenLost
from equipoise.policies import SettingValue
from equipoise.wire import StepFields
from equipoise_trainer.perceptron import Array
from equipoise_trainer.training import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedFacts:
    """How a served run went, beside its curve.

    Attributes:
        policy: name of the policy on the server.
        rule: name of its rule.
        settings: all its settings, as the server resolved them.
        version: of the policy at the end: the number of steps it consumed.
        durable_version: newest version in the server's store.
        steps_sent: steps this trainer made.
        served: steps answered by the server.
        stale: steps answered from older weights, because the server was lost.
        uniform: steps answered with weights 1, because the server was lost.
        reconnects: streams opened after the first.
        longest_stall: longest wait for an answer, seconds.
        sim: the server's SIM at the end; None: undefined.
        effective_examples: the server's 1/Σγ² at the end.
    """

    policy: str
    rule: str
    settings: Mapping[str, SettingValue]
    version: int
    durable_version: int
    steps_sent: int
    served: int
    stale: int
    uniform: int
    reconnects: int
    longest_stall: float
    sim: float | None
    effective_examples: float


class ServedWeigher:
    """A weigher that asks a policy server at every step. A context manager: it disconnects at the end.

    Args:
        address: `host:port` of the server.
        spec: the policy, created unless it exists; reference_nats is ln C.
        when_lost: what happens while the server is lost: `continue` with the newest weights known, or `wait`.
        trainer_id: id of this trainer; None: random.
    """

    def __init__(
        self, address: str, *, spec: PolicySpec, when_lost: WhenLost = "continue", trainer_id: str | None = None
    ) -> None:
        self._spec = spec
        self._sources = dict.fromkeys(Source, 0)
        self._client = PolicyClient(
            address,
            policy=spec.name,
            num_examples=spec.num_examples,
            rule=spec.rule,
            settings=spec.settings,
            durability=spec.durability,
            reference_nats=spec.reference_nats,
            trainer_id=trainer_id,
            when_lost=when_lost,
            timeout=Timeout(step=5.0, call=30.0),
        )

    def weigh(self, observation: Observation) -> Array:
        """Sends the statistics and waits for the weights. Raises equipoise.EquipoiseError."""
        fields: StepFields = {
            "contributions": observation.contributions.astype(np.float32),
            "losses": observation.losses.astype(np.float32),
            "target_loss": observation.target_loss,
            "guard_loss": observation.guard_loss,
            "step": observation.step,
        }
        if observation.ids is None:
            fields["all_examples"] = True
        elif observation.wants_all:
            fields["weights_for"] = np.arange(self._spec.num_examples)
        result = self._client.step(observation.ids, **fields)
        self._sources[result.source] += 1
        return result.weights.astype(np.float64)

    def scores(self) -> Array:
        """The rule's own statistic of every example, [N]; NaN where never scored."""
        self._client.flush()
        return self._client.read_weights("score").astype(np.float64)

    def facts(self) -> ServedFacts:
        """How the run went; waits until every step is in the server's store."""
        self._client.flush(durable=True)
        status = self._client.status()
        stats = self._client.stats
        return ServedFacts(
            policy=self._spec.name,
            rule=status.spec.rule,
            settings=dict(status.spec.settings),
            version=status.version,
            durable_version=status.durable_version,
            steps_sent=stats.steps,
            served=self._sources[Source.SERVED],
            stale=self._sources[Source.STALE],
            uniform=self._sources[Source.UNIFORM],
            reconnects=stats.reconnects,
            longest_stall=stats.longest_stall,
            sim=status.sim,
            effective_examples=status.effective_examples,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
