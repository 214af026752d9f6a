"""TRL's reinforcement learning with prompts that a policy draws: what is drawn and told, with and without a server."""

from collections import Counter
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from torch import Tensor
from trl.trainer.utils import RepeatSampler

from equipoise import PolicyAdmin, PolicyClient, Timeout
from equipoise.errors import InvalidRequestError, UnavailableError
from equipoise.testing import ServerProcess
from equipoise.transformers import PromptSampler, PromptTraining
from tests.client.torch.trl.prompt_jobs import (
    PROMPTS,
    Judge,
    PromptGRPO,
    client_of,
    other_prompts,
    process,
    prompts,
    recorded,
    trainer_of,
)
from tests.pairs import run_pair
from tests.ports import free_port
from tests.servers import serve

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Away:
    """A server that does not answer."""

    num_examples = None

    def sample_examples(self, count: int, *, with_replacement: bool = True, seed: int | None = None) -> Any:
        raise UnavailableError("gone")


class Silent:
    """A server that answers nobody until it is told to."""

    num_examples = None

    def __init__(self) -> None:
        self.may_answer = Event()
        self.asked = 0

    def sample_examples(self, count: int, *, with_replacement: bool = True, seed: int | None = None) -> Any:
        self.asked += 1
        assert self.may_answer.wait(60)
        return np.arange(count, dtype=np.uint64)


class Drawing:
    """One that draws the same prompts again and again, and notes how it was asked."""

    num_examples = None

    def __init__(self, *drawn: int) -> None:
        self.drawn = drawn
        self.asked: list[tuple[int, bool]] = []

    def sample_examples(self, count: int, *, with_replacement: bool = True, seed: int | None = None) -> Any:
        self.asked.append((count, with_replacement))
        return np.array(self.drawn, np.uint64)


def outcomes(asked: list[tuple[str, int]]) -> Counter[str]:
    return Counter(prompt for prompt, _ in asked)


def test_a_batch_has_the_form_of_trls() -> None:
    form = {"batch_size": 3, "mini_repeat_count": 2, "repeat_count": 4}
    theirs = list(RepeatSampler(range(10), shuffle=False, **form))
    client = Drawing(0, 1, 2)
    ours = PromptSampler(client, 10, batch=3, repeats=2, rounds=4)
    rows = list(ours)
    assert len(rows) == len(ours) == len(theirs)
    assert rows[:24] == theirs[:24]
    assert set(client.asked) == {(3, False)}


def test_without_a_server_batches_are_uniform_and_repeat_by_their_seed() -> None:
    first, second, third = (list(PromptSampler(Away(), 50, batch=10, repeats=1, seed=seed)) for seed in (1, 1, 2))
    assert first == second != third
    for start in range(0, 50, 10):
        assert len(set(first[start : start + 10])) == 10
    sampler = PromptSampler(Away(), 50, batch=10, repeats=1)
    counts = np.bincount([place for _ in range(200) for place in sampler], minlength=50)
    assert sampler.fallbacks == 1000
    assert abs(counts - 200).max() < 60  # more than four standard deviations


def test_a_server_that_does_not_answer_is_waited_for_once() -> None:
    client = Silent()
    sampler = PromptSampler(client, 1000, batch=4, repeats=1, timeout=0.2)
    rows = iter(sampler)
    begin = monotonic()
    first = [next(rows) for _ in range(4 * 200)]
    assert sampler.fallbacks == 200
    assert client.asked == 1
    assert monotonic() - begin < 200 * 0.2 / 2
    client.may_answer.set()
    later: list[int] = []
    while later != [0, 1, 2, 3]:  # the late draw, as soon as its thread has said so
        later = [next(rows, -1) for _ in range(4)]
        if -1 in later:
            rows = iter(sampler)
    assert len(set(first)) > 400


