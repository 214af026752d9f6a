"""The policy of a served run: statistics go to a policy server, weights come back, and a checkpoint holds it all."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from equipoise import PolicyClient, PolicySpec, Timeout
from equipoise.wire import StepFields

Array = NDArray[np.float64]
STEP_S, CALL_S = 30.0, 60.0
"""Deadlines, seconds: long, since several runs and a server may share few cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFacts:
    """The policy at the end of a run.

    Attributes:
        policy: its name on the server.
        rule: name of its rule.
        settings: all settings, as the server resolved them.
        version: steps it has seen.
        sim: the server's SIM; None: undefined.
        effective_examples: the server's 1/Σγ².
        guard_strength: how far the guard pulled towards uniform, in [0, 1].
        stale: steps that the server did not answer.
    """

    policy: str
    rule: str
    settings: Mapping[str, Any]
    version: int
    sim: float | None
    effective_examples: float
    guard_strength: float
    stale: int


class RunPolicy:
    """A policy of one run. A context manager: it disconnects at the end.

    Args:
        address: `host:port` of the server.
        spec: the policy, created unless it exists.
        archive: the state to start from, as `save` wrote it; None: a new policy.
    """

    def __init__(self, address: str, *, spec: PolicySpec, archive: Path | None = None) -> None:
        self.spec = spec
        self.client = PolicyClient(
            address,
            policy=spec.name,
            num_examples=spec.num_examples,
            rule=spec.rule,
            settings=spec.settings,
            reference_nats=spec.reference_nats,
            when_lost="wait",
            timeout=Timeout(step=STEP_S, call=CALL_S),
        )
        if archive is None:
            self.client.admin.create(spec)  # now rather than at the first step, since a checkpoint may come before it
        else:
            self.client.admin.import_policy(archive, spec.name)

    def step(self, ids: ArrayLike, **fields: Unpack[StepFields]) -> Array:
        """Sends statistics and waits for the weights of the rows: [B]."""
        return self.client.step(ids, **fields).weights.astype(np.float64)

    def table(self) -> tuple[Array, Array]:
        """Weights and scores of all examples, [N] each; a score is NaN where there is none."""
        self.client.flush()
        return tuple(self.client.read_weights(field).astype(np.float64) for field in ("weight", "score"))  # type: ignore[return-value]

    def save(self, path: Path) -> None:
        """Writes the state of now to a file."""
        self.client.flush()
        self.client.admin.export_policy(self.spec.name, path)

    def facts(self) -> PolicyFacts:
        """The policy as it stands."""
        self.client.flush()
        status = self.client.status()
        return PolicyFacts(
            policy=self.spec.name,
            rule=status.spec.rule,
            settings=dict(status.spec.settings),
            version=status.version,
            sim=status.sim,
            effective_examples=status.effective_examples,
            guard_strength=status.guard_strength,
            stale=self.client.stats.fallbacks,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
