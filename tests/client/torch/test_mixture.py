"""What a mixture draws: in which proportions, in which order, and from where it goes on."""

import io
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from equipoise import Backoff, PolicyClient, Timeout
from equipoise.errors import InvalidRequestError
from equipoise.results import Source
from equipoise.torch import Mixture
from equipoise.torch.shares import Proportions
from tests.client.torch.mixtures import NAMES, Places, Policy, SharedStream, Stream, places
from tests.servers import serve

ROWS = [60, 25, 15]


def rows(mixture: Mixture, count: int | None = None) -> list[tuple[int, str]]:
    """(source, row) of an epoch's draws."""
    return [mixture.dataset[place] for place in islice(mixture, count)]


def drawn(loader: Iterable[Any]) -> list[tuple[int, str]]:
    return [
        (int(number), row) for numbers, batch in loader for number, row in zip(numbers.tolist(), batch, strict=True)
    ]


def expected_shares(
    sizes: Iterable[float], weights: Iterable[float], temperature: float, minimum: Iterable[float]
) -> list[float]:
    """By bisection: the scale at which `max(minimum, scale · size^(1/τ) · weight)` has the sum 1."""
    wanted = [size ** (1 / temperature) * weight for size, weight in zip(sizes, weights, strict=True)]
    minimum = list(minimum)
    low, high = 0.0, 1 / max(wanted)
    for _ in range(200):
        scale = (low + high) / 2
        total = sum(max(least, scale * value) for least, value in zip(minimum, wanted, strict=True))
        low, high = (scale, high) if total < 1 else (low, scale)
    return [max(least, low * value) for least, value in zip(minimum, wanted, strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.01, 20), st.floats(0, 1)), min_size=2, max_size=6),
    st.floats(0.5, 8),
    st.integers(0, 99),
)
def test_every_stretch_has_each_sources_share(
    sources: list[tuple[int, float, float]], temperature: float, seed: int
) -> None:
    names = [f"source {i}" for i in range(len(sources))]
    sizes, weights, minimum = zip(*sources, strict=True)
    minimum = tuple(np.array(minimum) / max(1.0, 1.25 * sum(minimum)))
    mixture = Mixture(
        {name: Places(name, size) for name, size in zip(names, sizes, strict=True)},
        client=Policy(*weights),
        temperature=temperature,
        minimum=dict(zip(names, minimum, strict=True)),
        num_samples=600,
        refresh_every=200,
        seed=seed,
    )
    given_rows = [number for number, _ in rows(mixture)]
    expected = expected_shares(sizes, np.float32(weights).tolist(), temperature, minimum)
    for start in range(0, 600, 200):
        counts = np.bincount(given_rows[start : start + 200], minlength=len(names))
        assert np.abs(counts - 200 * np.array(expected)).max() < 1 + 1e-6
    shares = [mixture.metrics()[f"policy/share/{name}"] for name in names]
    np.testing.assert_allclose(shares, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("ends", ["repeat", "drop"])
def test_a_run_explores_at_natural_shares_and_asks_nobody(ends: Any) -> None:
    """Over the run: also where epochs end within a stretch, or are left."""
    policy = Policy(3, 1, 1)
    mixture = Mixture(places(100, 100, 100), client=policy, num_samples=50, refresh_every=20, explore=140, ends=ends)

    def books(epoch: list[tuple[int, str]]) -> list[int]:
        return [sum(number == 0 for number, _ in epoch[start : start + 20]) for start in range(0, len(epoch), 20)]

    assert all(abs(count - 20 / 3) < 1 for epoch in range(2) for count in books(rows(mixture))[:2])
    assert len(rows(mixture, 20)) == 20  # an epoch that is left: 120 draws
    state = Unpickled.of(mixture.state_dict())
    rest = rows(mixture)
    assert abs(books(rest)[0] - 20 / 3) < 1
    assert policy.reads == 2  # for what is drawn after 140
    assert abs(books(rows(mixture))[0] - 12) < 1
    resumed = Mixture(
        places(100, 100, 100), client=Policy(3, 1, 1), num_samples=50, refresh_every=20, explore=140, ends=ends
    )
    resumed.load_state_dict(state)
    assert abs(books(rows(resumed))[0] - 20 / 3) < 1
    with pytest.raises(InvalidRequestError, match="explore = -1: must be an integer of at least 0"):
        Mixture(places(1), explore=-1)


def test_rounding_favours_nobody() -> None:
    counts = Counter(
        number for seed in range(400) for number, _ in rows(Mixture(places(5, 3, 2), num_samples=1, seed=seed))
    )
    assert abs(counts[0] - 200) < 50
    assert abs(counts[1] - 120) < 45
    assert abs(counts[2] - 80) < 40


def test_without_a_policy_an_epoch_is_a_pass_over_all_rows() -> None:
    mixture = Mixture(places(*ROWS))
    for epoch in (1, 2):
        assert sorted(row for _, row in rows(mixture)) == sorted(
            f"{name} {i}" for name, length in zip(NAMES, ROWS, strict=True) for i in range(length)
        )
        assert (mixture.epoch, len(mixture), len(mixture.dataset)) == (epoch, 100, 100)


def test_each_row_comes_once_in_a_pass_and_in_another_order_in_the_next() -> None:
    mixture = Mixture({"a": Places("a", 50)}, num_samples=150, refresh_every=20)
    given_rows = [row for _, row in rows(mixture)]
    passes = [given_rows[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(one) == sorted(f"a {i}" for i in range(50)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_draws_follow_from_seed_and_weights() -> None:
    def given_rows(seed: int, *weights: float) -> list[tuple[int, str]]:
        return rows(Mixture(places(*ROWS), client=Policy(*weights), seed=seed))

    assert given_rows(1, 1, 2, 3) == given_rows(1, 1, 2, 3)
    assert given_rows(1, 1, 2, 3) != given_rows(2, 1, 2, 3)
    assert given_rows(1, 1, 2, 3) != given_rows(1, 3, 2, 1)


def test_ids_are_in_order_of_names_whatever_the_order_given() -> None:
    mixture, other = Mixture(places(*ROWS)), Mixture(list(reversed(places(*ROWS).items())))
    assert mixture.names == other.names == NAMES
    assert rows(mixture) == rows(other)
    assert {(number, row.split()[0]) for number, row in rows(mixture)} == set(enumerate(NAMES))


def test_rows_that_are_mappings_have_a_column_with_the_id() -> None:
    mixture = Mixture({"b": [{"x": 1}], "a": [{"x": 2}]}, id_column="source")
    assert sorted(mixture.dataset[place]["source"] for place in mixture) == [0, 1]
    assert mixture.dataset[0] == {"x": 2, "source": 0}
    taken = Mixture({"a": [{"source": 1}]}, id_column="source")
    with pytest.raises(InvalidRequestError, match="give another id_column"):
        taken.dataset[0]


def test_weights_are_read_once_in_a_stretch() -> None:
    policy = Policy(1, 1, 1, moves=True)
    mixture = Mixture(places(*ROWS), client=policy, num_samples=300, refresh_every=100)
    for count, _ in enumerate(mixture, 1):
        assert policy.reads == -(-count // 100)
        assert mixture.metrics()["policy/mixture_version"] == policy.reads


def test_without_the_server_known_weights_hold_and_before_them_natural_shares(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = Policy(1, 4, 1)
    policy.lost = True
    mixture = Mixture(places(100, 100, 100), client=policy, num_samples=300, refresh_every=60)
    draws = iter(mixture)

    def shares() -> list[float]:
        found = Counter(mixture.dataset[next(draws)][0] for _ in range(60))
        return [found[number] / 60 for number in range(3)]

    assert shares() == [20 / 60] * 3
    assert mixture.lost
    policy.lost = False
    assert shares() == [1 / 6, 4 / 6, 1 / 6]
    policy.lost = True
    assert shares() == [1 / 6, 4 / 6, 1 / 6]
    assert mixture.metrics()["policy/mixture_fallbacks"] == mixture.fallbacks == 2
    assert "mixing sources by natural shares" in caplog.text
    assert "mixing sources by the last known weights" in caplog.text


@pytest.mark.parametrize("streams", [False, True])
def test_a_source_that_is_over_drops_out_and_the_others_share_its_draws(streams: bool) -> None:
    sources: dict[str, Any] = places(*ROWS)
    if streams:
        sources["web"] = Stream("web", 15)
    sizes = dict(zip(NAMES, ROWS, strict=True))
    mixture = Mixture(
        sources, client=Policy(1, 1, 20), num_samples=100, ends="drop", refresh_every=16, sizes=sizes, seed=3
    )
    for _ in range(2):
        given_rows = rows(mixture)
        assert sorted(row for _, row in given_rows) == sorted(row for _, row in rows(Mixture(places(*ROWS))))
        numbers = [number for number, _ in given_rows]
        assert numbers[:16].count(2) in (12, 13)  # its share is 0.78
        assert numbers[:32].count(2) == 15
        assert numbers[32:80].count(0) in (33, 34, 35)  # 48 · 60 / 85 = 33.9, by three stretches


def test_an_epoch_ends_with_its_sources() -> None:
    mixture = Mixture({"a": Stream("a", 7), "b": Stream("b", 4)}, num_samples=1000, sizes={"a": 1, "b": 1}, ends="drop")
    for _ in range(2):
        given_rows = rows(mixture)
        for name, length in (("a", 7), ("b", 4)):
            assert [row for _, row in given_rows if row[0] == name] == [f"{name} {i}" for i in range(length)]


def test_a_source_is_added() -> None:
    policy = Policy(1, 1, 1)
    mixture = Mixture({**places(*ROWS), "web": None}, client=policy)
    assert len(mixture) == 85
    first = rows(mixture, 40)
    assert len(first) == 40
    with pytest.raises(InvalidRequestError, match="has data already"):
        mixture.add("books", [1])
    mixture.add("web", Places("web", 15))
    given_rows = rows(mixture)
    assert len(given_rows) == 100
    assert sum(number == 2 for number, _ in given_rows) == 15


class Unpickled:
    """States go through a file, as `torch.load` reads it."""

    @staticmethod
    def of(state: Any) -> Any:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def mixed(policy: Policy, **options: Any) -> Mixture:
    sources = {"books": Places("books", 60), "code": Stream("code", 25), "web": SharedStream("web", 15)}
    given_options = {"num_samples": 240, "sizes": {"books": 4, "code": 2, "web": 1}, "refresh_every": 50, "seed": 5}
    return Mixture(sources, client=policy, **{**given_options, **options})


@pytest.mark.parametrize("ends", ["repeat", "drop"])
@pytest.mark.parametrize("stop", [0, 1, 49, 50, 51, 90, 99])
def test_an_interrupted_epoch_goes_on_exactly(stop: int, ends: Any) -> None:
    policy = Policy(1, 1, 1, moves=True)
    mixture = mixed(policy, ends=ends)
    rows(mixture)
    draws = iter(mixture)
    before = [next(draws) for _ in range(stop)]
    state, version = Unpickled.of(mixture.state_dict()), policy.version
    rest = list(draws)
    following = list(mixture)
    assert len(before) + len(rest) == (240 if ends == "repeat" else 100)
    policy = Policy(1, 1, 1, moves=True)
    policy.version = version
    resumed = mixed(policy, ends=ends)
    resumed.load_state_dict(state)
    if stop:
        assert list(resumed) == rest
    else:
        assert list(resumed) == [*before, *rest]
    assert list(resumed) == following


def test_draws_that_a_loader_took_ahead_are_given_again_under_the_weights_of_then() -> None:
    policy = Policy(1, 1, 1, moves=True)
    mixture = mixed(policy)
    given_rows = rows(mixture, 170)
    state = Unpickled.of(mixture.state_dict(trained=60))
    policy.weights[:], policy.moves = (9, 1, 1), False
    resumed = mixed(policy)
    resumed.load_state_dict(state)
    assert rows(resumed, 110) == given_rows[60:]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_change_nothing(context: str) -> None:
    alone = rows(mixed(Policy(1, 2, 3)))
    mixture = mixed(Policy(1, 2, 3))
    loader = DataLoader(mixture.dataset, batch_size=8, sampler=mixture, num_workers=2, multiprocessing_context=context)
    assert drawn(loader) == alone
    assert [row for number, row in alone if number == 1][:27] == [f"code {i % 25}" for i in range(27)]


def test_streams_that_were_read_here_are_read_by_forked_workers_from_their_own_beginning() -> None:
    alone = mixed(Policy(1, 2, 3), ends="drop", refresh_every=200)
    expected = rows(alone)
    mixture = mixed(Policy(1, 2, 3), ends="drop", refresh_every=200)  # it reads ahead to learn how long streams are
    assert drawn(DataLoader(mixture.dataset, batch_size=8, sampler=mixture, num_workers=2)) == expected


def test_who_lives_on_does_not_know_of_added_sources() -> None:
    mixture = Mixture({"a": Places("a", 8), "b": None}, client=Policy(1, 1))
    loader = DataLoader(mixture.dataset, batch_size=4, sampler=mixture, num_workers=1, persistent_workers=True)
    assert len(drawn(loader)) == 8
    mixture.add("b", Places("b", 8))
    with pytest.raises(InvalidRequestError, match="persistent_workers"):
        drawn(loader)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 6, 13])
def test_torchdatas_loader_resumes_exactly(workers: int, stop: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def loader(policy: Policy) -> Any:
        mixture = mixed(policy)
        return stateful(mixture.dataset, batch_size=8, sampler=mixture, num_workers=workers)

    policy = Policy(1, 1, 1, moves=True)
    whole = loader(policy)
    batches = iter(whole)
    before = drawn(islice(batches, stop))
    state, version = Unpickled.of(whole.state_dict()), policy.version
    rest = drawn(batches)
    assert len(before) + len(rest) == 240
    policy = Policy(1, 1, 1, moves=True)
    policy.version = version
    resumed = loader(policy)
    resumed.load_state_dict(state)
    assert drawn(resumed) == rest


def test_streams_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": [f"web {i}" for i in range(40)]})
    stream = datasets.Dataset.from_dict({"text": [f"code {i}" for i in range(30)]}).to_iterable_dataset(num_shards=3)

    def mixture() -> Mixture:
        return Mixture(
            {"web": table, "code": stream}, client=Policy(3, 1), num_samples=120, sizes={"web": 1, "code": 1}, seed=2
        )

    def texts(loader: Iterable[Any]) -> list[tuple[int, str]]:
        return [
            (int(number), text)
            for batch in loader
            for number, text in zip(batch["example_id"].tolist(), batch["text"], strict=True)
        ]

    found = []
    for workers in (0, 2):
        given_rows = mixture()
        found.append(texts(DataLoader(given_rows.dataset, batch_size=10, sampler=given_rows, num_workers=workers)))
    assert found[0] == found[1]
    assert [text for number, text in found[0] if number == 0] == [f"code {i % 30}" for i in range(90)]
    assert len({text for number, text in found[0] if number == 1}) == 30


@pytest.mark.parametrize(("sources", "options", "message"), [
    ([("a", [1]), ("a", [2])], {}, "a name must not come twice"),
    ({}, {}, "sources = .*must not be empty"),
    ({"a": []}, {}, r"sources\['a'\].*a source must not be empty"),
    ({"": [1]}, {}, "names must be strings"),
    ({"a": None}, {}, "at least one source must have data"),
    ({"a": iter([1])}, {}, "can be read once only"),
    ({"a": {"train": [1]}}, {}, "must be one dataset"),
    ({"a": 7}, {}, "must have places"),
    ({"a": [1], "b": [2]}, {"minimum": 0.6}, "minimum = 1.2.*sum of at most 1"),
    ({"a": [1], "b": [2]}, {"minimum": {"a": 0.9, "b": 0.2}}, "sum of at most 1"),
    ({"a": [1]}, {"minimum": {"c": 0.1}}, "minimum = 'c'.*no such source"),
    ({"a": [1]}, {"minimum": {"a": -0.1}}, r"must be in \[0, 1\]"),
    ({"a": [1]}, {"minimum": float("nan")}, r"must be in \[0, 1\]"),
    ({"a": [1]}, {"temperature": 0}, "temperature = 0: must be positive"),
    ({"a": [1]}, {"temperature": -1.0}, "temperature = -1.0: must be positive"),
    ({"a": [1]}, {"temperature": float("inf")}, "temperature = inf: must be positive and finite"),
    ({"a": [1], "b": [1]}, {"sizes": {"a": 1}}, r"sizes = \['b'\].*every source"),
    ({"a": [1]}, {"sizes": {"a": 0}}, r"sizes\['a'\] = 0"),
    ({"a": [1], "b": [2]}, {"client": Policy(1, 1, 1)}, "sources = 2: must be as many as the policy has examples, 3"),
    ({"a": Stream("a", 3)}, {"num_samples": 5}, "give `sizes`"),
    ({"a": Stream("a", 3)}, {"sizes": {"a": 1}}, "num_samples = None.*a is not known"),
    ({"a": [1]}, {"num_samples": 0}, "num_samples = 0"),
    ({"a": [1]}, {"refresh_every": 0}, "refresh_every = 0"),
    ({"a": [1]}, {"seed": -1}, "seed = -1"),
    ({"a": [1]}, {"ends": "stop"}, "ends = 'stop'"),
])  # fmt: skip
def test_wrong_arguments_are_named(sources: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Mixture(sources, **options)


def test_a_policy_that_turns_out_to_have_more_examples_is_refused() -> None:
    class Silent(Policy):
        @property
        def num_examples(self) -> Any:
            return self.reads * 3 or None  # known once the stream is open

    with pytest.raises(InvalidRequestError, match="as many as the policy has examples, 3"):
        rows(Mixture(places(4, 4), client=Silent(1, 1, 1)))


def test_a_stream_that_yields_nothing_is_refused_when_it_is_read() -> None:
    mixture = Mixture({"a": Stream("a", 0)}, sizes={"a": 1}, num_samples=4)
    with pytest.raises(InvalidRequestError, match=r"sources\['a'\].*must not be empty"):
        rows(mixture)


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 6}, "seed = 6: was 5"),
    ({"refresh_every": 51}, "refresh_every = 51: was 50"),
    ({"ends": "drop"}, "ends = 'drop': was 'repeat'"),
])  # fmt: skip
def test_a_state_of_another_mixture_is_refused(change: dict[str, Any], message: str) -> None:
    state = mixed(Policy(1, 1, 1)).state_dict()
    with pytest.raises(InvalidRequestError, match=message):
        mixed(Policy(1, 1, 1), **change).load_state_dict(state)
    longer = Mixture({"a": Places("a", 5)})
    with pytest.raises(InvalidRequestError, match=r"sources\['a'\] = '5 examples': had 4"):
        longer.load_state_dict(Mixture({"a": Places("a", 4)}).state_dict())


def test_weights_of_zero_are_followed_and_if_all_are_so_shares_are_natural() -> None:
    proportions = Proportions(["a", "b"], sizes=None, temperature=1, minimum={"b": 0.25})
    lengths, open_ = np.array([30, 10]), np.array([True, True])
    assert proportions.shares(np.array([1.0, 0.0]), lengths, open_).tolist() == [0.75, 0.25]
    assert proportions.shares(np.array([0.0, 0.0]), lengths, open_).tolist() == [0.75, 0.25]
    assert proportions.shares(np.array([1.0, 1.0]), lengths, np.array([False, True])).tolist() == [0, 1]
    assert proportions.shares(np.array([1.0, 1.0]), lengths, ~open_).tolist() == [0, 0]


def test_with_a_real_server_that_is_lost() -> None:
    timeout, backoff = Timeout(step=0.2), Backoff(first=0.01, longest=0.05)
    with (
        serve() as server,
        PolicyClient(
            server.address,
            policy="mix",
            num_examples=3,
            rule="exponentiated_gradient",
            timeout=timeout,
            backoff=backoff,
        ) as client,
    ):
        mixture = Mixture(places(200, 200, 200), client=client, num_samples=600, refresh_every=100)
        while client.step([0, 1, 2], contributions=[-1.0, 0.0, 1.0]).source is not Source.SERVED:
            pass
        while mixture.lost or not mixture.metrics():  # a slow machine may miss its deadline
            next(iter(mixture))
        weights = client.read_weights()
        assert weights[0] < weights[1] < weights[2]
        shares = [mixture.metrics()[f"policy/share/{name}"] for name in NAMES]
        np.testing.assert_allclose(shares, weights / 3, rtol=1e-5)
        server.kill()
        assert len(list(mixture)) == 600
        assert mixture.lost
        assert [mixture.metrics()[f"policy/share/{name}"] for name in NAMES] == shares