@pytest.mark.parametrize("batch", [0, 11])
def test_a_batch_must_fit_the_dataset(batch: int) -> None:
    with pytest.raises(InvalidRequestError, match="1 to 10 prompts"):
        PromptSampler(Away(), 10, batch=batch, repeats=1)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_what_completions_earned_is_told_of_their_prompts(kind: str, server: ServerProcess, tmp_path: Path) -> None:
    judge = Judge()
    with client_of(server.address, f"told-{kind}") as client:
        sent = recorded(client)
        trainer = trainer_of(kind, client, tmp_path, judge)
        trainer.train()
        status = client.status()
    assert len(sent) == status.version == 4
    assert judge.columns.isdisjoint({"equipoise_id"})
    texts = prompts()["prompt"]
    for batch, (ids, won, tried) in enumerate(sent):
        asked = judge.asked[8 * batch : 8 * batch + 8]
        assert outcomes(asked) == {texts[place]: 4 for place in ids}
        assert tried == [2 if place % 3 == 2 else 4 for place in ids]  # None is no attempt
        assert won == [4 if place % 3 == 0 else 0 for place in ids]
    logged = [line["policy/uniform_draws"] for line in trainer.state.log_history if "loss" in line]
    assert logged == [0.0] * 4


def test_prompts_are_drawn_by_their_weights(server: ServerProcess, tmp_path: Path) -> None:
    judge = Judge()
    with client_of(server.address, "drawn") as client:
        ids = np.arange(PROMPTS)
        for _ in range(3):
            client.step(ids, successes=np.where(ids < 4, 8, 0), attempts=np.full(PROMPTS, 16))
        trainer_of("grpo", client, tmp_path, judge, max_steps=6).train()
        drawn = outcomes(judge.asked)
    texts = prompts()["prompt"]
    wanted = sum(drawn[texts[place]] for place in range(4))
    assert wanted / drawn.total() > 0.5  # uniform: a sixth


def test_ids_survive_where_unused_columns_are_removed(server: ServerProcess, tmp_path: Path) -> None:
    def right(completions: list[str], **columns: Any) -> list[float]:
        assert "wanted" not in columns
        return [1.0] * len(completions)

    with client_of(server.address, "removed") as client:
        sent = recorded(client)
        trainer_of("grpo", client, tmp_path, right, max_steps=1, remove_unused_columns=True).train()
    assert [(len(ids), won, tried) for ids, won, tried in sent] == [(2, [4, 4], [4, 4])]


def test_a_function_says_what_succeeded(server: ServerProcess, tmp_path: Path) -> None:
    def harder(rewards: Tensor) -> Tensor:
        return rewards[:, 0] < 0.5

    def wrong(rewards: Tensor) -> Tensor:
        return rewards

    with client_of(server.address, "function") as client:
        sent = recorded(client)
        trainer_of("grpo", client, tmp_path, Judge(), max_steps=1, success=harder).train()
        assert [won for place, won in zip(sent[0][0], sent[0][1], strict=True) if place % 3 == 0] in ([], [0], [0, 0])
        with pytest.raises(InvalidRequestError, match=r"success.*torch.float32 \[8, 1\].*bool tensor \[8\]"):
            trainer_of("grpo", client, tmp_path, Judge(), max_steps=1, success=wrong).train()


def test_training_goes_on_when_the_server_dies(tmp_path: Path) -> None:
    judge = Judge()
    with serve() as server, client_of(server.address, "dies") as client:
        trainer = trainer_of("grpo", client, tmp_path, judge, max_steps=5)
        tell, told = client.submit, []

        def dying(ids: Any = None, **fields: Any) -> None:
            tell(ids, **fields)
            told.append(client.flush(30) if not told else None)
            if len(told) == 1:
                server.kill()

        client.submit = dying  # type: ignore[method-assign]
        trainer.train()
    assert trainer.state.global_step == 5
    assert told[0] is True
    assert outcomes(judge.asked).total() == 5 * 8
    assert [line["policy/uniform_draws"] for line in trainer.state.log_history if "loss" in line][-1] >= 1


def test_training_needs_no_server_at_all(tmp_path: Path) -> None:
    judge = Judge()
    address, timeout = f"127.0.0.1:{free_port()}", Timeout(step=0.2, call=0.5)
    with PolicyClient(address, policy="none", num_examples=PROMPTS, rule="learnability", timeout=timeout) as client:
        trainer = trainer_of("grpo", client, tmp_path, judge, max_steps=3)
        trainer.train()
    assert outcomes(judge.asked).total() == 3 * 8
    assert [line["policy/uniform_draws"] for line in trainer.state.log_history if "loss" in line][-1] >= 3


