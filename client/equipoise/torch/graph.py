"""The autograd graph of a forward pass: where parameters are used, and what uses an output."""

import sys
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

Node: TypeAlias = Any
"""A `torch.autograd.graph.Node`."""

# Each passes a gradient on as it is, up to its shape.
_PLAIN = {
    "AddBackward0",
    "CloneBackward0",
    "ExpandBackward0",
    "RepeatBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "ToCopyBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
    "AliasBackward0",
    "ViewAsBackward0",
}

# Each takes some rows of all that it is given.
_PICKING = {"GatherBackward0", "IndexBackward0", "IndexSelectBackward0", "MaskedSelectBackward0", "TakeBackward0"}
# Each puts rows somewhere into its first argument, whose own rows stay where they are.
_PUTTING = {
    "IndexAddBackward0",
    "IndexCopyBackward0",
    "IndexPutBackward0",
    "IndexPutImplBackward0",
    "MaskedScatterBackward0",
    "ScatterAddBackward0",
    "ScatterBackward0",
    "ScatterReduceBackward0",
}


class Graph:
    """The graph behind the losses of a step.

    Attributes:
        uses: (parameter, node) of every place where a parameter enters; a cast that autocast keeps for several places
            counts once for each.
        consumers: by node the nodes that use its output.
        opaque: some part is hidden by activation checkpointing with `use_reentrant=True`.
        compiled: a parameter enters something that was compiled.
    """

    def __init__(self, losses: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        self.uses: list[tuple[nn.Parameter, Node]] = []
        self.consumers: dict[Node, list[Node]] = {}
        self.opaque = self.compiled = False
        wanted = {id(parameter): parameter for parameter in parameters}
        casts: dict[Node, nn.Parameter] = {}
        waiting = [losses.grad_fn]
        seen = set(waiting)
        root = get_gradient_edge(losses)
        self._users: dict[tuple[Node, int], list[int]] = {(root.node, root.output_nr): [sys.maxsize]}
        self._latest: dict[Node, int] = {root.node: -1}
        while waiting:
            node: Node = waiting.pop()
            name = node.name()
            self.opaque |= name == "CheckpointFunctionBackward"
            for following, number in node.next_functions:
                if following is None:
                    continue
                self._users.setdefault((following, number), []).append(number_of(node))
                self._latest[following] = max(self._latest.get(following, -1), number_of(node))
                parameter = wanted.get(id(getattr(following, "variable", None)))
                if parameter is not None:
                    if name == "ToCopyBackward0":
                        casts[node] = parameter
                    else:
                        self.uses.append((parameter, node))
                    self.compiled |= name.startswith("CompiledFunction")
                self.consumers.setdefault(following, []).append(node)
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
        for cast, parameter in casts.items():
            self.uses.extend((parameter, node) for node in self.consumers.get(cast, ()))
        self._casts = casts
        self._nodes = sorted(self._latest, key=number_of)
        self._numbers = [number_of(node) for node in self._nodes]

    def used(self, node: Node, number: int, end: int) -> tuple[bool, bool]:
        """Whether an output of a node is used before a position of the forward pass, and whether after it."""
        users = self._users.get((node, number), ())
        return any(user < end for user in users), any(user >= end for user in users)

    def escapes(self, start: int, end: int, outputs: set[Node]) -> bool:
        """Whether something made in a span of the forward pass is used after it, other than by its outputs.

        Args:
            start: `position` before the span.
            end: `position` after it.
            outputs: the nodes of the outputs.
        """
        made = self._nodes[bisect_left(self._numbers, start) : bisect_left(self._numbers, end)]
        return any(self._latest[node] >= end and node not in outputs and node not in self._casts for node in made)

    def anchored(self, starts: Iterable[Node]) -> set[Node]:
        """The nodes whose rows reach those of some nodes by a way on which none are picked by an index.

        Which rows an index picks differs from step to step: where it lies on all ways, as around routed experts, one
        step does not tell whose the rows are in the next.

        Args:
            starts: the nodes that are reached.
        """
        found = set(starts)
        waiting = list(found)
        while waiting:
            node = waiting.pop()
            passed = node.next_functions
            if node.name() in _PICKING and _picks_rows(node):
                passed = ()
            elif node.name() in _PUTTING and _picks_rows(node):
                passed = passed[:1]
            for following, _ in passed:
                if following is not None and following not in found:
                    found.add(following)
                    waiting.append(following)
        return found

    def spread(self, node: Node, shape: tuple[int, ...], count: int) -> list[Node] | None:
        """Where an output that all examples share is first given to each of them.

        Args:
            node: the node of the output.
            shape: its shape.
            count: number of examples.

        Returns:
            Nodes whose gradient has one copy of the output's gradient for each example; None: there is a use of
            another kind.
        """
        found: list[Node] = []
        waiting = [node]
        while waiting:
            for user in self.consumers.get(waiting.pop(), ()):
                if user.name() not in _PLAIN or len(user._input_metadata) != 1 or getattr(user, "_saved_alpha", 1) != 1:
                    return None
                given = tuple(user._input_metadata[0].shape)
                if given[:1] == (count,) and _squeezed(given[1:]) == _squeezed(shape):
                    found.append(user)
                elif _squeezed(given) == _squeezed(shape):
                    waiting.append(user)
                else:
                    return None
        return found or None


def source(y: Tensor) -> tuple[Node, int]:
    """The node, and the number of its output, where the gradient of y arrives whatever is done to y afterwards.

    What a module returns is often a view: of a matrix of all rows, say. A change in place gives the view a new history
    that begins at its base.
    """
    base = y._base
    same = base is not None and base.requires_grad and base.numel() == y.numel()
    if base is not None and same and base.is_contiguous() and y.is_contiguous():
        y = base
    edge = get_gradient_edge(y)
    return edge.node, edge.output_nr


def position() -> int:
    """How far the forward pass of this thread has got: the number of the node that is made next."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def number_of(node: Node) -> int:
    """The place of a node in the forward pass, to be compared with `position`; -1: a leaf, which has none."""
    number: int = node._sequence_nr()
    return number if number < sys.maxsize else -1


def _picks_rows(node: Node) -> bool:
    """Whether an index picks rows, rather than elements of each row, as `logits[torch.arange(B), last]` does."""
    dim, shape = getattr(node, "_saved_dim", None), node._input_metadata[0].shape
    if dim is not None:
        return bool((dim - (1 << 64) if dim >> 63 else dim) % max(1, len(shape)) == 0)
    indices = getattr(node, "_saved_indices", None)
    if not indices:
        return True
    first, rest = indices[0], [index for index in indices[1:] if index is not None]
    if first is None or not rest:
        return first is not None
    in_order = torch.arange(first.numel(), device=first.device)
    return first.dtype == torch.bool or not torch.equal(first.flatten(), in_order)


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)
