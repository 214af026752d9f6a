"""How a policy stands: the one record from which the wire's status and the metrics are made."""

from dataclasses import dataclass

from equipoise_server.engine.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """A consistent picture of a policy between two steps; see `equipoise.v1.PolicyStatus` for units.

    Attributes:
        name: the policy's.
        num_examples: N.
        reference_nats: ln|V|; None: not given.
        progress: version, losses, evidence.
        scored_examples: K.
        effective_examples: 1/Σγ², in [1, N].
        guard_strength: g.
        table_bytes: memory of the tables.
    """

    name: str
    num_examples: int
    reference_nats: float | None
    progress: Progress
    scored_examples: int
    effective_examples: float
    guard_strength: float
    table_bytes: int

    @property
    def compression_ratio(self) -> float | None:
        """reference_nats over the mean target loss (paper, section 2.3, in nats); None without both."""
        return self.progress.compression_ratio(self.reference_nats)
