"""Which observed calls account for the parameters: every use of each exactly once, or the model is refused."""

import logging
from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn

from equipoise.torch.calls import Observed, Observer, Recorder, Spans, Whole
from equipoise.torch.graph import Graph, Node, number_of
from equipoise.torch.kinds import Kinds, check_eager, check_whole, closed_layers, takes_hooks
from equipoise.torch.layers import Direction, Layer
from equipoise.torch.owners import CoupledError, in_order, others_touched
from equipoise.torch.plan import Plan, Settled, layout_of
from equipoise.torch.processes import unwrapped
from equipoise.torch.rows import Layout
from equipoise.torch.survey import Survey, UnlikeError

_log = logging.getLogger(__name__)

WATCHFUL_STEPS = 64
"""For how many steps all modules are looked at after a step that was unlike the one surveyed."""


class Coverage:
    """Accounts for every trainable parameter of a model.

    The first step is surveyed: all modules are looked at, and two backward passes, each from a part of the losses, show
    whether rows belong to one example alone. Every place in the autograd graph where a parameter enters must lie in
    exactly one call of a module whose formula is known, or of a module that can be taken as a whole. Later steps look
    at these modules only; at each refresh of the direction the graph is looked at again. Of a step that is unlike the
    one surveyed nothing is known; for some time from then on all modules are looked at, so that a step unlike all
    before is surveyed itself.

    Args:
        model: the model in training.
        shared: paths of modules that all examples share; found out where it can be.
        also: types of modules that are taken as a whole.
        whole: whether modules may be taken as a whole.
        part: path and module of the only part that counts, in its own calls; default: the model.

    Attributes:
        partial: whether only a part counts.
        plan: who accounts for what; None before the first step, and where a step was unlike the one surveyed.
        watched: steps on which Σ s·c was compared with ⟨V, gradient⟩.
        gaps: those on which they differed.
        left_out: steps whose contributions were left out because they were unlike the one surveyed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        shared: Collection[str] = (),
        also: Kinds = (),
        whole: bool = True,
        part: tuple[str, nn.Module] | None = None,
    ) -> None:
        self.model = model
        self.plan: Plan | None = None
        self.watched = self.gaps = self.left_out = 0
        self._shared = set(shared)
        self._also = also
        self._whole = whole
        self.partial = part is not None
        self._prefix, self._part = part or ("", model)
        self._trainable: list[nn.Parameter] = []
        self._layers: dict[nn.Module, Layer] = {}
        self._owners: dict[nn.Parameter, tuple[str, nn.Module]] = {}
        self._why_not: dict[nn.Module, str] = {}
        self._last: Plan | None = None
        self._due = False
        self._refreshes = 0
        self._watchful = 0
        self._modes: list[bool] = []
        self.refresh()

    @property
    def layers(self) -> Mapping[nn.Module, Layer]:
        """The modules with trainable parameters whose formula is known."""
        return self._layers

    @property
    def coarse(self) -> bool:
        """Whether half precision was involved in the step surveyed."""
        return self.plan is not None and self.plan.coarse

    @property
    def single(self) -> bool:
        """Whether less than double precision was."""
        return self.plan is not None and self.plan.single

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that are accounted for."""
        return self._trainable

    def name_of(self, module: nn.Module) -> str:
        """Path and type of a module."""
        path = next((path for path, other in self.model.named_modules() if other is module), "")
        return f"{path or 'the model itself'} ({type(module).__name__})"

    def refresh(self) -> None:
        """Looks at the model again: what is trainable may have changed.

        Raises:
            UnsupportedModuleError: the model is compiled or sharded.
        """
        check_eager(self._part)
        check_whole(self._part)
        trainable = [parameter for parameter in self._part.parameters() if parameter.requires_grad]
        if [id(p) for p in trainable] != [id(p) for p in self._trainable]:
            self._trainable, self.plan, self._last = trainable, None, None
            self._layers = closed_layers(self._part, prefix=self._prefix, but=self._also)
            self._owners = {
                parameter: (path, module)
                for path, module in self._part.named_modules(prefix=self._prefix)
                for parameter in _own(module)
            }
        self._due = True
        self._refreshes += 1

    def recorder(self, count: int | None, observer: Observer) -> Recorder:
        """Hooks for one capture of `count` examples; None: so many is not known yet."""
        self._modes = [module.training for module in self._part.modules()]
        plan = self.plan
        if plan is not None and (plan.modes != self._modes or (count is not None and self._too_few(count))):
            self.plan = plan = None
        if plan is None or self._watchful:
            self._watchful = max(0, self._watchful - 1)
            named = unwrapped(self._part).named_modules(prefix=self._prefix)
            every = {module: path for path, module in named if takes_hooks(module)}
            return Recorder(self._layers, every, observer, again=() if plan is None else plan.blocks, survey=True)
        taken = {p for block in plan.blocks.values() for p in block.parameters.values()}
        layers = {
            module: layer
            for module, layer in self._layers.items()
            if plan.claims.get(module) or not taken.issuperset(_own(module))
        }
        blocks = {module: block.path for module, block in plan.blocks.items()}
        return Recorder(layers, {**plan.heads, **blocks}, observer, once=plan.heads.keys() - blocks.keys())

    def settle(self, recorder: Recorder, losses: Tensor, count: int, direction: Direction) -> Settled | None:
        """What is to be contracted in a step, once its forward pass is over; None: it is unlike the one surveyed.

        Raises:
            UnsupportedModuleError: not every use of every parameter can be accounted for.
        """
        recorder.leave()
        settled: Settled | None = None
        if self.plan is not None and not self._too_few(count):  # how many was perhaps not known when the step began
            settled = self._settled(self.plan, recorder, losses, count)
            if settled is None:
                self._watchful = WATCHFUL_STEPS
        if settled is None and recorder.survey:
            if not _finite(losses):
                return None  # there would be nothing to see
            survey = Survey(
                recorder,
                losses,
                count,
                trainable=self._trainable,
                owners=self._owners,
                shared=self._shared,
                also=self._also,
                whole=self._whole,
                partial=self.partial,
                why_not=self._why_not,
                direction=direction,
            )
            try:
                self.plan, self._due = survey.plan(), False
            except UnlikeError:
                return None
            self.plan.modes = self._modes
            if self._last is not None:
                self.plan.keep(self._last, {call.module for call in recorder.wholes})
            self._last = self.plan
            settled = self._settled(self.plan, recorder, losses, count)
            if settled is not None:
                settled.surveyed, settled.sums = True, survey.sums
        if settled is None:
            self._leave_out()
            return None
        if not all(call.held for call in settled.wholes):
            return None  # what is checkpointed is called again from the next step on
        return settled

    def _too_few(self, count: int) -> bool:
        """Whether the plan was made on one example, of which nothing was to be told apart."""
        return self.plan is not None and self.plan.count == 1 < count

    def _leave_out(self) -> None:
        self.left_out += 1
        _log.info("A step is unlike the one that was surveyed: its contributions are left out")
        self._watchful = WATCHFUL_STEPS

    def _settled(self, plan: Plan, recorder: Recorder, losses: Tensor, count: int) -> Settled | None:
        try:
            layout = layout_of(recorder, losses, count, packed=plan.packed)
        except CoupledError:
            return None
        if layout is None:
            return None
        graph: Graph | None = None
        due = self._due and _finite(losses)
        taken = {p for block in plan.blocks.values() for p in block.parameters.values()}
        unused = set() if self.partial else self._unused(plan, taken)
        if due or unused or (plan.shared and count > 1):
            graph = Graph(losses, self._trainable)
            if not graph.opaque and not unused.isdisjoint(parameter for parameter, _ in graph.uses):
                return None  # they were not used when the plan was made
        sorted_now = plan.sorted_by_losses and count > 1 and _finite(losses)
        if sorted_now and self._crossed(plan, recorder, losses, layout, in_order):
            return None
        if due and graph is not None:
            if not self._holds(plan, recorder, graph, losses, layout):
                return None
            self._due = False
        observed: list[tuple[Observed, list[Node]]] = []

        def enters(call: Observed | Whole, *ends: tuple[Node, int]) -> bool:
            nonlocal graph
            graph = graph or Graph(losses, self._trainable)
            return any(graph.used(node, number, call.end)[1] for node, number in ends)

        for call in recorder.observed:
            module = call.layer.module
            claims = plan.claims.get(module)
            if not claims and taken.issuperset(_own(module)):
                continue
            spread: list[Node] | None = []
            if module in plan.shared and count > 1 and graph is not None:
                spread = graph.spread(call.source[0], call.shape, layout.copies)
            if claims and spread is not None and (spread or layout.rows(call.shape) is not None):
                observed.append((call, spread))
            elif enters(call, call.source[:2], call.outlet):
                return None  # it was not called, or otherwise, when the plan was made
        wholes = [call for call in recorder.wholes if call.module in plan.blocks]
        for whole in wholes:
            block = plan.blocks[whole.module]
            if whole.held and not block.rehearsed:
                if why := block.rehearse(whole):
                    self._why_not[whole.module] = why
                    return None
                block.rehearsed = True
            places = [y for place, y in whole.sources.items() if place in block.places]
            others = [y[:2] for place, y in whole.sources.items() if place not in block.places | block.silent]
            unclear = whole.changed() or any(layout.rows(shape) is None for _, _, shape in places)
            if unclear and enters(whole, *(y[:2] for y in places)):
                return None
            if others and enters(whole, *others):
                return None  # they did not when the plan was made
        return Settled(plan, layout, observed, wholes)

    def _unused(self, plan: Plan, taken: set[nn.Parameter]) -> set[nn.Parameter]:
        """The parameters that nothing accounts for, since they were not used in any step surveyed."""
        claimed = {parameter for claims in plan.claims.values() for parameter in claims}
        return {parameter for parameter in self._trainable if parameter not in claimed and parameter not in taken}

    def _crossed(
        self, plan: Plan, recorder: Recorder, losses: Tensor, layout: Layout, holds: Callable[[Tensor, Tensor], bool]
    ) -> bool:
        """Whether rows of what the model gives, in order, enter the losses of other examples."""
        if layout.owners is not None:
            return False
        outputs = [y for call in recorder.wholes if call.module in plan.heads for y in call.outputs.values()]
        return not all(holds(losses, y) for y in outputs if layout.rows(tuple(y.shape)) is not None)

    def _holds(self, plan: Plan, recorder: Recorder, graph: Graph, losses: Tensor, layout: Layout) -> bool:
        """Whether each use of each parameter lies in one call that accounts for it, and rows are whose they seem."""
        seldom = (
            self._refreshes & (self._refreshes - 1) == 0
        )  # after 1, 2, 4, 8 ...: it costs a pass through the losses
        if seldom and layout.count > 1 and self._crossed(plan, recorder, losses, layout, _own_alone):
            return False
        if graph.opaque or self.partial:
            return True
        spans = Spans(recorder.observed)
        answered = {module: set(block.parameters.values()) for module, block in plan.blocks.items()}
        for parameter, node in graph.uses:
            number = number_of(node)
            call = spans.at(number)
            times = int(call is not None and parameter in plan.claims.get(call.layer.module, ()))
            times += sum(
                parameter in answered[whole.module]
                for whole in recorder.wholes
                if whole.module in answered and whole.encloses(number)
            )
            if times != 1:
                return False
        return True


def _finite(losses: Tensor) -> bool:
    return bool(losses.detach().isfinite().all())


def _own_alone(losses: Tensor, y: Tensor) -> bool:
    return not others_touched(losses, y)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
