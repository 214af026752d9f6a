"""What can go wrong between a model and its contributions; all are `equipoise.EquipoiseError`."""

from collections.abc import Sequence

from torch import nn

from equipoise.errors import EquipoiseError

NAMED = 12
"""How many modules a message names."""


class UnsupportedModuleError(EquipoiseError, TypeError):
    """A method cannot see through a module that has trainable parameters.

    Attributes:
        modules: (path, module) of every such module.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], *, why: str, instead: str) -> None:
        named = ", ".join(f"{path or 'the model itself'} ({type(module).__name__})" for path, module in modules[:NAMED])
        if len(modules) > NAMED:
            named += f" and {len(modules) - NAMED} more"
        super().__init__(f"{named}: {why}; {instead}")
        self.modules = tuple(modules)


class CaptureError(EquipoiseError, RuntimeError):
    """A capture was used in a way that cannot give right contributions; the message says what to do."""


class DirectionError(EquipoiseError, ValueError):
    """A target direction cannot be computed from what was given."""


class ContributionsDifferError(EquipoiseError):
    """Contributions differ from those of per-example gradients: a method does not fit the model."""
