"""Two processes, whatever shares a mixture out among them, draw one sequence under weights that they agree on."""

from itertools import chain
from typing import Any

import pytest
import torch

from tests.client.torch import two_mixtures
from tests.client.torch.mixtures import NAMES
from tests.client.torch.two_mixtures import BATCH, EVERY, EXPLORED, TOTAL, mixture_of
from tests.pairs import run_pair


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixtures")
    run_pair(two_mixtures.process, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """What one process draws."""
    mixture = mixture_of(0)
    return [mixture.dataset[place][1] for place in mixture]


def interleaved(parts: list[list[Any]], count: int = 1) -> list[Any]:
    """The processes' rows in turn, so many at a time."""
    chunks = [[part[start : start + count] for start in range(0, len(part), count)] for part in parts]
    return list(chain.from_iterable(chain.from_iterable(zip(*chunks, strict=True))))


@pytest.mark.parametrize("way", ["plain", "workers", "lightning"])
def test_processes_take_turns_in_one_sequence(results: list[dict[str, Any]], alone: list[str], way: str) -> None:
    assert interleaved([result[way] for result in results]) == alone
    assert [result["length"] for result in results] == [TOTAL // 2 // BATCH] * 2


def test_accelerate_shares_out_batches_of_the_same_sequence(results: list[dict[str, Any]], alone: list[str]) -> None:
    assert interleaved([result["accelerate"] for result in results], BATCH) == alone
    assert [result["accelerate, length"] for result in results] == [TOTAL // 2 // BATCH] * 2


def test_epochs_end_together_with_their_sources(results: list[dict[str, Any]]) -> None:
    """Streams whose length the first process finds out, also in the epoch after that."""
    mixture = mixture_of(0, ends="drop")
    for epoch in range(2):
        rows = [mixture.dataset[place][1] for place in mixture]
        assert len(rows) == 100
        assert interleaved([result["ending"][epoch] for result in results]) == rows


def test_one_process_may_read_for_both(results: list[dict[str, Any]], alone: list[str]) -> None:
    found = interleaved([result["dispatched"] for result in results], BATCH)
    assert found == [NAMES.index(row.split()[0]) * 1000 + int(row.split()[1]) for row in alone]


def test_the_first_process_asks_for_all(results: list[dict[str, Any]]) -> None:
    assert [result["reads"] for result in results] == [-(-TOTAL // EVERY), 0]
    shares = [
        {name: value for name, value in result["shares"].items() if "fallbacks" not in name} for result in results
    ]
    assert shares[0] == shares[1]


def test_processes_explore_together(results: list[dict[str, Any]], alone: list[str]) -> None:
    mixture = mixture_of(0, explore=EXPLORED)
    rows = [mixture.dataset[place][1] for place in mixture]
    assert rows != alone
    assert interleaved([result["exploring"] for result in results]) == rows
    assert [result["exploring, reads"] for result in results] == [-(-TOTAL // EVERY) - -(-EXPLORED // EVERY), 0]


def test_processes_go_on_in_mid_epoch_and_so_does_one_alone(results: list[dict[str, Any]], alone: list[str]) -> None:
    parts = [result["resumed"] for result in results]
    assert interleaved([part["before"] + part["after"] for part in parts]) == alone
    single = mixture_of(0)
    client: Any = single.client
    client.version = len(parts[0]["state"]["agreed_later"])
    single.load_state_dict(parts[1]["state"])
    assert [single.dataset[place][1] for place in single] == alone[2 * len(parts[0]["before"]) :]


def test_data_that_differ_among_processes_are_refused(results: list[dict[str, Any]]) -> None:
    assert results[0]["said"] == ""
    assert "sources['a'] = '10 examples': has 9 in the first process: must be the same in all" in results[1]["said"]
