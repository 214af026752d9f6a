"""Every training dataset gives its examples the right ids, or is refused before the first step."""

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from equipoise import ExampleKeys, PolicyClient
from equipoise.errors import InvalidRequestError
from equipoise.testing import ServerProcess
from equipoise.torch import CaptureError, GhostContributions, TargetDirection, WeightedSteps
from equipoise.torch.batches import HostBatches
from equipoise.torch.training import TrainingOptions
from equipoise.transformers import PolicyTrainer, PolicyTraining
from equipoise.transformers.data import ID, IdCollator, own_batches, with_ids
from tests.client.torch.models import gpt2
from tests.client.torch.test_transformers import N, Recording, arguments, client_of, rows

NAMES = [f"q{(7 * i) % N:02d}" for i in range(N)]
"""Their sorted places are (7 * i) % N."""


def named(values: Sequence[Any]) -> list[dict[str, Any]]:
    return [{**row, "example_id": value} for row, value in zip(rows(len(values), 0), values, strict=True)]


def tensors(features: list[Any]) -> Any:
    """A collator of tuples."""
    ids = torch.stack([feature[0] for feature in features])
    return {"input_ids": ids, "labels": ids}


class Lazy:
    """Examples that are made when they are asked for, one at a time."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> Any:
        return self.examples[place]


class Stream(IterableDataset[Any]):
    """Examples without places."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.examples)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.examples)


def ids_of(data: Any, column: str = "example_id", **options: Any) -> list[int]:
    """What arrives at a training step, in batches of five."""
    collate = IdCollator(lambda features: {"rows": len(features)}, column)
    loader = DataLoader(with_ids(data, column, **options).dataset, batch_size=5, collate_fn=collate)
    return [int(i) for batch in loader for i in batch[column]]


