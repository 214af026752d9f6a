"""The real `Trainer` under a policy: what it trains on, what it sends, and that it resumes."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from equipoise import PolicyClient, Timeout
from equipoise.errors import InvalidRequestError
from equipoise.torch import GhostContributions, TargetDirection, UnsupportedModuleError, causal_lm_losses
from equipoise.torch.training import TrainingOptions
from equipoise.transformers import PolicyMixin, PolicyTrainer, PolicyTraining, model_losses
from tests.client.torch.models import gpt2, lm_losses, reference, relative_error, tokens
from tests.client.torch.recording import Recording
from tests.servers import ServerProcess, serve

N = 32


def rows(count: int, seed: int, *, padded: bool = True) -> list[dict[str, Any]]:
    """A dataset: a list of examples, with a column the model does not know."""
    batch = tokens(count, seed=seed, padded=padded)
    return [{"note": "x", **{name: values[i].tolist() for name, values in batch.items()}} for i in range(count)]


def batch_of(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([e[name] for e in examples]) for name in ("input_ids", "attention_mask", "labels")}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(defaults | options))


def client_of(server: ServerProcess, name: str) -> Recording:
    return Recording(server.address, policy=name, num_examples=N, rule="ema_sign", timeout=Timeout(step=30))


def trainer_of(client: PolicyClient, folder: Path, *, model: nn.Module | None = None, **options: Any) -> PolicyTrainer:
    policy = PolicyTraining(client, target=rows(12, 1), guard=rows(6, 2), **options.pop("policy", {}))
    return PolicyTrainer(
        model or gpt2(),
        arguments(folder, **options),
        train_dataset=rows(N, 0),
        eval_dataset=rows(4, 5),
        policy=policy,
    )


def test_five_lines_train_under_a_policy(server: ServerProcess, tmp_path: Path) -> None:
    """The first step's contributions and gradient are those of the definition; all examples are scored."""
    train, target, guard = rows(N, 0), rows(12, 1), rows(6, 2)
    model, args = gpt2(), arguments(tmp_path, max_grad_norm=0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    client = client_of(server, "five")
    policy = PolicyTraining(client, target=target, guard=guard)
    trainer = PolicyTrainer(model, args, train_dataset=train, policy=policy)
    trainer.train()
    weights, status = client.read_weights(), client.status()
    client.close()
    assert [fields["step"] for _, fields in client.sent] == list(range(1, 9))
    assert sorted(i for ids, _ in client.sent[:4] for i in ids) == list(range(N))
    assert (status.version, status.training_step, status.scored_examples) == (8, 8, N)
    assert weights.min() < 0.5 < weights.max()
    ids, fields = client.sent[0]
    assert ["guard_loss" in fields for _, fields in client.sent] == [True] + 7 * [False]
    first = gpt2()
    first.load_state_dict(start)
    direction = TargetDirection(first, lm_losses, [batch_of(target)])
    direction.refresh()
    batch = batch_of([train[i] for i in ids])
    assert relative_error(torch.tensor(fields["contributions"]), reference(first, direction, batch)) < 1e-4
    assert fields["target_loss"] == pytest.approx(float(direction.target_loss or 0), rel=1e-4)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(lm_losses(first, batch).mean().item(), rel=1e-3)


def test_losses_are_weighted_by_what_the_policy_says(server: ServerProcess, tmp_path: Path) -> None:
    """One step from served weights moves the model as a hand-made step does; ids come from a column; sizes differ."""
    with client_of(server, "weighted") as client:
        client.step(np.arange(N), contributions=np.where(np.arange(N) % 2, 1.0, -1.0))
        train = [{**row, "number": N - 1 - index} for index, row in enumerate(rows(N, 0))]
        model = gpt2()
        policy = PolicyTraining(client, target=rows(12, 1), losses=lm_losses, id_column="number")
        options: dict[str, Any] = {"max_steps": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
        trainer = PolicyTrainer(
            model,
            arguments(tmp_path, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", **options),
            train_dataset=train,
            policy=policy,
        )
        trainer.train()
        [(ids, _)] = client.sent
        assert len(ids) == 16
        weights = torch.tensor(np.where(np.array(ids) % 2, 1.0, 0.0))
        weights = torch.tensor(client.read([0, 1]).weights)[weights.long()]
    expected = gpt2()
    batch = batch_of([train[N - 1 - i] for i in ids])
    (weights * lm_losses(expected, batch)).mean().backward()
    for parameter, moved in zip(expected.parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(moved, parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"bf16": True, "activation_checkpointing": True}, "ghost"),
        ({"gradient_accumulation_steps": 3, "auto_find_batch_size": False}, "finite_difference"),
        ({"dataloader_num_workers": 1}, "last_layer"),
        ({}, "jvp"),
        ({}, partial(GhostContributions, shared=["transformer.wpe"])),
    ],
)
def test_ways_of_training(server: ServerProcess, tmp_path: Path, options: dict[str, Any], method: Any) -> None:
    name = f"way-{method if isinstance(method, str) else 'own'}".replace("_", "-")
    with client_of(server, name) as client:
        policy = {"options": TrainingOptions(method=method, refresh_every=2, preconditioned=True)}
        trainer_of(client, tmp_path, max_steps=4, policy=policy, **options).train()
        assert ["target_loss" in fields for _, fields in client.sent] == [True, False, True, False]
        assert all(np.isfinite(fields["contributions"]).all() for _, fields in client.sent)
        rows_sent = 8 * options.get("gradient_accumulation_steps", 1)
        # 32 examples are four batches: an epoch's last step has what is left of them.
        assert [len(ids) for ids, _ in client.sent] == ([24, 8, 24, 8] if rows_sent == 24 else [8] * 4)


def test_evaluation_is_as_ever(server: ServerProcess, tmp_path: Path) -> None:
    with client_of(server, "evaluation") as client:
        trainer = trainer_of(client, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
        plain = Trainer(gpt2(), arguments(tmp_path), eval_dataset=rows(4, 5)).evaluate()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"])
        trainer.train()
        assert len(client.sent) == 2


def test_examples_can_be_drawn_instead(server: ServerProcess, tmp_path: Path) -> None:
    with client_of(server, "drawn") as client:
        client.step(np.arange(N), contributions=np.where(np.arange(N) < 4, 1.0, -1.0))
        trainer = trainer_of(client, tmp_path, max_steps=4, policy={"options": TrainingOptions(sampled=True)})
        trainer.train()
        ids = [i for sent, _ in client.sent for i in sent]
        assert sum(i < 4 for i in ids) > len(ids) / 4  # of 32 examples four have half of the weight or more
        assert len(set(ids)) < len(ids)


@pytest.mark.parametrize("lost_steps", [0, 2])
def test_an_interrupted_job_goes_on_from_its_checkpoint(server: ServerProcess, tmp_path: Path, lost_steps: int) -> None:
    """To the same weights and the same model as one that was not interrupted, bit for bit."""
    name, ends = f"interrupted-{lost_steps}", []
    saving = {"save_strategy": "steps", "save_steps": 5}
    with client_of(server, f"{name}-whole") as client:
        trainer = trainer_of(client, tmp_path / "whole", **saving)
        trainer.train()
        ends.append((client.read_weights(), trainer.model))
    with client_of(server, name) as client:
        trainer = trainer_of(client, tmp_path / "parts", **saving)
        trainer.add_callback(_stop_after(5 + lost_steps))
        trainer.train()
        assert client.status().version == 5 + lost_steps
    with client_of(server, name) as client:
        trainer = trainer_of(client, tmp_path / "parts", **saving)
        trainer.train(resume_from_checkpoint=True)
        used = trainer.policy_client
        assert (used is client) == (not lost_steps)
        assert used.policy == name or used.policy.startswith(f"{name}.from-5-")
        assert used.status().version == (8 if used is client else 3)
        ends.append((used.read_weights(), trainer.model))
        used.close()
    (expected_weights, expected), (weights, model) = ends
    np.testing.assert_array_equal(weights, expected_weights)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    saved = tmp_path / "parts" / "checkpoint-5" / "equipoise-0.pt"
    assert saved.stat().st_size < 8192  # of a model of 60 kB, and of any other


def _stop_after(steps: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    return Stop()


def test_a_lost_server_does_not_stop_training(server: ServerProcess, tmp_path: Path) -> None:
    with serve() as lost:
        client = PolicyClient(lost.address, policy="lost", num_examples=N, timeout=Timeout(close=0.1, call=0.5))
        trainer = trainer_of(client, tmp_path, max_steps=4, save_strategy="steps", save_steps=3)
        lost.kill()
        trainer.train()
        assert trainer.state.global_step == 4
        assert client.stats.steps == 4
        assert (tmp_path / "checkpoint-3" / "equipoise-0.pt").exists()
        client.close()


def bert(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(BertConfig(**sizes, intermediate_size=16, max_position_embeddings=16, **options)).eval()


def test_losses_of_models_average_to_what_the_models_say() -> None:
    """One sequence at a time, where a mean over tokens and over examples is one."""
    batch = tokens(5, padded=True)
    float_labels = torch.rand(5, 3).round()
    for model, labels in (
        (gpt2().eval(), batch["labels"]),
        (bert(BertForMaskedLM), batch["labels"]),
        (bert(BertForTokenClassification, num_labels=61), batch["labels"]),
        (bert(BertForSequenceClassification, num_labels=3), torch.tensor([0, 2, 1, 1, 0])),
        (bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"), float_labels),
        (bert(BertForSequenceClassification, num_labels=1), torch.rand(5)),
    ):
        whole = {**batch, "labels": labels}
        alone = [model(**{name: values[i : i + 1] for name, values in whole.items()}).loss for i in range(5)]
        torch.testing.assert_close(model_losses(model, whole), torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_other_models_need_losses_of_their_own() -> None:
    config = T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(InvalidRequestError, match="losses = model_losses for T5ForConditionalGeneration: must be"):
        model_losses(T5ForConditionalGeneration(config), tokens(2))
    with pytest.raises(InvalidRequestError, match=r"batch = keys \['input_ids'\]: must have labels"):
        model_losses(gpt2(), {"input_ids": tokens(2)["input_ids"]})


def smoothed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=0.1)
    return losses.view_as(labels).sum(1) / (labels != -100).sum(1)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    client = PolicyClient("127.0.0.1:1", policy="refused", num_examples=N)
    with pytest.raises(InvalidRequestError, match=r"label_smoothing_factor: needs PolicyTraining\.losses"):
        trainer_of(client, tmp_path, label_smoothing_factor=0.1)
    trainer_of(client, tmp_path, label_smoothing_factor=0.1, policy={"losses": smoothed})
    with pytest.raises(InvalidRequestError, match="method = 'gost': must be one of ghost, jvp, finite_difference, la"):
        TrainingOptions(method="gost")  # type: ignore[arg-type]
    trainer = PolicyTrainer(
        gpt2(), arguments(tmp_path), train_dataset=rows(N, 0), policy=PolicyTraining(client, target=[])
    )
    with pytest.raises(InvalidRequestError, match="target = 0 examples: must be a dataset with a length, of at least"):
        trainer.train()
    copies = nn.DataParallel(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModuleError, match="its copies run no hooks; use one process for each device"):
        GhostContributions(copies, TargetDirection(copies, lambda model, x: model(x).sum(1), [torch.ones(1, 2)]))


class Streamed(torch.utils.data.IterableDataset[Any]):
    """Examples without places."""

    def __init__(self, *, ids: bool) -> None:
        self.ids = ids

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(rows(N, 0)):
            yield {**row, "example_id": index} if self.ids else row


def test_streamed_examples_bring_their_ids(server: ServerProcess, tmp_path: Path) -> None:
    for ids in (True, False):
        with client_of(server, "streamed") as client:
            policy = PolicyTraining(client, target=rows(12, 1))
            args = arguments(tmp_path, max_steps=2)
            trainer = PolicyTrainer(gpt2(), args, train_dataset=Streamed(ids=ids), policy=policy)
            if ids:
                trainer.train()
                assert [sent for sent, _ in client.sent] == [list(range(8)), list(range(8, 16))]
            else:
                with pytest.raises(
                    InvalidRequestError, match="example_id: must be a column of a training dataset without a length"
                ):
                    trainer.train()


class Noting(Trainer):
    """Computes its loss as `Trainer` does, twice as large, and notes what it likes."""

    noted: list[float]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.__dict__.setdefault("noted", []).append(float(outputs["logits"].detach().mean()))
        return (2 * loss, outputs) if return_outputs else 2 * loss


class Alone(Trainer):
    """Computes another loss, all by itself."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = 1e3 * squares_of(model, inputs).mean()
        return (loss, {}) if return_outputs else loss


def squares_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.square().mean((1, 2))


def weighted_step(trainer: Trainer, client: Recording, losses: Any, *, times: float) -> None:
    """Trains one step of SGD without clipping, and compares with the same by hand, under the client's weights."""
    trainer.train()
    [(ids, fields)] = client.sent
    batch = batch_of([rows(N, 0)[i] for i in ids])
    expected = gpt2()
    direction = TargetDirection(expected, losses, [batch_of(rows(12, 1))])
    direction.refresh()
    assert relative_error(torch.tensor(fields["contributions"]), reference(expected, direction, batch)) < 1e-3
    weights = torch.tensor(client.known)[ids]
    assert weights.min() < 1 < weights.max()
    (times * weights * losses(expected, batch)).mean().backward()
    for parameter, moved in zip(expected.parameters(), trainer.model.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(moved, parameter - 0.01 * parameter.grad, rtol=1e-4, atol=1e-6)


def one_step(folder: Path, **options: Any) -> TrainingArguments:
    fixed: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0, "optim": "sgd", "lr_scheduler_type": "constant"}
    return arguments(folder, **fixed, **options)


@pytest.fixture
def learnt(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Recording]:
    """A client whose policy has learnt already."""
    name = "learnt-" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower())
    with client_of(server, name) as client:
        client.known = client.step(np.arange(N), contributions=np.where(np.arange(N) % 2, 1.0, -1.0)).weights
        yield client


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_trainers_own_loss_is_weighed(learnt: Recording, tmp_path: Path, accumulation: int) -> None:
    """Where it comes from, so that all that the trainer does with it is done."""

    class Weighted(PolicyMixin, Noting):
        pass

    policy = PolicyTraining(learnt, target=rows(12, 1))
    args = one_step(tmp_path, gradient_accumulation_steps=accumulation)
    trainer = Weighted(gpt2(), args, train_dataset=rows(N, 0), policy=policy)
    weighted_step(trainer, learnt, lm_losses, times=2)
    assert len(trainer.noted) == accumulation


def test_a_loss_that_cannot_be_weighed_is_refused_and_both_ways_out_are_right(
    server: ServerProcess, learnt: Recording, tmp_path: Path
) -> None:
    class Refused(PolicyMixin, Alone):
        pass

    class Ends(PolicyMixin, Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = 1e3 * self.weigh(squares_of(model, inputs))
            return (loss, {}) if return_outputs else loss

    policy = PolicyTraining(learnt, target=rows(12, 1))
    for method in ("ghost", "jvp"):
        options = PolicyTraining(learnt, target=rows(12, 1), options=TrainingOptions(method=method))  # type: ignore[arg-type]
        trainer: Any = Refused(gpt2(), one_step(tmp_path), train_dataset=rows(N, 0), policy=options)
        with pytest.raises(
            InvalidRequestError,
            match=r"Alone\.compute_loss: .* give PolicyTraining\.losses, .* or let it end in `self\.weigh\(losses\)`",
        ):
            trainer.train()
    learnt.sent = []
    policy = PolicyTraining(learnt, target=rows(12, 1), losses=squares_of)
    trainer = Refused(gpt2(), one_step(tmp_path), train_dataset=rows(N, 0), eval_dataset=rows(4, 5), policy=policy)
    weighted_step(trainer, learnt, squares_of, times=1)
    ends = Ends(gpt2(), one_step(tmp_path), train_dataset=rows(N, 0), eval_dataset=rows(4, 5), policy=policy)
    ends.model.load_state_dict(trainer.model.state_dict())
    assert ends.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])
    learnt.sent = []
    args = one_step(tmp_path, gradient_accumulation_steps=2)
    weighted_step(Ends(gpt2(), args, train_dataset=rows(N, 0), policy=policy), learnt, squares_of, times=1e3)


@pytest.mark.filterwarnings("ignore")  # the compiler itself warns
def test_a_compiled_model_is_refused_and_the_way_out_is_right(learnt: Recording, tmp_path: Path) -> None:
    compiled: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"}
    policy = PolicyTraining(learnt, target=rows(12, 1))
    with pytest.raises(UnsupportedModuleError, match=r'in a trainer TrainingOptions\(method="jvp"\)'):
        PolicyTrainer(gpt2(), one_step(tmp_path, **compiled), train_dataset=rows(N, 0), policy=policy).train()
    policy = PolicyTraining(learnt, target=rows(12, 1), options=TrainingOptions(method="jvp"))
    trainer = PolicyTrainer(gpt2(), one_step(tmp_path, **compiled), train_dataset=rows(N, 0), policy=policy)
    weighted_step(trainer, learnt, lm_losses, times=1)


def test_an_exception_in_mid_step_leaves_nothing_behind(server: ServerProcess, tmp_path: Path) -> None:
    """In the middle of an accumulated step; the same trainer then trains again, as a new one would."""

    class Failing(PolicyMixin, Noting):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if len(self.noted) == 4:
                raise MemoryError
            return loss

    with client_of(server, "mid-step") as client:
        policy = PolicyTraining(client, target=rows(12, 1))
        args = arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_steps=4)
        trainer = Failing(gpt2(), args, train_dataset=rows(N, 0), policy=policy)
        with pytest.raises(MemoryError):
            trainer.train()
        assert [len(ids) for ids, _ in client.sent] == [8]
        assert sum(len(module._forward_hooks) for module in trainer.model.modules()) == 0
        assert trainer.compute_loss_func is None
        trainer.train()
        assert [len(ids) for ids, _ in client.sent] == [8] * 5


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_function_beside_losses_changes_no_gradient(
    learnt: Recording, tmp_path: Path, accumulation: int
) -> None:
    """It is for evaluation; a mean over examples is divided by the accumulated batches, once."""
    policy = PolicyTraining(learnt, target=rows(12, 1), losses=lm_losses)
    args = one_step(tmp_path, gradient_accumulation_steps=accumulation)
    trainer = PolicyTrainer(
        gpt2(),
        args,
        train_dataset=rows(N, 0),
        policy=policy,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean(),
    )
    weighted_step(trainer, learnt, lm_losses, times=1)
    assert trainer.compute_loss_func is not None
    with pytest.raises(InvalidRequestError, match=r"compute_loss_func: needs PolicyTraining\.losses"):
        PolicyTrainer(
            gpt2(),
            args,
            train_dataset=rows(N, 0),
            policy=PolicyTraining(learnt, target=rows(12, 1)),
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean(),
        )


def test_evaluation_data_may_have_ids(server: ServerProcess, tmp_path: Path) -> None:
    with client_of(server, "evaluation-ids") as client:
        trainer = trainer_of(client, tmp_path, max_steps=1)
        trainer.train()
        data = [{**row, "example_id": i} for i, row in enumerate(rows(4, 5))]
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(trainer.evaluate(rows(4, 5))["eval_loss"])
        unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in data]
        assert trainer.predict(unlabelled).predictions.shape == (4, 12, 61)


def test_losses_of_tokens() -> None:
    assert causal_lm_losses(torch.zeros(1, 3, 5), torch.ones(1, 3).long()).item() == pytest.approx(np.log(5))
