"""What is trained: with weights 1 what TRL trains, and the same after an interruption and in two processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from equipoise.testing import ServerProcess
from equipoise.torch import TrainingOptions
from equipoise.transformers import PolicyTraining
from tests.client.torch.trl import processes as processes_of
from tests.client.torch.trl.cases import TRAINED, given_for, model_for
from tests.client.torch.trl.formulas import contributions_of, margin, relative_error, spelt, token_mean
from tests.client.torch.trl.jobs import (
    N,
    client_of,
    dataset,
    examples,
    llama,
    plain,
    under_policy,
)
from tests.pairs import run_pair

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize("case", TRAINED)
def test_with_weights_1_training_is_as_ever(server: ServerProcess, tmp_path: Path, case: str) -> None:
    """Bit for bit: parameters and the optimizer's state after three steps; logged metrics, and evaluation between.

    But for DPO's `sft`, up to rounding.
    """
    kind, data, options = TRAINED[case][0], TRAINED[case][1], dict(TRAINED[case][2])
    shape = options.pop("model", {})
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    ends = []
    for under in (False, True):
        settings = dict(options)
        given = {**given_for(settings, torch.float32), "eval_dataset": dataset(data, 5, 4)}
        model = model_for(kind, dtype=torch.float32, **shape)
        if under:
            with client_of(server, "ever-" + "".join(filter(str.isalnum, case)).lower(), rule="uniform") as client:
                policy = PolicyTraining(client, target=dataset(data, 6, 1))
                trainer = under_policy(kind, model, tmp_path, dataset(data), policy, given=given, **settings)
                trainer.train()
        else:
            trainer = plain(kind, model, tmp_path, dataset(data), given=given, **settings)
            trainer.train()
        ends.append(trainer)
    expected, found = ends
    rounded = "SFT" in case
    for (name, a), b in zip(expected.model.named_parameters(), found.model.parameters(), strict=True):
        assert torch.equal(a, b) or (rounded and torch.allclose(a, b, rtol=1e-4, atol=1e-6)), name
    states = [trainer.optimizer.state_dict()["state"] for trainer in ends]
    for number, state in states[0].items() if not rounded else ():
        assert all(torch.equal(value, states[1][number][name]) for name, value in state.items())
    timings = ("runtime", "per_second")
    for before, now in zip(expected.state.log_history, found.state.log_history, strict=True):
        assert before.keys() == {name for name in now if not name.startswith("policy/")}
        for name, value in before.items():
            if not name.endswith(timings):
                assert now[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_an_interrupted_job_goes_on_from_its_checkpoint(server: ServerProcess, tmp_path: Path) -> None:
    """To the weights and the model of one that was not interrupted."""
    options = {"packing": True, "max_length": 32, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    ends = []
    for name, stops in (("whole", [5]), ("parts", [2, 5])):
        for stop in stops:
            with client_of(server, f"interrupted-{name}") as client:
                policy = PolicyTraining(client, target=dataset("text", 6, 1))
                trainer = under_policy("sft", llama(), tmp_path / name, dataset("text"), policy, **options)
                trainer.add_callback(_stop_after(stop))
                trainer.train(resume_from_checkpoint=stop == 5 and name == "parts")
                used = trainer.policy_client
                if stop == 5:
                    ends.append((used.read_weights(), trainer.model, used.status().version))
    assert ends[0][2] == ends[1][2] == 5
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=1e-6)
    torch.testing.assert_close(dict(ends[1][1].state_dict()), dict(ends[0][1].state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "data", "options"),
    [("sft", "text", {"packing": True, "max_length": 32}), ("dpo", "pairs", {"precompute_ref_log_probs": True})],
)
def test_strata_weigh_in_the_same_step(
    server: ServerProcess, tmp_path: Path, kind: str, data: str, options: dict[str, Any]
) -> None:
    """As a job does that knows these weights beforehand, bit for bit."""
    quick = {"strata": 2, "min_count": 4, "memory": 100, "lower_below": 0.0, "raise_above": 1.0}
    ends: list[Any] = []
    given: list[Any] = []
    for rule, settings in (("strata", quick), ("uniform", {})):
        with client_of(server, f"trl-same-step-{kind}-{rule}", rule=rule, settings=settings) as client:
            if rule == "uniform":
                replayed = iter(given)
                client.weights = lambda ids, replayed=replayed: next(replayed)  # type: ignore[misc]
            every_batch = TrainingOptions(measure_every=1, norm_matched=False)
            policy = PolicyTraining(client, target=dataset(data, 6, 1), options=every_batch)
            trainer = under_policy(kind, llama(), tmp_path, dataset(data), policy, max_steps=16, **options)
            trainer.train()
            if rule == "strata":
                assert [ids for ids, *_ in client.asked] == [ids for ids, _ in client.sent]
                given += [weights for *_, weights in client.asked]
            ends.append((trainer.model, [entry.get("policy/mean_weight") for entry in trainer.state.log_history]))
    assert min(weights.min() for weights in given) < 0.95
    assert ends[0][1] == ends[1][1]
    torch.testing.assert_close(dict(ends[0][0].state_dict()), dict(ends[1][0].state_dict()), rtol=0, atol=0)


def _stop_after(steps: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    return Stop()


def test_the_model_is_left_as_it_was(server: ServerProcess, tmp_path: Path) -> None:
    """After the training the head is called as ever, and TRL's own trainers work on."""
    with client_of(server, "left") as client:
        model = llama()
        policy = PolicyTraining(client, target=dataset("text", 6, 1))
        trainer = under_policy("sft", model, tmp_path, dataset("text"), policy)
        trainer.train()
        assert "forward" not in vars(model.lm_head)
        assert trainer.evaluate(dataset("text", 4, 5))["eval_loss"] > 0
        assert model.generate(torch.tensor([[6, 7]]), max_new_tokens=2).shape == (1, 4)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    run_pair(processes_of.process, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", processes_of.JOBS)
def test_two_processes_take_one_step_of_one(processes: Path, name: str) -> None:
    """Each sends the statistics of its own rows; together they train on the weighted loss of all."""
    kind, data, _ = processes_of.JOBS[name]
    results = [torch.load(processes / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
    model, rows, wanted = llama(), examples(data, N, 0), examples(data, 7, 1)
    ref: Any = processes_of.reference_for(kind).get("ref_model")

    def loss_of(example: dict[str, Any]) -> Any:
        if kind == "sft":
            return lambda: token_mean(model, *spelt(example))
        return lambda: -F.logsigmoid(0.1 * (margin(model, example) - margin(ref, example).detach()))

    every: list[int] = []
    for sent, _ in results:
        [(ids, fields)] = sent
        expected, losses = contributions_of(model, [loss_of(rows[i]) for i in ids], [loss_of(e) for e in wanted])
        assert relative_error(fields["losses"], losses) < 1e-6
        assert relative_error(fields["contributions"], expected) < 2e-6
        every += ids
    assert len(set(every)) == len(every) >= 8
    weights = (torch.tensor(every).double() + 1) / 16  # as the processes' client says
    if kind == "sft":
        weights *= torch.tensor([len(spelt(rows[i])[0]) - 1 for i in every])
        weights /= sum(len(spelt(rows[i])[0]) - 1 for i in every)
    else:
        weights /= len(every)
    (weights * torch.stack([loss_of(rows[i])() for i in every])).sum().backward()
    for _, state in results:
        for path, parameter in model.named_parameters():
            torch.testing.assert_close(state[path], parameter - 0.1 * parameter.grad, rtol=1e-6, atol=1e-8)
