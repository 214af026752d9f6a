"""The survey of a step: who can account for which parameter, found out from its graph and two backward passes."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from equipoise.torch.blocks import Block
from equipoise.torch.calls import Observed, Recorder, Source, Spans, Whole
from equipoise.torch.capture import Sums
from equipoise.torch.errors import CaptureError, UnsupportedModuleError
from equipoise.torch.graph import Graph, Node, number_of
from equipoise.torch.identity import inner_product
from equipoise.torch.kinds import BY_DIFFERENCES, INSTEAD, check_alone
from equipoise.torch.layers import Direction
from equipoise.torch.owners import CoupledError, half_of
from equipoise.torch.plan import Plan, layout_of
from equipoise.torch.rows import Layout, Rows

_log = logging.getLogger(__name__)

OUTSIDE = (
    "its parameters enter the losses outside of the modules, as a penalty on them does (weight decay of the optimizer "
    "would be no part of the losses)"
)
COUPLED = "its rows enter the losses of several examples, as in-batch negatives do"
ESCAPES = (
    "something made within it is used outside of it, other than by its output, as where the losses hold a gradient of "
    "the model"
)
REENTRANT = "is called under activation checkpointing with use_reentrant=True, which hides what it does"

Tested: TypeAlias = tuple[Node, int, tuple[int, ...], Rows]
"""A gradient to look at: node, number of its output, shape and rows."""


class UnlikeError(Exception):
    """A step that nothing can be told from."""


class Survey:
    """Makes a plan from one recorded step.

    Args:
        recorder: the calls of all modules.
        losses: the loss of each example, with its graph.
        count: number of examples.
        trainable: the parameters to account for.
        owners: path and module of each parameter.
        shared: paths of modules that are said to be shared by all examples.
        also: types of modules that are taken as a whole.
        whole: whether modules may be taken as a whole.
        partial: whether only what the calls of modules with a formula use counts.
        why_not: modules that cannot be called again, and why; more are added.
        direction: V.

    Attributes:
        sums: what the contributions of some of the examples add up to.
    """

    def __init__(
        self,
        recorder: Recorder,
        losses: Tensor,
        count: int,
        *,
        trainable: list[nn.Parameter],
        owners: dict[nn.Parameter, tuple[str, nn.Module]],
        shared: set[str],
        also: tuple[type[nn.Module], ...],
        whole: bool,
        partial: bool,
        why_not: dict[nn.Module, str],
        direction: Direction,
    ) -> None:
        self._recorder = recorder
        self._losses = losses
        self._count = count
        self._trainable = trainable
        self._owners = owners
        self._said_shared = shared
        self._also = also
        self._whole = whole
        self._partial = partial
        self._direction = direction
        self.sums: Sums = []
        self._graph = Graph(losses, trainable)
        self._spans = Spans(recorder.observed)
        self._heads = [call for call in recorder.wholes if call.parent is None and call.outputs]
        self._layout = Layout(count)
        self._shared: dict[Observed, list[Node]] = {}
        self._mixed: set[Observed | tuple[Whole, int]] = set()
        self._silent: set[Observed | tuple[Whole, int]] = set()
        self._why_not = why_not
        self._usable: dict[Whole, bool] = {}
        self._parameters: dict[nn.Module, set[nn.Parameter]] = {}
        self._anchored: set[Node] = set()

    def plan(self) -> Plan:
        """The plan.

        Raises:
            UnsupportedModuleError: there is none; names what stands in the way.
            CaptureError: no module was called.
            UnlikeError: no loss depends on the model.
        """
        self._check_modules()
        self._anchored = self._graph.anchored(self._ends())
        if self._count > 1:
            self._lay_out()
        elif not self._graph.opaque:
            self._mix({})
        claims, blocks = self._assigned()
        self._claim_unused(claims, blocks)
        shared = {call.layer.module for call in self._shared if claims.get(call.layer.module)}
        if blocks:
            named = [f"{block.path or 'the model itself'} ({type(block.module).__name__})" for block in blocks.values()]
            _log.info(
                "%d modules are differentiated by forward mode, at about two more of their forward passes a step: %s%s",
                len(named),
                ", ".join(named[:4]),
                ", ..." if len(named) > 4 else "",
            )
        if self._partial:
            self.sums.clear()
        return Plan(
            count=self._count,
            claims=claims,
            blocks=blocks,
            shared=shared,
            sorted_by_losses=self._sorted_by_losses(),
            heads={call.module: call.path for call in self._heads},
            packed=self._layout.owners is not None,
            coarse=any(call.coarse for call in self._recorder.wholes),
            single=any(call.single for call in self._recorder.wholes),
        )

    def _check_modules(self) -> None:
        if not self._heads and self._graph.uses:
            raise CaptureError(
                "no module was called in the `with` block: the forward pass belongs into it, through the modules "
                f"themselves; where the whole of it is compiled, {INSTEAD}"
            )
        check_alone([(call.path, call.module) for call in self._recorder.wholes], count=self._count)
        if self._graph.compiled:
            self._refuse_compiled()

    # Where the examples lie

    def _lay_out(self) -> None:
        if any(shape[:1] != (self._count,) for call in self._heads for _, _, shape in self._entering(call)):
            self._pack()
        else:
            self._layout = layout_of(self._recorder, self._losses, self._count, packed=False) or self._layout
        if self._graph.opaque:
            return  # no backward pass but the one of the training goes through it
        self._test()
        if self._layout.owners is None and self._mixed_heads():
            self._pack()
            self._test()
        if mixed := self._mixed_heads():
            self._refuse_coupling(mixed)
        self._find_shared()

    def _pack(self) -> None:
        try:
            layout = layout_of(self._recorder, self._losses, self._count, packed=True)
        except CoupledError:
            self._refuse_coupling(self._heads)
        if layout is None:
            raise UnlikeError
        in_order = torch.arange(self._count, device=self._losses.device)
        if layout.owners is not None and torch.equal(layout.owners, in_order):  # another output is not by examples
            layout = layout_of(self._recorder, self._losses, self._count, packed=False) or layout
        self._layout = layout

    def _entering(self, call: Whole) -> list[Source]:
        """The outputs of a call that enter the losses."""
        return [source for place, source in call.sources.items() if self._enters(call, place, source)]

    def _enters(self, call: Whole, place: int, source: Source) -> bool:
        # Replicated models pass all outputs on, of which those that nobody uses have gradients of zeros.
        return self._graph.used(*source[:2], call.end)[1] and (call, place) not in self._silent

    def _ends(self) -> list[Node]:
        """The nodes of what enters the losses."""
        return [source[0] for call in self._heads for source in self._entering(call)]

    def _sorted_by_losses(self) -> bool:
        """Whether the losses pick rows of what the model gives, perhaps others in the next step."""
        return not self._graph.anchored([self._losses.grad_fn]).issuperset(self._ends())

    def _test(self) -> None:
        """Finds the outputs whose rows enter the losses of other examples than their own."""
        tested: dict[Observed | tuple[Whole, int], Tested] = {}
        for observed in self._recorder.observed:
            rows = self._layout.rows(observed.shape)
            if rows is not None:
                tested[observed] = (*observed.source, rows)
        for call in self._recorder.wholes:
            for place, source in call.sources.items():
                tested[call, place] = (*source, self._layout.rows(source[2]) or Rows(1))
        mixed = self._mix(tested)
        rowless = {key for key, test in tested.items() if test[3].count == 1}
        self._mixed, self._silent = mixed - rowless, rowless - mixed

    def _mix(self, tested: dict[Any, Tested]) -> set[Any]:
        """Which gradients are not zero where they should be: a loss depends on another example."""
        self.sums.clear()
        half = half_of(self._count, self._losses)
        mixed: dict[Any, Tensor] = {}

        def look(key: Any, test: Tested, others: Tensor) -> Callable[[Any], None]:
            _, number, shape, rows = test

            def see(gradients: Any) -> None:
                if gradients[number] is not None:
                    whose = others if rows.count == self._count else torch.ones_like(others[:1])
                    touched = rows.touched(gradients[number].reshape(shape), whose)
                    mixed[key] = mixed[key] | touched if key in mixed else touched

            return see

        for chosen in (half, ~half):
            handles = [test[0].register_prehook(look(key, test, ~chosen)) for key, test in tested.items()]
            try:
                gradients = torch.autograd.grad(
                    self._losses, self._trainable, chosen.to(self._losses), retain_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                if "donated buffers" not in str(error):  # which compiled code gives up in its first backward pass
                    raise
                self._refuse_compiled()
            finally:
                for handle in handles:
                    handle.remove()
            self.sums.append((chosen, inner_product(self._direction, self._trainable, gradients)))
        return {key for key, touched in mixed.items() if bool(touched)}

    def _mixed_heads(self) -> list[Whole]:
        return [call for call in self._heads if any((call, place) in self._mixed for place in call.sources)]

    def _find_shared(self) -> None:
        candidates: dict[tuple[Observed, Node], Tested] = {}
        found: dict[Observed, list[Node]] = {}
        for call in self._recorder.observed:
            rowless = self._layout.rows(call.shape) is None or call in self._mixed
            if rowless or call.layer.path in self._said_shared:
                for node in self._graph.spread(call.source[0], call.shape, self._layout.copies) or ():
                    shape = tuple(node._input_metadata[0].shape)
                    rows = self._layout.rows(shape)
                    if rows is not None:
                        found.setdefault(call, []).append(node)
                        candidates[call, node] = (node, 0, shape, rows)
        if candidates:
            mixed = self._mix(candidates)
            self._shared = {
                call: nodes for call, nodes in found.items() if not any((call, node) in mixed for node in nodes)
            }

    # Who accounts for what

    def _assigned(self) -> tuple[dict[nn.Module, set[nn.Parameter]], dict[nn.Module, Block]]:
        places: dict[nn.Parameter, list[Node]] = {}
        for parameter, node in self._graph.uses:
            if not self._partial or self._spans.at(number_of(node)) is not None:
                places.setdefault(parameter, []).append(node)
        while True:
            claims: dict[nn.Module, set[nn.Parameter]] = {}
            blocks: dict[nn.Module, Block] = {}
            refused: dict[nn.Parameter, str] = {}
            for parameter, nodes in places.items():
                home = self._home(parameter, nodes)
                if isinstance(home, str):
                    refused[parameter] = home
                    continue
                for module in home[0]:
                    claims.setdefault(module, set()).add(parameter)
                for module, path in home[1].items():
                    blocks.setdefault(module, Block(path, module)).answer_for(parameter)
            if refused:
                self._refuse(refused)
            if self._rehearsed(blocks.values()):
                self._claim_hidden(claims)
                return claims, blocks

    def _home(self, parameter: nn.Parameter, nodes: list[Node]) -> tuple[set[nn.Module], dict[nn.Module, str]] | str:
        """The modules with a formula and those taken as a whole that account for a parameter, or why there are none."""
        layers: set[nn.Module] = set()
        wholes: dict[nn.Module, str] = {}
        for node in nodes:
            call, around = self._spans.at(number_of(node)), self._around(node)
            alone = call is not None and sum(self._spans.at(number_of(other)) is call for other in nodes) == 1
            if call is not None and alone and self._formula_fits(call, parameter):
                layers.add(call.layer.module)
                continue
            fitting = next((whole for whole in around if self._fits(whole, parameter)), None)
            if fitting is None:
                return self._reason(around)
            wholes[fitting.module] = fitting.path
        if self._once(layers, wholes, nodes):
            return layers, wholes
        outermost = [call for call in self._heads if any(call.encloses(number_of(node)) for node in nodes)]
        wholes = {call.module: call.path for call in outermost}
        if self._once(set(), wholes, nodes) and all(self._fits(call, parameter) for call in outermost):
            return set(), wholes
        return self._reason(outermost)

    def _around(self, node: Node) -> list[Whole]:
        """The calls in which a node was made, from the innermost on; those to be taken as a whole first."""
        number = number_of(node)
        calls = [call for call in reversed(self._recorder.wholes) if call.encloses(number)]
        chosen = [call for call in calls if isinstance(call.module, self._also)]
        return [*chosen, *(call for call in calls if call not in chosen)]

    def _once(self, layers: set[nn.Module], wholes: dict[nn.Module, str], nodes: list[Node]) -> bool:
        """Whether each node lies in exactly one call of the modules."""
        for node in nodes:
            call = self._spans.at(number_of(node))
            times = int(call is not None and call.layer.module in layers)
            if times + sum(whole.module in wholes for whole in self._around(node)) != 1:
                return False
        return True

    def _formula_fits(self, call: Observed, parameter: nn.Parameter) -> bool:
        if not any(own is parameter for own in call.layer.module.parameters(recurse=False)):
            return False
        if any(isinstance(whole.module, self._also) for whole in self._around(call.source[0])):
            return False
        if self._graph.escapes(call.start, call.end, {call.source[0], call.outlet[0]}):
            return False
        if self._count == 1 or call in self._shared:
            return True
        if call in self._mixed or call.source[0] not in self._anchored:
            return False
        return self._layout.rows(call.shape) is not None

    def _fits(self, call: Whole, parameter: nn.Parameter) -> bool:
        """Whether a call can be taken as a whole."""
        if not self._whole or call.module in self._why_not:
            return False
        if call.module not in self._parameters:
            self._parameters[call.module] = set(call.module.parameters())
        if parameter not in self._parameters[call.module]:
            return False
        if call not in self._usable:
            self._usable[call] = self._is_usable(call)
        return self._usable[call]

    def _is_usable(self, call: Whole) -> bool:
        if call.end < 0 or call.changed():
            return False
        for place, (node, number, shape) in call.sources.items():
            within, after = self._graph.used(node, number, call.end)
            if not after or (call, place) in self._silent:
                continue
            if within:
                return False  # its gradient would count what another output passes on
            if (call, place) in self._mixed or self._layout.rows(shape) is None:
                return False
            if self._count > 1 and node not in self._anchored:
                return False
        return not self._escapes(call)

    def _escapes(self, call: Whole) -> bool:
        return self._graph.escapes(call.start, call.end, {node for node, _, _ in call.sources.values()})

    def _rehearsed(self, blocks: Iterable[Block]) -> bool:
        """Whether all can be called again; those that cannot are remembered."""
        failed = {}
        for block in blocks:
            for call in self._recorder.wholes:
                if call.module is block.module and block.module not in failed:
                    block.places.update(p for p, y in call.sources.items() if self._enters(call, p, y))
                    block.silent.update(p for p in call.sources if (call, p) in self._silent)
                    if call.held and (why := block.rehearse(call)):
                        failed[block.module] = why
                    block.rehearsed |= call.held
        self._why_not.update(failed)
        return not failed

    def _reason(self, around: list[Whole]) -> str:
        if not around:
            return OUTSIDE
        for call in around:
            if call.module in self._why_not:
                return self._why_not[call.module]
        if not self._whole:
            return "this method has no formula for it"
        if self._escapes(around[-1]):
            return ESCAPES
        coupled = any((call, place) in self._mixed for call in around[-1:] for place in call.sources)
        return COUPLED if coupled else "no module around it gives rows of its own for each example"

    def _claim_hidden(self, claims: dict[nn.Module, set[nn.Parameter]]) -> None:
        """Under reentrant checkpointing the graph does not show what is used: formulas are taken at their word."""
        used = {parameter for parameter, _ in self._graph.uses}
        refused = {}
        for module in self._recorder.hidden if self._graph.opaque else ():
            own = {p for p in module.parameters(recurse=False) if p.requires_grad} - used
            if module in self._recorder.layers:
                claims.setdefault(module, set()).update(own)
            else:
                refused.update(dict.fromkeys(own, f"{REENTRANT}: use use_reentrant=False"))
        if refused:
            self._refuse(refused)

    def _claim_unused(self, claims: dict[nn.Module, set[nn.Parameter]], blocks: dict[nn.Module, Block]) -> None:
        """Experts that had nothing to do in this step are accounted for by the block that they are part of."""
        claimed = {p for own in claims.values() for p in own} | {p for p, _ in self._graph.uses}
        for block in sorted(blocks.values(), key=lambda block: -len(block.path)):
            for parameter in block.module.parameters():
                if parameter.requires_grad and parameter not in claimed:
                    claimed.add(parameter)
                    block.answer_for(parameter)

    # Refusals

    def _refuse(self, refused: dict[nn.Parameter, str]) -> NoReturn:
        why = next(iter(refused.values()))
        modules = dict(self._owners[parameter] for parameter in self._trainable if refused.get(parameter) == why)
        again = why in self._why_not.values()  # what cannot be differentiated in forward mode here cannot there either
        raise UnsupportedModuleError(list(modules.items()), why=why, instead=BY_DIFFERENCES if again else INSTEAD)

    def _refuse_compiled(self) -> NoReturn:
        modules = {call.path: call.module for call in self._heads}
        why = "a part of it is compiled and runs no hooks"
        raise UnsupportedModuleError(list(modules.items()), why=why, instead=INSTEAD)

    def _refuse_coupling(self, calls: list[Whole]) -> NoReturn:
        modules = {call.path: call.module for call in calls}
        raise UnsupportedModuleError(list(modules.items()), why=COUPLED, instead=INSTEAD)
