"""Quiet libraries."""

import pytest


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """Progress bars and model cards of other libraries."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
