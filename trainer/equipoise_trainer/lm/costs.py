"""What a run has cost, in compute units: training steps that do nothing but forward and backward pass.

U = steps·(1 + o_stat) + refreshes·o_dev + reference model + scoring of discarded candidates. A unit is one plain
step on B sequences; everything a method does beside it is counted in sequences and converted by its measured price.
"""

from dataclasses import asdict, dataclass
from typing import Final

PLAIN: Final = 1.0
"""Forward and backward pass of one sequence."""
ONE_PASS: Final = 1.49
"""The same with contributions before the weights. `tests/benchmarks/torch_cost.py` at this preset's size: 1.45 to 1.49
(32 and 64 sequences a step, one thread, torch 2.13); at the paper's size less: see there."""
GHOST: Final = 1.41
"""The same with contributions after the backward pass; measured there as 1.35 to 1.41."""
FORWARD: Final = 0.35
"""A forward pass alone."""


@dataclass(slots=True, kw_only=True)
class Meter:
    """Counts sequences. Measuring losses for the curves is not counted: every method is measured alike.

    Attributes:
        plain: trained on without statistics, or differentiated for the target direction or a reference model.
        ghost: trained on, with contributions afterwards.
        one_pass: trained on or discarded, with contributions before the weights.
        forward: of which only the loss was taken: guard B at each refresh, reference losses, candidates.
    """

    plain: int = 0
    ghost: int = 0
    one_pass: int = 0
    forward: int = 0

    def units(self, batch_size: int) -> float:
        """Compute units, for B = `batch_size`."""
        total = PLAIN * self.plain + GHOST * self.ghost + ONE_PASS * self.one_pass + FORWARD * self.forward
        return total / batch_size

    def to_dict(self) -> dict[str, int]:
        """Counts by name."""
        return asdict(self)
