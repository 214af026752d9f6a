"""Age and size of the target direction: what the defaults rest on."""

import pytest

from tests.benchmarks import direction as benchmark


@pytest.mark.slow
def test_size_comes_first_and_beyond_ten_steps_age_matters_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank correlation with the direction of a thousand target sequences at the same step."""
    monkeypatch.setattr(benchmark, "TIMES", (150,))
    monkeypatch.setattr(benchmark, "AGES", (0, 10, 50))
    monkeypatch.setattr(benchmark, "SIZES", (4, 64))
    runs = [benchmark.correlations(seed) for seed in range(2)]
    found = {key: sum(run[key][0] for run in runs) / len(runs) for key in runs[0]}
    assert found[0, 64] > 0.85
    assert found[10, 64] > 0.6
    assert found[10, 64] > found[0, 4] + 0.05  # an old direction of many beats a fresh one of few
    assert found[0, 64] > found[10, 64] > found[50, 64] - 0.05
    assert found[10, 64] - found[50, 64] < found[0, 64] - found[10, 64] + 0.05
