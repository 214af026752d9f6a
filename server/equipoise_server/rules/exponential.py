"""The exponential from sums and products alone, each correctly rounded: one result on every machine."""

from equipoise_server.rules.arrays import Array

_SQUARINGS = 8
_TERMS = 6


def exponential(values: Array, *, squarings: int = _SQUARINGS) -> Array:
    """exp of float64 values within 1e-12, relative; one result on every device, thread and position.

    Library functions differ between processors, and between the vector body and the tail of one array: here
    exp(x) = exp(x/2^s)^(2^s). The s = 8 `squarings` are for values in [-5, 5], 11 for [-40, 40].
    """
    small = values * 2.0**-squarings
    result = small * (1.0 / _TERMS) + 1.0
    for term in range(_TERMS - 1, 0, -1):
        result = result * (small * (1.0 / term)) + 1.0
    for _ in range(squarings):
        result = result * result
    return result
