"""Ids come as often as their weights say, whatever happens to the server and to the job."""

import re
import threading
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from equipoise import PolicyClient
from equipoise.errors import AccessDeniedError, InvalidRequestError, PolicyNotFoundError, UnavailableError
from equipoise.torch import DistributedWeightedSampler, WeightedSampler
from tests.client.torch import two_shares
from tests.client.torch.two_shares import HEAVY, PREPARED, Epochs
from tests.pairs import run_pair
from tests.patience import PATIENT
from tests.servers import serve

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
    parts = [share_of(urn, rank) for rank, urn in enumerate(urns)]
    first, second = (list(part) for part in parts)
    assert [len(part) for part in parts] == [len(first), len(second)] == [501, 501]
    assert first != second
    assert not {seed for _, seed in urns[0].calls} & {seed for _, seed in urns[1].calls}
    assert list(share_of(Urn(), 0)) == first


def share_of(urn: Urn, rank: int) -> DistributedWeightedSampler:
    return DistributedWeightedSampler(urn, N, num_samples=1001, rank=rank, num_replicas=2)


def test_an_epoch_goes_on_with_another_number_of_processes() -> None:
    """A third of it was over among two processes, each of which has 51 of 102 ids; the rest is shared by three."""
    before = DistributedWeightedSampler(Urn(), N, num_samples=102, rank=1, num_replicas=2)
    list(islice(iter(before), 17))
    for rank in range(3):
        after = DistributedWeightedSampler(Urn(), N, num_samples=102, rank=rank, num_replicas=3)
        after.load_state_dict(before.state_dict(), own=rank == 1)
        assert len(list(after)) == 102 * 2 // 3 // 3 + 1
        assert len(list(after)) == 34


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
    ({"rank": 2, "num_replicas": 2}, r"rank = 2: must be in \[0, num_replicas = 2\)"),
    ({"rank": 2}, "rank = 2: must be given together with num_replicas = None"),
    ({"num_replicas": 2}, "rank = None: must be given together with num_replicas = 2"),
])  # fmt: skip
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        DistributedWeightedSampler(Urn(), N, **options)


def test_the_size_must_be_that_of_the_policy() -> None:
    """As soon as it is known: of a larger policy some would be refused, of a smaller one some would never come."""

    class Sized(Urn):
        num_examples: int | None = None

    urn = Sized()
    urn.num_examples = N
    for size in (N - 1, N + 1):
        with pytest.raises(InvalidRequestError, match=f"num_examples = {size}: must be that of the policy, {N}"):
            WeightedSampler(urn, size)
    urn.num_examples = None
    ids = iter(WeightedSampler(urn, N + 1, draw=8))
    list(islice(ids, 8))
    urn.num_examples = N
    with pytest.raises(InvalidRequestError, match=f"num_examples = {N + 1}: must be that of the policy, {N}"):
        next(ids)


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
        PolicyClient(server.address, policy="sampled", num_examples=N, rule="ema_sign", timeout=PATIENT) as client,
    ):
        sampler = WeightedSampler(client, N, num_samples=40_000, draw=2000, timeout=60)
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


Shares: TypeAlias = list[dict[str, Any]]
"""What each process got, in two epochs, by the way of sharing."""


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Shares:
    folder = tmp_path_factory.mktemp("shares")
    run_pair(two_shares.process, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def lengths(epochs: Epochs) -> list[int]:
    return [len(epoch) for epoch in epochs]


def assert_drawn_by_weight(parts: list[Epochs]) -> None:
    """Independently in each process and in each epoch."""
    epochs = [epoch for part in parts for epoch in part]
    assert {i for epoch in epochs for i in epoch} == set(range(HEAVY))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("name", PREPARED)
def test_accelerate_shares_out_what_it_would_of_any_sampler(shares: Shares, name: str) -> None:
    """Each process gets as many ids as of PyTorch's own random sampler with replacement."""
    for share in shares:
        assert lengths(share["prepared"][name]) == lengths(share["uniform"][name])
    if "row" not in name:
        assert_drawn_by_weight([share["prepared"][name] for share in shares])


def test_all_rows_of_an_epoch_are_drawn(shares: Shares) -> None:
    """Where Accelerate adds none of its own to complete a batch."""
    for name in ("split", "dispatch", "dispatch and split", "dispatch, workers", "not even"):
        assert sum(len(share["prepared"][name][0]) for share in shares) == two_shares.N


def test_who_does_not_read_does_not_ask(shares: Shares) -> None:
    assert shares[0]["idle"] > 0
    assert shares[1]["idle"] == 0


def test_a_plain_loop_gets_its_share(shares: Shares) -> None:
    """As of PyTorch's `DistributedSampler`, also by a sampler that was made before the processes knew each other."""
    for name in ("plain loop", "plain loop, workers"):
        for share in shares:
            assert lengths(share[name]) == lengths(share["plain loop, uniform"]) == [35, 35]
        assert_drawn_by_weight([share[name] for share in shares])
    assert [lengths(share["plain loop, one row"]) for share in shares] == [[1, 1]] * 2
    assert all("call init_process_group before the sampler is used" in share["before"] for share in shares)


@pytest.mark.parametrize("name", ["loader", "hook", "workers", "batch_sampler=", "alone"])
def test_lightning_leaves_the_shares_alone(shares: Shares, name: str) -> None:
    assert [lengths(share["lightning"][name]) for share in shares] == [[35, 35]] * 2
    assert_drawn_by_weight([share["lightning"][name] for share in shares])


@pytest.mark.parametrize(("name", "message"), [
    ("a plain loop", "each of 2 processes would draw all of an epoch: use DistributedWeightedSampler, or accelerator."),
    ("prepare", "BatchSamplerShard would share out again what is a share already: use WeightedSampler"),
    ("split", "BatchSamplerShard would share out again"),
    ("lightning", "DistributedSamplerWrapper would draw a whole epoch under the weights of its beginning: use Distri"),
    ("lightning, hook", "DistributedSamplerWrapper would draw a whole epoch"),
    ("lightning, alone", "each of 2 processes would draw all of an epoch"),
    ("lightning, batch_sampler=", r"put in its place .* give lightning.Trainer\(use_distributed_sampler=False\)"),
])  # fmt: skip
def test_what_would_not_be_shared_rightly_is_refused(shares: Shares, name: str, message: str) -> None:
    """With what the tests above show to be right."""
    assert all(re.search(message, share["refusals"][name]) for share in shares)
    assert "DataLoaderDispatcher would share out again" in shares[0]["refusals"]["dispatch"]


@pytest.mark.parametrize("name", ["plain", "split", "dispatch"])
def test_an_interrupted_epoch_goes_on_under_accelerate(shares: Shares, name: str) -> None:
    for share in shares:
        result = share["resumed"][name]
        assert result["parts"] == result["whole"]
        assert len(result["whole"]) == len(result["next"]) == 35
        assert (
            result["said"].startswith("skip_first_batches: a resumed sampler goes on where it was")
            or share is not shares[0]
        )
