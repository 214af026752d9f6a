"""Which rows of a module's tensors belong to which example, and how to tell examples apart that share one."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from equipoise.torch.errors import BatchShapeError

VERIFY = "FiniteDifferenceContributions does not look inside the model"


class Rows:
    """Gives every output of a module one row (or group of rows) per example.

    A position embedding is looked up once for all examples, and its gradient comes back summed over them. Such an
    output is expanded to one row per example, which changes no value.

    Args:
        shared: paths of embeddings whose one-dimensional indices are shared by all examples (positions).
    """

    def __init__(self, shared: Collection[str] = ()) -> None:
        self._shared = set(shared)
        self._own: set[str] = set()

    def expand(self, path: str, module: nn.Module, x: Tensor, y: Tensor, count: int) -> tuple[Tensor, list[int] | None]:
        """The output of a call with rows for each of `count` examples.

        Returns:
            The output, and the shape to which the input must be expanded to match; None: as it is.

        Raises:
            BatchShapeError: the rows cannot be given to examples.
        """
        if count == 1:
            return y, None
        if isinstance(module, nn.Embedding) and x.ndim == 1 and self._is_shared(path, x, count):
            return y.expand(count, *y.shape), [count, *x.shape]
        if y.shape[0] == count:
            return y, None
        if y.shape[0] == 1:
            return y.expand(count, *y.shape[1:]), [count, *x.shape[1:]]
        if y.ndim == 2 and y.shape[0] % count == 0:  # tokens of all examples in one dimension
            return y, None
        raise BatchShapeError(
            f"{path} ({type(module).__name__}) gave shape {tuple(y.shape)} for {count} examples: "
            f"the first dimension must be the examples; {VERIFY}"
        )

    def _is_shared(self, path: str, indices: Tensor, count: int) -> bool:
        """Whether one-dimensional indices are positions, the same for all examples, rather than one per example."""
        if path in self._shared or path in self._own:
            return path in self._shared
        length = indices.shape[0]
        # Waits for the device, which is why it is remembered.
        if not bool((indices == torch.arange(length, device=indices.device) + indices[:1]).all()):
            self._own.add(path)
            return False
        if length == count:
            raise BatchShapeError(
                f"{path} (Embedding) got {length} consecutive indices for {count} examples: give shared=[{path!r}] "
                "if they are positions, the same for all examples; otherwise shuffle the examples"
            )
        self._shared.add(path)
        return True
