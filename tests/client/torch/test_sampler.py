"""Ids come as often as their weights say, whatever happens to the server and to the job."""

import threading
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from equipoise import PolicyClient
from equipoise.errors import AccessDeniedError, InvalidRequestError, PolicyNotFoundError, UnavailableError
from equipoise.testing import serve
from equipoise.torch import WeightedSampler

N = 40


class Urn:
    """Draws by weight as a server does, in this process."""

    def __init__(self, weights: NDArray[np.float64] | None = None) -> None:
        self.weights = np.ones(N) if weights is None else weights
        self.fails: Exception | None = None
        self.speaking = threading.Event()
        self.speaking.set()
        self.calls: list[tuple[int, int | None]] = []

    def sample_examples(
        self, count: int, *, with_replacement: bool = True, seed: int | None = None
    ) -> NDArray[np.uint64]:
        assert with_replacement
        self.calls.append((count, seed))
        self.speaking.wait()
        if self.fails is not None:
            raise self.fails
        shares = self.weights / self.weights.sum()
        return np.random.default_rng(seed).choice(len(shares), count, p=shares).astype(np.uint64)


def first_half() -> NDArray[np.float64]:
    return np.where(np.arange(N) < N // 2, 1.0, 0.0)


def shares_of(ids: list[int]) -> NDArray[np.float64]:
    return np.bincount(ids, minlength=N) / len(ids)


def test_ids_come_in_proportion_to_their_weights() -> None:
    weights = np.linspace(0.1, 2.0, N)
    ids = list(WeightedSampler(Urn(weights), N, num_samples=200_000))
    assert len(ids) == 200_000
    expected = weights / weights.sum()
    # Each count is binomial: six deviations are beyond chance for forty of them.
    assert np.all(np.abs(shares_of(ids) - expected) < 6 * np.sqrt(expected / 200_000))


def test_processes_share_an_epoch_and_draw_independently() -> None:
    urns = [Urn(), Urn()]
    parts = [WeightedSampler(urn, N, num_samples=1001, rank=rank, world_size=2) for rank, urn in enumerate(urns)]
    first, second = (list(part) for part in parts)
    assert [len(part) for part in parts] == [len(first), len(second)] == [501, 501]
    assert first != second
    assert not {seed for _, seed in urns[0].calls} & {seed for _, seed in urns[1].calls}
    assert list(WeightedSampler(Urn(), N, num_samples=1001, rank=0, world_size=2)) == first


def test_no_id_is_older_than_two_requests() -> None:
    urn = Urn(first_half())
    ids = iter(WeightedSampler(urn, N, num_samples=10_000, draw=50))
    before = list(islice(ids, 125))
    urn.weights = 1 - first_half()
    after = list(islice(ids, 1000))
    assert set(before) <= set(range(N // 2))
    assert set(after[2 * 50 :]) == set(range(N // 2, N))
    assert len(urn.calls) == 1 + 1125 // 50 + 1


@pytest.mark.parametrize("error", [UnavailableError("gone"), PolicyNotFoundError("none yet")])
def test_draws_are_uniform_while_there_is_no_answer(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    urn = Urn(first_half())
    urn.fails = error
    sampler = WeightedSampler(urn, N, num_samples=100_000, draw=100)
    ids = iter(sampler)
    uniform = list(islice(ids, 2000))
    assert set(uniform) == set(range(N))
    assert (sampler.lost, sampler.fallbacks) == (True, 20)
    urn.fails = None
    list(islice(ids, 300))
    assert set(islice(ids, 2000)) == set(range(N // 2))
    assert not sampler.lost
    assert [record.message for record in caplog.records] == [
        "the server does not answer: drawing examples uniformly",
        "drawing examples by weight again",
    ]


def test_a_silent_server_is_waited_for_once_and_what_comes_late_is_used() -> None:
    urn = Urn(first_half())
    urn.speaking.clear()
    sampler = WeightedSampler(urn, N, num_samples=100_000, draw=100, timeout=0.01)
    ids = iter(sampler)
    assert max(islice(ids, 300)) >= N // 2
    assert (sampler.fallbacks, len(urn.calls)) == (3, 1)
    urn.speaking.set()
    assert sampler._draws._coming is not None
    sampler._draws._coming.exception()  # until it has come
    assert max(islice(ids, 100)) < N // 2
    assert not sampler.lost


def test_what_no_retry_mends_is_raised() -> None:
    urn = Urn()
    urn.fails = AccessDeniedError("no")
    with pytest.raises(AccessDeniedError):
        next(iter(WeightedSampler(urn, N)))
    with pytest.raises(InvalidRequestError, match=r"num_examples = 7: the policy has more: it gave id \d\d"):
        list(WeightedSampler(Urn(), 7))


@pytest.mark.parametrize(("options", "message"), [
    ({"num_samples": 0}, "num_samples = 0: must be at least 1"),
    ({"draw": 0}, "draw = 0: must be at least 1"),
    ({"seed": -1}, "seed = -1: must not be negative"),
    ({"timeout": 0}, "timeout = 0: must be positive"),
    ({"rank": 2, "world_size": 2}, r"rank = 2: must be in \[0, world_size = 2\)"),
])  # fmt: skip
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        WeightedSampler(Urn(), N, **options)


@pytest.mark.parametrize("stop", [0, 1, 130, 449, 450])
def test_an_interrupted_epoch_goes_on_where_it_was(stop: int) -> None:
    """Also into the epochs after it, and from a checkpoint that went through torch.save."""
    whole = WeightedSampler(Urn(), N, num_samples=450, draw=64)
    expected = [*whole, *whole]
    first = WeightedSampler(Urn(), N, num_samples=450, draw=64)
    ids = list(islice(iter(first), stop))
    resumed = WeightedSampler(Urn(), N, num_samples=450, draw=64)
    resumed.load_state_dict(first.state_dict())
    while len(ids) < len(expected):
        ids += resumed
    assert ids == expected
    assert resumed.epoch == 2


class Ids(Dataset[Tensor]):
    """Examples that are their ids."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def test_what_a_loader_took_ahead_is_given_again() -> None:
    expected = list(WeightedSampler(Urn(), N, num_samples=400, draw=64))
    sampler = WeightedSampler(Urn(), N, num_samples=400, draw=64)
    loader = DataLoader(Ids(), batch_size=10, sampler=sampler, num_workers=1, prefetch_factor=4)
    trained = [int(i) for batch in islice(loader, 7) for i in batch]
    assert sampler._position > len(trained) == 70
    resumed = WeightedSampler(Urn(), N, num_samples=400, draw=64)
    resumed.load_state_dict(sampler.state_dict(trained=len(trained)))
    assert trained + list(resumed) == expected
    with pytest.raises(InvalidRequestError, match=r"trained = 401: must be from 0 to "):
        sampler.state_dict(trained=401)


def test_with_a_real_server() -> None:
    """Scored examples come by their weights; a killed server stops nobody."""
    with (
        serve() as server,
        PolicyClient(server.address, policy="sampled", num_examples=N, rule="ema_sign") as client,
    ):
        sampler = WeightedSampler(client, N, num_samples=40_000, draw=2000, timeout=10)
        assert set(islice(iter(sampler), 2000)) == set(range(N))  # there is no policy yet
        signs = np.where(np.arange(N) % 2, 1.0, -1.0)
        client.step(np.arange(N), contributions=signs)
        ids = list(sampler)[4000:]
        weights = client.read_weights()
        assert np.all(np.abs(shares_of(ids) - weights / N) < 6 * np.sqrt(1 / N / len(ids)))
        assert weights[1] > 5 * weights[0]
        server.kill()
        fallbacks = sampler.fallbacks
        assert set(islice(iter(sampler), 12_000)) == set(range(N))
        assert sampler.fallbacks > fallbacks
