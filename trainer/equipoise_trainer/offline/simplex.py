"""Euclidean projection onto the simplex."""

import numpy as np
from numpy.typing import NDArray


def project(point: NDArray[np.float64]) -> NDArray[np.float64]:
    """The point of {γ ≥ 0, Σγ = 1} that is nearest to `point` [N]; exact zeros where γ = 0.

    By sorting (Held, Wolfe and Crowder 1974): γ = max(point − τ, 0), where the K largest entries stay positive and
    τ = (their sum − 1)/K.
    """
    descending = np.sort(point)[::-1]
    excess = np.cumsum(descending) - 1.0
    counts = np.arange(1, len(point) + 1)
    kept = int(np.count_nonzero(descending * counts > excess))
    projected: NDArray[np.float64] = np.maximum(point - excess[kept - 1] / kept, 0.0)
    return projected
