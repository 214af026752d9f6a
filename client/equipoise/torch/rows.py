"""Which row of a tensor belongs to which example."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """The owner of each row of a tensor.

    Attributes:
        count: number of examples B.
        owners: the example of each row, integers [R], where a row is one place in the leading dimensions; None: the
            first dimension holds the examples in order, one row or equally many rows for each.
    """

    count: int
    owners: Tensor | None = None

    def sums(self, values: Tensor) -> Tensor:
        """Per example the sum over its rows, in float32 or better: [B]."""
        dtype = precise(values.dtype)
        if self.owners is None:
            return values.reshape(self.count, -1).sum(1, dtype=dtype)
        return self._gathered(values.reshape(len(self.owners), -1).sum(1, dtype=dtype))

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """Per example the inner product of its rows in a and b, in float32 or better: [B]."""
        dtype = precise(a.dtype)
        rows = self.count if self.owners is None else len(self.owners)
        # vecdot would keep half precision; on a CPU it is four times faster than bmm and einsum.
        dots: Tensor = torch.linalg.vecdot(a.reshape(rows, -1).to(dtype), b.reshape(rows, -1).to(dtype))
        return dots if self.owners is None else self._gathered(dots)

    def spread(self, weights: Tensor, rows: int) -> Tensor:
        """The weight of each of the first `rows` places of a tensor that has these rows: [rows].

        Args:
            weights: float [B].
            rows: how many places; a multiple of the rows.
        """
        each = weights if self.owners is None else weights[self.owners]
        return each.repeat_interleave(rows // len(each))

    def weighted(self, values: Tensor, weights: Tensor) -> Tensor:
        """Values with the rows of example n multiplied by weights[n]."""
        rows = self.count if self.owners is None else len(self.owners)
        each = self.spread(weights, rows).to(values.dtype)
        return (values.reshape(rows, -1) * each[:, None]).reshape(values.shape)

    def touched(self, values: Tensor, examples: Tensor) -> Tensor:
        """Whether anything in the rows of some examples is not zero: bool, without dimensions.

        Args:
            values: a tensor with these rows.
            examples: bool [B].
        """
        rows = self.count if self.owners is None else len(self.owners)
        return (values.detach().reshape(rows, -1) != 0).any(1).logical_and(self.spread(examples, rows)).any()

    def _gathered(self, each: Tensor) -> Tensor:
        assert self.owners is not None
        return each.new_zeros(self.count).index_add_(0, self.owners, each)


@dataclass(slots=True)
class Layout:
    """Where the examples of one step lie in the tensors of its forward pass.

    Attributes:
        count: number of examples B.
        owners: of packed or paired examples the owner of each row of the model's output, in the shape of its leading
            dimensions; None: the first dimension of the output holds the examples.
        places: how many rows a tensor has whose first two or more dimensions, examples and tokens, are flattened.
    """

    count: int
    owners: Tensor | None = None
    places: set[int] = field(default_factory=set)

    @property
    def copies(self) -> int:
        """How often an output appears that is made once for the whole batch: the first dimension of the output."""
        return self.count if self.owners is None else len(self.owners)

    def note(self, shape: Shape) -> None:
        """Takes the shape of an output whose first dimension holds the examples."""
        if self.owners is None and len(shape) > 2 and shape[0] == self.count:
            self.places.update(math.prod(shape[:depth]) for depth in range(2, len(shape)))

    def rows(self, shape: Shape) -> Rows | None:
        """The rows of a tensor by its shape; None where the shape does not tell."""
        if self.count == 1:
            return Rows(1)
        if not shape or not math.prod(shape):
            return None
        if self.owners is None:
            # Routed tokens may be any number: rows in one dimension are examples' only if they are all of them.
            whole = shape[0] == self.count or (
                shape[0] % self.count == 0 and (len(shape) > 2 or shape[0] in self.places)
            )
            return Rows(self.count) if whole else None
        depth = self.owners.ndim
        if tuple(shape[:depth]) == tuple(self.owners.shape) or shape[0] == self.owners.numel():
            return Rows(self.count, self.owners.flatten())
        return None


def precise(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is better."""
    return torch.promote_types(dtype, torch.float32)