KINDS: list[Any] = [list, tuple, Lazy, Stream, SizedStream]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make", [int, np.int8, np.uint64, torch.tensor, lambda i: torch.tensor(i, dtype=torch.int32), np.array]
)
def test_ids_may_be_any_integers(kind: Any, make: Any) -> None:
    assert ids_of(kind(named([make(N - 1 - i) for i in range(N)])), num_examples=N) == list(range(N))[::-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "value", [1.0, np.float32(1), torch.tensor(1.0), None, True, np.bool_(True), torch.tensor(True), -1, 2**63, [1]]
)
def test_nothing_else_is_an_id(kind: Any, value: Any) -> None:
    data = kind(named([0, 1, value, 3]))
    with pytest.raises(InvalidRequestError, match=r"example_id\[2\] = .*: must be an integer in \[0, 2\^63\)"):
        ids_of(data)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_without_a_column_ids_are_places(kind: Any) -> None:
    assert ids_of(kind(rows(N, 0)), num_examples=N) == list(range(N))
    assert ids_of(kind([(torch.ones(2), i) for i in range(N)]), num_examples=N) == list(range(N))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_names_are_numbered_in_their_order(kind: Any) -> None:
    """Whatever the order of the rows; a name that comes twice is one example."""
    assert ids_of(kind(named(NAMES)), num_examples=N) == [7 * i % N for i in range(N)]
    assert ids_of(kind(named(NAMES[::-1])), num_examples=N) == [7 * i % N for i in range(N)][::-1]
    assert ids_of(kind(named(["b", "a", "b"])), num_examples=2) == [1, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_names_examples_of_any_dataset(kind: Any) -> None:
    keys = ExampleKeys(NAMES)
    assert ids_of(kind(named(NAMES[3:9])), num_examples=N, keys=keys) == keys.ids(NAMES[3:9]).tolist()
    with pytest.raises(InvalidRequestError, match=r"example_id\[1\] = 'nobody': is none of the 32 names of the table"):
        ids_of(kind(named(["q01", "nobody"])), keys=keys)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_names_that_cannot_be_read_at_once_need_a_table(kind: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"example_id\[0\] = 'q00': .* PolicyTraining\.keys must hold the id"):
        ids_of(kind(named(NAMES)))


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (
            rows(N, 0),
            N - 1,
            "num_examples = 31: must be 32, the length of the dataset, which has no column 'example_id'",
        ),
        (rows(N, 0), N + 1, "num_examples = 33: must be 32, the length of the dataset"),
        (named(NAMES), N + 1, "num_examples = 33: must be 32, the number of different names in column 'example_id'"),
        (named([*NAMES, "more"]), N, "num_examples = 32: must be 33, the number of different names"),
        (named([3, 17, 4]), 17, r"example_id\[1\] = 17: ids must be below num_examples = 17"),
        (named(["a", None]), None, r"names\[1\] = None: must be a string or an integer"),
        (Stream(rows(N, 0)), N, "example_id: must be a column of a training dataset without a length"),
        (SizedStream(rows(N, 0)), N, "example_id: must be a column of a training dataset without a length"),
    ],
)
def test_ids_that_do_not_fit_the_policy_are_refused(data: Any, size: int | None, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ids_of(data, num_examples=size)


def test_groups_may_share_ids() -> None:
    assert ids_of(named([1, 0, 1, 1]), num_examples=2) == [1, 0, 1, 1]
    assert ids_of(named([3]), num_examples=100) == [3]


def test_examples_of_other_datasets_pass_without_ids() -> None:
    """As in evaluation: names that are in no table, columns that the model does not know."""
    collate = IdCollator(lambda features: features, "example_id")
    assert collate([{"x": 1, "example_id": "unheard of"}, {"x": 2, "example_id": None}]) == [{"x": 1}, {"x": 2}]
    assert collate([(1, 2)]) == [(1, 2)]
    with pytest.raises(InvalidRequestError, match="data_collator = list: must give a mapping, with room for the ids"):
        collate([{"x": 1, ID: 3}])


def test_workers_bring_ids_too() -> None:
    collate = IdCollator(lambda features: {}, "example_id")
    data = with_ids(named(NAMES), "example_id", num_examples=N).dataset
    loader = DataLoader(data, batch_size=5, collate_fn=collate, num_workers=1, persistent_workers=True)
    for _ in range(2):
        assert [int(i) for batch in loader for i in batch["example_id"]] == [7 * i % N for i in range(N)]


def reversed_tuples() -> list[Any]:
    return [(torch.tensor(row["input_ids"]), "a note") for row in rows(N, 0)][::-1]


def sent_by(server: ServerProcess, folder: Path, name: str, data: Any, **options: Any) -> tuple[list[int], Recording]:
    """Ids of an epoch of four steps."""
    collator, chosen = options.pop("data_collator", None), options.pop("options", TrainingOptions())
    client = client_of(server, name)
    policy = PolicyTraining(client, target=options.pop("target", rows(12, 1)), options=chosen, **options)
    args = arguments(folder, max_steps=4, remove_unused_columns=collator is None)
    trainer = PolicyTrainer(gpt2(), args, train_dataset=data, policy=policy, data_collator=collator)
    trainer.train()
    if collator is None:  # data with other names and without labels
        other = [{name: row[name] for name in ("input_ids", "example_id")} for row in named(["x", "y"])]
        trainer.predict(other)  # type: ignore[arg-type]
    return [i for ids, _ in client.sent for i in ids], client


def test_a_trainer_takes_names(server: ServerProcess, tmp_path: Path) -> None:
    """Statistics are sent by the ids of the names, and the table is left beside the model, to find the names again."""
    ids, client = sent_by(server, tmp_path, "names", named(NAMES))
    with client:
        assert sorted(ids) == list(range(N))
        keys = ExampleKeys.load(tmp_path / "equipoise-keys.csv")
        scores = dict(zip(keys, client.read_weights("score"), strict=True))
        ids, numbered = sent_by(server, tmp_path, "numbers", named([7 * i % N for i in range(N)]))
        with numbered:
            np.testing.assert_allclose([scores[f"q{i:02d}"] for i in range(N)], numbered.read_weights("score"))


def test_a_trainer_takes_tuples_and_sized_streams(server: ServerProcess, tmp_path: Path) -> None:
    target = reversed_tuples()[:12]
    for name, data, options in (
        ("tuples", reversed_tuples(), {"data_collator": tensors, "target": target}),
        ("sized", SizedStream(named(range(N))), {}),
        ("named-stream", SizedStream(named(NAMES)), {"keys": ExampleKeys(NAMES)}),
    ):
        ids, client = sent_by(server, tmp_path, name, data, **options)
        with client:
            assert sorted(ids) == list(range(N))


def test_a_loop_of_ones_own_takes_names(server: ServerProcess) -> None:
    keys = ExampleKeys(["b", "a", "c", "a"])
    model = torch.nn.Linear(2, 1)
    direction = TargetDirection(model, lambda m, x: m(x).squeeze(1).square(), [torch.ones(4, 2)])
    with Recording(server.address, policy="own-loop", num_examples=len(keys)) as client:
        steps = WeightedSteps(client, GhostContributions(model, direction))
        with steps.capture(keys.ids(["c", "a"])) as step:
            step.loss(torch.eye(2)).backward()
        assert client.sent[0][0] == [2, 0]
        for names in (["c", "a"], np.array(["c", "a"]), np.array(["c", "a"], object)):
            with pytest.raises(
                CaptureError, match=r"must be one integer .*; `equipoise\.ExampleKeys` gives ids to names"
            ):
                steps.capture(names)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequestError, match=r"must be integers .*; `equipoise\.ExampleKeys` gives ids"):
                client.step(names, losses=[1, 2])  # type: ignore[arg-type]


