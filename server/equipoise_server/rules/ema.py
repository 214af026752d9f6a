"""The moving average of the signal: the statistic of most rules."""

from collections.abc import Callable

from equipoise_server.rules.arrays import Array, namespace


def moving_average(decay: float) -> Callable[[Array, Array, Array], Array]:
    """How a visit moves it: decay·old + (1-decay)·new, or `new` where it is the first one.

    Three roundings per row, none shared between rows.
    """

    def advance(old: Array, new: Array, first: Array) -> Array:
        return namespace(old).where(first, new, old * decay + new * (1.0 - decay))

    return advance
