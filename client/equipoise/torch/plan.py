"""The plan of a model's coverage, and where the examples of a step lie."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from equipoise.torch.blocks import Block
from equipoise.torch.calls import Observed, Recorder, Whole
from equipoise.torch.capture import Sums
from equipoise.torch.graph import Node
from equipoise.torch.owners import CoupledError, owners_of
from equipoise.torch.rows import Layout


@dataclass(slots=True)
class Plan:
    """Who accounts for what.

    Attributes:
        count: how many examples the step had that it was made on.
        claims: parameters of each module with a formula that its calls account for.
        blocks: modules taken as a whole.
        shared: modules with a formula whose output all examples share.
        sorted_by_losses: whether the losses pick rows of what these give, perhaps others in each step.
        heads: outermost modules, whose outputs the losses are computed from.
        packed: whether the owners of rows must be found at every step.
        coarse: whether half precision is involved.
        single: whether less than double precision is, as in a loss computed in float32.
        modes: of all modules whether they were in training.
    """

    count: int
    claims: dict[nn.Module, set[nn.Parameter]]
    blocks: dict[nn.Module, Block]
    shared: set[nn.Module]
    sorted_by_losses: bool
    heads: dict[nn.Module, str]
    packed: bool
    coarse: bool
    single: bool
    modes: list[bool] = field(default_factory=list)

    def keep(self, older: "Plan", called: set[nn.Module]) -> None:
        """Takes from an older plan what it says of modules that were not called in this step.

        Args:
            older: the plan before.
            called: the modules that were.
        """
        taken = {p for block in self.blocks.values() for p in block.parameters.values()}
        for module, parameters in older.claims.items():
            if module not in called and parameters - taken:
                self.claims[module] = parameters - taken
                self.shared |= {module} & older.shared
        taken |= {p for parameters in self.claims.values() for p in parameters}
        for module, block in older.blocks.items():
            if module not in called and not taken & set(block.parameters.values()):
                self.blocks[module] = block
        self.packed |= older.packed
        self.sorted_by_losses |= older.sorted_by_losses
        self.heads = older.heads | self.heads


@dataclass(slots=True)
class Settled:
    """What one step's contributions are made of.

    Attributes:
        plan: who accounts for what.
        layout: where the examples lie.
        observed: calls of modules with a formula; of those that all examples share the nodes that give it to each.
        wholes: calls of modules taken as a whole.
        surveyed: whether the plan was made on this step.
        sums: of a step that was surveyed what the contributions of some examples must add up to.
    """

    plan: Plan
    layout: Layout
    observed: list[tuple[Observed, list[Node]]]
    wholes: list[Whole]
    surveyed: bool = False
    sums: Sums = field(default_factory=list)


def layout_of(recorder: Recorder, losses: Tensor, count: int, *, packed: bool) -> Layout | None:
    """Where the examples of a step lie; None: it cannot be told."""
    layout = Layout(count)
    if packed and count > 1:
        outputs = [y for call in recorder.wholes if call.parent is None for y in call.outputs.values()]
        for y in reversed(outputs):
            try:
                layout.owners = owners_of(losses, y)
            except CoupledError:
                if y.ndim < 2:
                    raise
                layout.owners = owners_of(losses, y, each=True)
            if layout.owners is not None:
                return layout
        return None
    for call in recorder.wholes:
        for y in call.outputs.values():
            layout.note(tuple(y.shape))
    for observed in recorder.observed:
        layout.note(observed.shape)
    return layout