def test_a_resumed_trainer_must_have_the_same_names(server: ServerProcess, tmp_path: Path) -> None:
    """In any order."""

    def train(names: list[str], *, resume: bool) -> None:
        with client_of(server, "resumed-names") as client:
            policy = PolicyTraining(client, target=rows(12, 1))
            args = arguments(tmp_path, max_steps=4 if resume else 2, save_strategy="steps", save_steps=2)
            PolicyTrainer(gpt2(), args, train_dataset=named(names), policy=policy).train(resume_from_checkpoint=resume)

    train(NAMES, resume=False)
    with pytest.raises(
        InvalidRequestError, match=r"example_id = .[0-9a-f]{16}.*: the names are not those of the checkpoi"
    ):
        train([*NAMES[:-1], "another"], resume=True)
    train(NAMES[::-1], resume=True)


def test_drawn_examples_have_their_places_as_ids(tmp_path: Path) -> None:
    client = PolicyClient("127.0.0.1:1", policy="drawn", num_examples=N)

    def trainer(data: Any) -> None:
        policy = PolicyTraining(client, target=rows(12, 1), options=TrainingOptions(sampled=True))
        PolicyTrainer(gpt2(), arguments(tmp_path), train_dataset=data, policy=policy)

    trainer(rows(N, 0))
    trainer(named(range(N)))
    for data in (named(NAMES), named([*range(1, N), 0]), Stream(named(range(N))), Lazy(named(range(N)))):
        with pytest.raises(InvalidRequestError, match="sampled = True: draws places of a dataset with a length"):
            trainer(data)


