"""What the service answers is what the rule computes, bit for bit, whatever dies on the way and whoever sends."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from equipoise import Outcome, PolicyClient, Source
from equipoise_server.rules import aggregate, build, names
from tests.patience import PATIENT
from tests.servers import ServerProcess, serve

NUM_EXAMPLES = 500


class Batch(NamedTuple):
    """One step of a made-up training run."""

    ids: NDArray[np.int64]
    contributions: NDArray[np.float32]
    losses: NDArray[np.float32]
    reference_losses: NDArray[np.float32]

    def statistics(self, rule: str) -> dict[str, NDArray[Any]]:
        """What a trainer of this rule sends."""
        if rule == "learnability":
            return {"successes": (self.losses * 9).astype(np.int64), "attempts": np.full(len(self.ids), 8)}
        columns = self._asdict() | ({} if rule in ("excess_loss", "rho") else {"reference_losses": None})
        return {name: values for name, values in columns.items() if name != "ids" and values is not None}


def batches(count: int, *, rows: int = 64, seed: int = 0) -> Iterator[Batch]:
    random = np.random.default_rng(seed)
    for _ in range(count):
        ids = random.integers(0, NUM_EXAMPLES, rows)
        contributions = (random.standard_normal(rows) + np.sin(ids)).astype(np.float32)
        yield Batch(ids, contributions, *random.random((2, rows)).astype(np.float32))


def train(client: PolicyClient, given: Iterator[Batch], *, rule: str = "ema_sign") -> list[NDArray[np.float32]]:
    """The weights of each step; every one of them was applied or found applied already."""
    served = []
    for batch in given:
        result = client.step(batch.ids, **batch.statistics(rule))
        assert result.source is Source.SERVED
        assert result.outcome in (Outcome.APPLIED, Outcome.DUPLICATE)
        served.append(result.weights)
    return served


@pytest.mark.parametrize("rule_name", [name for name in names() if name != "trajectory"])
def test_served_weights_are_the_rule_s_own(server: ServerProcess, rule_name: str) -> None:
    rule = build(rule_name, {})
    state = rule.init(NUM_EXAMPLES, device=torch.device("cpu"))
    with PolicyClient(
        server.address, policy=f"exact-{rule_name}", num_examples=NUM_EXAMPLES, rule=rule_name, timeout=PATIENT
    ) as client:
        served = train(client, batches(40), rule=rule_name)
        everything, scores = client.read_weights(), client.read_weights("score")
    for batch, weights in zip(batches(40), served, strict=True):
        given = dict.fromkeys(("contributions", "losses")) | batch.statistics(rule_name)
        statistics = aggregate(batch.ids, scored=None, **given)
        state = rule.update(state, statistics)
        np.testing.assert_array_equal(weights, rule.answer(state, statistics, batch.ids))
    np.testing.assert_array_equal(everything, rule.weights(state, None))
    np.testing.assert_array_equal(scores, rule.scores(state, None))


@pytest.mark.parametrize("durability", ["logged", "behind"])
def test_a_run_whose_server_is_killed_ends_like_one_whose_server_lives(durability: str) -> None:
    with serve() as server:
        ends = []
        for name, kills in (("spared", ()), ("killed", (13, 14, 37))):
            with PolicyClient(
                server.address, policy=name, num_examples=NUM_EXAMPLES, when_lost="wait", durability=durability
            ) as client:
                served = []
                for index, batch in enumerate(batches(50)):
                    if index in kills:
                        server.kill()
                        server.start()
                    served += train(client, iter([batch]))
                assert client.flush(durable=True)
                status = client.status()
                assert (status.version, status.durable_version) == (50, 50)
                ends.append((served, client.read_weights(), client.read_weights("score")))
    (spared, *spared_tables), (killed, *killed_tables) = ends
    np.testing.assert_array_equal(spared_tables, killed_tables)
    np.testing.assert_array_equal(spared, killed)


def half_batches(batch: Batch) -> tuple[Batch, Batch]:
    middle = len(batch.ids) // 2
    return Batch(*(column[:middle] for column in batch)), Batch(*(column[middle:] for column in batch))


def trainer_process(address: str, half: int, orders: Connection) -> None:
    """One of two data-parallel trainers: makes its half of a step whenever it is told to."""
    with PolicyClient(address, policy="shared", num_examples=NUM_EXAMPLES, when_lost="wait") as client:
        for batch in batches(30):
            orders.recv()
            train(client, iter([half_batches(batch)[half]]))
            orders.send("done")


def test_two_trainers_sharing_a_policy_equal_one_that_sends_both_halves(server: ServerProcess) -> None:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for half in (0, 1):
        ours, theirs = context.Pipe()
        process = context.Process(target=trainer_process, args=(server.address, half, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    for _ in range(30):
        for pipe in pipes:
            pipe.send("step")
            assert pipe.poll(60), "a trainer has not made its step"
            pipe.recv()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    with PolicyClient(server.address, policy="shared", timeout=PATIENT) as client:
        shared = [client.read_weights(), client.read_weights("score")]
        assert client.status().version == 60
    with PolicyClient(server.address, policy="alone", num_examples=NUM_EXAMPLES, timeout=PATIENT) as client:
        for batch in batches(30):
            train(client, iter(half_batches(batch)))
        np.testing.assert_array_equal(shared, [client.read_weights(), client.read_weights("score")])