def test_evaluation_tells_nothing(server: ServerProcess, tmp_path: Path) -> None:
    with client_of(server.address, "evaluated") as client:
        sent = recorded(client)
        trainer = trainer_of("grpo", client, tmp_path, Judge(), max_steps=1, per_device_eval_batch_size=4)
        trainer.evaluate(prompts(4))
        assert sent == []


def test_a_training_can_be_resumed(server: ServerProcess, tmp_path: Path) -> None:
    with client_of(server.address, "resumed") as client:
        trainer_of("grpo", client, tmp_path, Judge(), max_steps=3, save_strategy="steps", save_steps=3).train()
        judge = Judge()
        trainer = trainer_of("grpo", client, tmp_path, judge, max_steps=5)
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    assert outcomes(judge.asked).total() == 2 * 8


def test_a_stream_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(prompts().to_list()))
    with (
        client_of(server.address, "stream") as client,
        pytest.raises(InvalidRequestError, match=r"train_dataset.*IterableDataset.*Dataset with a length"),
    ):
        trainer_of("grpo", client, tmp_path, Judge(), stream)


def test_a_policy_of_another_size_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    with (
        client_of(server.address, "other-size", num_examples=7) as client,
        pytest.raises(InvalidRequestError, match=r"train_dataset = 24 prompts.*policy 'other-size' has examples, 7"),
    ):
        trainer_of("grpo", client, tmp_path, Judge()).train()


@pytest.mark.parametrize(
    ("field", "given"),
    [("success", "0.5"), ("success", None), ("success", True), ("success", float("nan")), ("timeout", -1.0),
     ("timeout", float("inf")), ("client", "localhost:50051")],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_anything_is_generated(field: str, given: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field} = "):
        PromptTraining(**({"client": Away()} | {field: given}))


def test_a_client_is_no_policy(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="policy = 'Away': must be PromptTraining"):
        PromptGRPO(policy=Away())


@pytest.mark.parametrize("kind", ["order", "number"])
def test_two_processes_with_different_prompts_are_both_refused(kind: str, tmp_path: Path) -> None:
    run_pair(other_prompts, str(tmp_path), kind)
    for index in range(2):
        assert "the same prompts in the same order in every process" in (tmp_path / f"{index}.txt").read_text()


def test_a_rule_that_takes_no_outcomes_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    with (
        client_of(server.address, "other-rule", rule="ema_sign") as client,
        pytest.raises(InvalidRequestError, match=r"rule = ema_sign: must be learnability or uniform"),
    ):
        trainer_of("grpo", client, tmp_path, Judge()).train()


def test_under_uniform_the_same_lines_draw_uniformly(server: ServerProcess, tmp_path: Path) -> None:
    with client_of(server.address, "as-uniform", rule="uniform") as client:
        trainer = trainer_of("grpo", client, tmp_path, Judge())
        trainer.train()
        assert client.status().version == 4
    assert trainer.state.log_history[0]["policy/uniform_draws"] == 0.0


def test_two_processes_share_each_group_and_tell_once(server: ServerProcess, tmp_path: Path) -> None:
    with PolicyAdmin(server.address), PolicyClient(server.address, policy="two", num_examples=PROMPTS):
        pass
    run_pair(process, str(tmp_path), server.address)
    first, second = (torch.load(tmp_path / f"{index}.pt", weights_only=False) for index in range(2))
    assert second[1] == []
    asked = [first[0], second[0]]
    texts = prompts()["prompt"]
    assert len(first[1]) == 4
    for batch, (ids, won, tried) in enumerate(first[1]):
        here = [rows[4 * batch : 4 * batch + 4] for rows in asked]
        together = outcomes(here[0]) + outcomes(here[1])
        assert together == {texts[place]: 4 for place in ids}
        assert len(ids) == 2
        assert sum(tried) in (4, 6, 8)
        assert won == [4 if place % 3 == 0 else 0 for place in ids]