class Moved:
    """Moves batches, and counts how many of them live."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.living: set[int] = set()
        self.most = 0

    def __call__(self, batch: Tensor) -> Tensor:
        copy = batch.double()
        number = len(self.sizes)
        self.sizes.append(len(batch))
        self.living.add(number)
        weakref.finalize(copy, self.living.discard, number)
        self.most = max(self.most, len(self.living))
        return copy


@pytest.mark.parametrize("per_refresh", [None, 4])
def test_of_many_target_batches_two_are_on_the_device(per_refresh: int | None) -> None:
    """The one in use and the one that comes."""
    moved = Moved()
    batches = HostBatches([torch.ones(i, 2) for i in range(1, 9)], moved)
    model = torch.nn.Linear(2, 1).double()
    direction = TargetDirection(
        model, lambda m, x: m(x).squeeze(1), batches, guard_batches=batches, batches_per_refresh=per_refresh
    )
    for _ in range(3):
        direction.refresh()
    assert moved.most <= 2
    assert len(moved.sizes) == 3 * ((per_refresh or 8) + 8)


@pytest.mark.parametrize("per_refresh", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_batches_take_turns(per_refresh: int, count: int) -> None:
    """A refresh that takes more than there are takes all of them from its start on, and what is left of a turn."""
    taken: list[int] = []
    batches = HostBatches(range(count), lambda i: taken.append(i) or torch.ones(1, 2))
    direction = TargetDirection(
        torch.nn.Linear(2, 1), lambda m, x: m(x).squeeze(1), batches, batches_per_refresh=per_refresh
    )
    place = count
    for _ in range(5):
        expected = list(range(place, count))[:per_refresh]
        place += len(expected)
        if len(expected) < per_refresh:
            place = min(count, per_refresh - len(expected))
            expected += range(place)
        taken.clear()
        direction.refresh()
        assert taken == expected


def test_a_target_of_another_form_than_the_training_data_says_so() -> None:
    with pytest.raises(KeyError) as caught:
        own_batches("target", [{"x": 1}], batch_size=1, collate=lambda rows: [row[0] for row in rows], move=list)
    assert caught.value.__notes__ == [
        "target: is collated as train_dataset is, and must hold examples of the same form"
    ]


def test_target_batches_are_moved_when_they_are_used() -> None:
    """Anew at each refresh, to the direction of batches that are there."""
    moved = Moved()
    batches = [torch.ones(3, 2), torch.full((2, 2), 2.0)]
    model = torch.nn.Linear(2, 1).double()
    host = TargetDirection(model, lambda m, x: m(x).squeeze(1), HostBatches(batches, moved), batches_per_refresh=1)
    device = TargetDirection(model, lambda m, x: m(x).squeeze(1), [b.double() for b in batches], batches_per_refresh=1)
    for expected in ([3], [3, 2], [3, 2, 3]):
        host.refresh()
        device.refresh()
        assert moved.sizes == expected
        torch.testing.assert_close(list(host.vectors.values()), list(device.vectors.values()))


@pytest.mark.parametrize("data", [{"a": rows(4, 0)}, Stream(rows(4, 0)), SizedStream(rows(4, 0))])
def test_a_target_that_has_no_places_is_refused(data: Any) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"target = (dict|Stream|SizedStream): must be a dataset with a lengt"
    ):
        own_batches("target", data, batch_size=2, collate=list, move=list)


def test_arrow_datasets() -> None:
    """Ids are a column; where that would copy the data, or with a format, they come beside it."""
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_list([{"x": i} for i in range(N)])
    assert isinstance(with_ids(plain, "example_id").dataset, datasets.Dataset)
    named_rows = datasets.Dataset.from_list([{"x": i, "example_id": name} for i, name in enumerate(NAMES)])
    places = [7 * i % N for i in range(N)]
    for data, expected in (
        (plain, list(range(N))),
        (plain.shuffle(seed=0), list(range(N))),
        (plain.with_format("torch"), list(range(N))),
        (plain.with_transform(lambda rows: {"y": rows["x"]}), list(range(N))),
        (named_rows.with_transform(lambda rows: {"y": rows["x"]}), places),
        (named_rows, places),
        (named_rows.select(range(N)[::-1]), places[::-1]),
        (datasets.Dataset.from_list([{"example_id": i} for i in places]).with_format("numpy"), places),
    ):
        assert ids_of(data, num_examples=N) == expected
    assert ids_of(named_rows.to_iterable_dataset(), keys=ExampleKeys(NAMES)) == places
    with pytest.raises(InvalidRequestError, match=r"example_id\[1\] = None"):
        ids_of(datasets.Dataset.from_list([{"example_id": 0}, {"example_id": None}]))
