"""Vectors in the space of a model's parameters, as a checkpoint keeps them: by name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from equipoise.torch.errors import DirectionError
from equipoise.torch.processes import unwrapped
from equipoise.torch.rows import precise


def named_vectors(model: nn.Module, vectors: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """The vectors by the names of their parameters; of a sharded one the part of this process."""
    return {
        name: _local(vectors[parameter])
        for name, parameter in unwrapped(model).named_parameters()
        if parameter in vectors
    }


def load_vectors(model: nn.Module, named: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The vectors by parameter again, in float32 or better and on its device.

    Raises:
        DirectionError: names or shapes are not those of this model.
    """
    parameters = dict(unwrapped(model).named_parameters())
    vectors = {}
    for name, vector in named.items():
        parameter = parameters.get(name)
        shape = None if parameter is None else _local(parameter).shape
        if parameter is None or vector.shape != shape:
            raise DirectionError(
                f"state['vectors'][{name!r}] of shape {tuple(vector.shape)}: must be a parameter of the model and of "
                f"its shape, {'which has none of this name' if shape is None else tuple(shape)}"
            )
        vectors[parameter] = _like(vector, parameter)
    return vectors


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def _like(vector: Tensor, parameter: Any) -> Tensor:
    vector = vector.to(device=parameter.device, dtype=precise(parameter.dtype))
    if not hasattr(parameter, "to_local"):
        return vector
    sharded: Tensor = type(parameter.data).from_local(
        vector,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return sharded
