"""The noise of arXiv 2402.17759 on sequences of tokens (appendix D)."""

import numpy as np
from numpy.typing import NDArray

PADDING = -1
"""Stands where a sequence has ended: seen as token 0 by what comes after it, and never predicted."""

PERTURBATIONS = 20
"""Iterations on each perturbed sequence (arXiv 2402.17759, appendix D)."""


def perturb(tokens: NDArray[np.int64], *, vocabulary: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """The paper's noise: `PERTURBATIONS` times a token [L] is replaced, the last one deleted, or one repeated.

    The length stays: what grows beyond it is cut off, what is missing is `PADDING`.
    """
    noisy = tokens.tolist()
    for kind in generator.integers(3, size=PERTURBATIONS):
        place = int(generator.integers(len(noisy)))
        if kind == 0:
            noisy[place] = int(generator.integers(vocabulary))
        elif kind == 1 and len(noisy) > 2:  # one token is left to predict
            noisy.pop()
        else:
            noisy.insert(place, noisy[place])
    noisy = noisy[: len(tokens)]
    return np.array([*noisy, *[PADDING] * (len(tokens) - len(noisy))], dtype=np.int64)
