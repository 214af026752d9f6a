"""Contributions from sketches of gradients, such as random projections that the trainer makes."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equipoise_server.rules.sums import spans

CHUNK_VALUES = 1 << 20
"""Sketch values multiplied at a time: temporaries stay at a few times 8 MiB."""


def sketched_contributions(
    sketches: NDArray[np.floating[Any]], target: NDArray[np.floating[Any]], *, device: torch.device
) -> NDArray[np.float32]:
    """Inner products of each sketch with the target's, computed on the device in float64 and rounded once.

    Products of two float32 are exact in float64, and they are added in halves, each addition of two values correctly
    rounded: one result on every device, whatever the number of threads and what else is in the batch.

    Args:
        sketches: float16 or float32 [B, k], k >= 1.
        target: float16 or float32 [k].
        device: of the policy's tables.

    Returns:
        float32 [B]; infinite where float32 cannot hold it, NaN where a sketch is not finite.
    """
    vector = torch.from_numpy(target.astype(np.float64)).to(device)
    parts = []
    for span in spans(len(sketches), rows=max(1, CHUNK_VALUES // len(target))):
        products = torch.from_numpy(np.array(sketches[span])).to(device).double() * vector
        parts.append(_row_sums(products).float().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums over the columns, by adding the right half to the left one until a single column is left."""
    while (width := values.shape[1]) > 1:
        half = width // 2
        folded = values[:, :half] + values[:, half : 2 * half]
        values = torch.cat([folded, values[:, 2 * half :]], dim=1) if width % 2 else folded
    return values[:, 0]
