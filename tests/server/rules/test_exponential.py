import numpy as np
import torch

from equipoise_server.rules.exponentiated_gradient import exponential


def test_exponential_is_accurate_to_a_trillionth() -> None:
    values = np.linspace(-5, 5, 10_001)
    np.testing.assert_allclose(exponential(torch.from_numpy(values)).numpy(), np.exp(values), rtol=1e-12)
    assert exponential(torch.zeros(1, dtype=torch.float64)).item() == 1.0
