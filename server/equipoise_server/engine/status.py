"""How a policy stands, and how it is served: the records from which the wire's status and the metrics are made."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from equipoise_server.engine.progress import Progress
from equipoise_server.rules import StrataReport

RuleKind: TypeAlias = Literal["table", "batch", "trajectory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """A consistent picture of a policy between two steps; see `equipoise.v1.PolicyStatus` for units.

    Attributes:
        name: the policy's.
        rule: name of its rule.
        rule_kind: what a rule's weights are spread over: `table` (all N), `batch` (the rows of a step), or
            `trajectory` (N in each of its rows).
        num_examples: N.
        reference_nats: ln|V|; None: not given.
        progress: version, losses, evidence.
        scored_examples: K.
        effective_examples: 1/Σγ², in [1, N].
        effective_ratio: these over the examples among which the rule spreads its weight, in (0, 1].
        keeps_scores: whether the rule keeps something of each example; else nobody knows who was ever scored.
        guard_strength: g.
        table_bytes: memory of the tables.
        guard_trials: how many trials of the guard ended with the policy's weights served, and with uniform ones.
        read_strata: makes the report of its strata, as of this picture; None for a rule without.
    """

    name: str
    rule: str
    rule_kind: RuleKind
    num_examples: int
    reference_nats: float | None
    progress: Progress
    scored_examples: int
    effective_examples: float
    effective_ratio: float
    keeps_scores: bool
    guard_strength: float
    table_bytes: int
    guard_trials: tuple[int, int] = (0, 0)
    read_strata: Callable[[], StrataReport | None] = field(default=lambda: None, compare=False)

    @property
    def compression_ratio(self) -> float | None:
        """reference_nats over the mean target loss (paper, section 2.3, in nats); None without both."""
        return self.progress.compression_ratio(self.reference_nats)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """How a policy is served at one moment.

    Attributes:
        policy: how it stands.
        in_memory: whether it is in service; else it left memory because nobody used it, and this is how it stood then.
        trainers: those whose streams are open.
        known_trainers: those that are remembered.
        stepped_at: when its last step was taken, seconds since 1970; None: no trainer has ever sent one.
        queued_steps: steps that wait for the device.
        queue_ratio: how full its queue is, by steps or bytes, over its limits.
        unpersisted: steps that are not in the store yet.
        lag_s: how long ago the oldest of these was taken, seconds; 0 when all are in the store.
        log_entries: entries of its log in the store.
        log_bytes: bytes of these, about.
        log_replay_s: about how long their replay would take, seconds.
    """

    policy: PolicyStatus
    in_memory: bool = True
    trainers: int = 0
    known_trainers: int = 0
    stepped_at: float | None = None
    queued_steps: int = 0
    queue_ratio: float = 0.0
    unpersisted: int = 0
    lag_s: float = 0.0
    log_entries: int = 0
    log_bytes: int = 0
    log_replay_s: float = 0.0

    @property
    def table_bytes(self) -> int:
        """Memory that the tables take now."""
        return self.policy.table_bytes if self.in_memory else 0
