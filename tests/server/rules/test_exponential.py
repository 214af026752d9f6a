import numpy as np
import torch

from equipoise_server.rules.exponential import exponential


def test_exponential_is_accurate_to_a_trillionth() -> None:
    values = np.linspace(-5, 5, 10_001)
    np.testing.assert_allclose(exponential(torch.from_numpy(values)).numpy(), np.exp(values), rtol=1e-12)
    wide = np.linspace(-40, 40, 10_001)
    np.testing.assert_allclose(exponential(torch.from_numpy(wide), squarings=11).numpy(), np.exp(wide), rtol=1e-12)
    for squarings in (8, 11):
        assert exponential(torch.zeros(1, dtype=torch.float64), squarings=squarings).item() == 1.0
