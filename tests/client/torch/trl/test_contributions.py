"""What is sent: contributions and losses of each example, right in every way of training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from datasets import Dataset
from torch import Tensor
from torch.autograd import forward_ad

from equipoise.testing import ServerProcess
from equipoise.torch.training import TrainingOptions
from equipoise.transformers import PolicyTraining
from equipoise.transformers.trl import head
from tests.client.torch.trl.cases import TRAINED, adapted, given_for, model_for
from tests.client.torch.trl.formulas import contributions_of, ids_of, margin, relative_error, spelt, token_mean
from tests.client.torch.trl.jobs import (
    N,
    checked,
    client_of,
    dataset,
    examples,
    llama,
    plain,
    reward_model,
    under_policy,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


SFT: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {}),
    "text, one by one": ("text", {"per_device_train_batch_size": 1}),
    "text, without checkpointing": ("text", {"gradient_checkpointing": False}),
    "prompt and completion": ("completion", {}),
    "prompt and completion, all tokens": ("completion", {"completion_only_loss": False}),
    "messages": ("messages", {}),
    "messages, assistant only": ("messages", {"assistant_only_loss": True}),
    "chat": ("chat", {}),
    "dft": ("text", {"loss_type": "dft"}),
    "padding-free": ("text", {"padding_free": True, "max_length": None}),
    "padding-free, padded all the same": ("text", {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16}),
    "packed": ("text", {"packing": True, "max_length": 32}),
    "packed, prompts": ("completion", {"packing": True, "max_length": 32}),
    "packed, split": ("text", {"packing": True, "max_length": 24, "packing_strategy": "bfd_split"}),
    "packed, shuffled": ("text", {"packing": True, "max_length": 32, "shuffle_dataset": True}),
    "two processes prepare": ("text", {"dataset_num_proc": 2}),
    "all columns": ("text", {"remove_unused_columns": False, "dataset_kwargs": {}}),
}


@pytest.mark.parametrize("case", SFT)
def test_sft(server: ServerProcess, tmp_path: Path, case: str) -> None:
    """Contributions and losses of the first step are those of an independent formula; then of the definition."""
    kind, options = SFT[case]
    train, target = examples(kind, N, 0), examples(kind, 6, 1)
    every = "completion_only_loss" in options or (kind == "messages" and "assistant_only_loss" not in options)
    given, made = checked()
    with client_of(server, "sft-" + "".join(filter(str.isalnum, case))) as client:
        policy = PolicyTraining(client, target=Dataset.from_list(target), guard=dataset(kind, 3, 2), options=given)
        trainer = under_policy("sft", llama(), tmp_path, Dataset.from_list(train), policy, **options)
        trainer.train()
        ids, fields = client.sent[0]

    def loss_of(example: dict[str, Any]) -> Any:
        tokens, predicted = spelt(example)
        predicted = [True] * len(tokens) if every else predicted
        return lambda: token_mean(model, tokens, predicted, dft=options.get("loss_type") == "dft")

    model = llama()
    expected, losses = contributions_of(model, [loss_of(train[i]) for i in ids], [loss_of(e) for e in target])
    assert relative_error(fields["losses"], losses) < 1e-6
    assert relative_error(fields["contributions"], expected) < 2e-6
    assert {"guard_loss", "target_loss"} <= fields.keys()
    assert len(made[0].errors()) == 3
    assert max(made[0].errors()) < 1e-6
    assert made[0].coverage.gaps == 0
    logged = trainer.state.log_history[0]
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= logged.keys()


@pytest.mark.parametrize("case", TRAINED)
def test_contributions_are_those_of_a_backward_pass_for_each_example(
    server: ServerProcess, tmp_path: Path, case: str
) -> None:
    kind, data, options = TRAINED[case][0], TRAINED[case][1], dict(TRAINED[case][2])
    dtype = torch.float32 if options.get("bf16") else torch.float64
    model, given = model_for(kind, dtype=dtype, **options.pop("model", {})), given_for(options, dtype)
    settings, made = checked()
    with client_of(server, "each-" + "".join(filter(str.isalnum, case)).lower()) as client:
        policy = PolicyTraining(client, target=dataset(data, 6, 1), guard=dataset(data, 3, 2), options=settings)
        trainer = under_policy(kind, model, tmp_path, dataset(data), policy, given=given, **options)
        if "peft_config" in given:
            adapted(trainer.model)
        trainer.train()
        sent = [fields for _, fields in client.sent]
    assert len(made[0].errors()) == 3 * options.get("gradient_accumulation_steps", 1)
    assert max(made[0].errors()) < (0.05 if options.get("bf16") else 2e-6)
    assert made[0].coverage.gaps == 0
    assert "target_loss" in sent[0]
    assert all(np.isfinite(fields["losses"]).all() for fields in sent)


LOSS_TYPES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sigmoid_norm": {},
    "sigmoid, js": {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "mixed": {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
}


@pytest.mark.parametrize("case", LOSS_TYPES)
def test_dpo_by_each_of_its_loss_types(server: ServerProcess, tmp_path: Path, case: str) -> None:
    """A pair's loss is TRL's of this pair alone; "sigmoid" and its contributions by an independent formula."""
    options = {"loss_type": [case], "max_steps": 1, "beta": 0.5, **LOSS_TYPES[case]}
    settings, made = checked()
    given = given_for({"given": {"ref_model": True}}, torch.float64)
    name = f"type-{case}".replace("_", "-").replace(", ", "-")
    with client_of(server, name) as client:
        policy = PolicyTraining(client, target=dataset("pairs", 6, 1), options=settings)
        under_policy("dpo", llama(), tmp_path, dataset("pairs"), policy, given=given, **options).train()
        [(ids, fields)] = client.sent
    assert max(made[0].errors()) < 2e-6
    given = given_for({"given": {"ref_model": True}}, torch.float64)
    alone = plain("dpo", llama(), tmp_path, dataset("pairs"), given=given, **options)
    batches = [alone.data_collator([alone.train_dataset[i]]) for i in ids]
    with torch.no_grad():
        losses = [float(alone.compute_loss(alone.model, batch)) for batch in batches]
    assert fields["losses"] == pytest.approx(losses, rel=1e-6)
    if case == "sigmoid":
        model, pairs, wanted = llama(), examples("pairs", N, 0), examples("pairs", 6, 1)
        ref: Any = alone.ref_model

        def loss_of(pair: dict[str, str]) -> Any:
            return lambda: -F.logsigmoid(0.5 * (margin(model, pair) - margin(ref, pair).detach()))

        expected, known = contributions_of(model, [loss_of(pairs[i]) for i in ids], [loss_of(e) for e in wanted])
        assert relative_error(fields["losses"], known) < 1e-6
        assert relative_error(fields["contributions"], expected) < 2e-6


def test_reward_by_an_independent_formula(server: ServerProcess, tmp_path: Path) -> None:
    """With margins."""
    pairs, wanted = (
        [{**e, "margin": 0.1 * i} for i, e in enumerate(examples("pairs", n, s))] for n, s in ((N, 0), (6, 1))
    )
    model = reward_model()

    def loss_of(pair: dict[str, Any]) -> Any:
        def score(answer: str) -> Tensor:
            tokens = [*ids_of(pair["prompt"] + answer), 3]
            value: Tensor = model(input_ids=torch.tensor([tokens])).logits[0, 0]
            return value

        return lambda: -F.logsigmoid(score(pair["chosen"]) - score(pair["rejected"]) - pair["margin"])

    with client_of(server, "reward") as client:
        policy = PolicyTraining(client, target=wanted)  # a list of examples will do
        trained = reward_model()
        under_policy("reward", trained, tmp_path, Dataset.from_list(pairs), policy, max_steps=1).train()
        [(ids, fields)] = client.sent
    expected, losses = contributions_of(model, [loss_of(pairs[i]) for i in ids], [loss_of(e) for e in wanted])
    assert relative_error(fields["losses"], losses) < 1e-6
    assert relative_error(fields["contributions"], expected) < 2e-6


@pytest.mark.parametrize("method", ["jvp", "finite_difference"])
@pytest.mark.parametrize(("kind", "options"), [("sft", {"packing": True, "max_length": 32}), ("dpo", {})])
def test_by_a_second_forward_pass(
    server: ServerProcess, tmp_path: Path, method: Any, kind: str, options: dict[str, Any]
) -> None:
    """The same contributions as by hooks."""
    data, found = "text" if kind == "sft" else "pairs", []
    for way in ("ghost", method):
        given = {"given": {"ref_model": True}} if kind == "dpo" else {}
        with client_of(server, f"second-{kind}-{method}-{way}".replace("_", "-")) as client:
            choice = TrainingOptions(method=way)
            policy = PolicyTraining(client, target=dataset(data, 6, 1), options=choice)
            dtype = torch.float64 if method == "jvp" else torch.float32
            model, more = llama(dtype=dtype), given_for(dict(given), dtype)
            under_policy(kind, model, tmp_path, dataset(data), policy, given=more, max_steps=1, **options).train()
            found.append(client.sent[0][1]["contributions"])
    assert relative_error(found[1], found[0]) < (1e-5 if method == "jvp" else 0.02)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"logit_scale": 0.3, "temperature": 0.7}])
def test_tangents_of_log_probabilities(monkeypatch: pytest.MonkeyPatch, options: dict[str, float]) -> None:
    """Against forward-mode differentiation of the plain formula, tile by tile; some inputs may not move."""
    torch.manual_seed(0)
    monkeypatch.setattr(head, "_ROWS", 3)
    monkeypatch.setattr(head, "_COLUMNS", 4)
    x, w, b = torch.randn(7, 5).double(), torch.randn(11, 5).double(), torch.randn(11).double()
    targets = torch.randint(11, (7,))
    given = head.Options(
        **{"temperature": 1.0, "chunk_size": 4, "softcap": None, "logit_scale": 1.0, "outputs": (), **options}
    )

    def formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = (x @ w.T + b) * given.logit_scale
        z = z if given.softcap is None else torch.tanh(z / given.softcap) * given.softcap
        return (z / given.temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    moves = torch.randn_like(x), torch.randn_like(w), torch.randn_like(b)
    for moved in ((0, 1, 2), (1,), (0,), (2,)):
        zeros = tuple(move if place in moved else torch.zeros_like(move) for place, move in enumerate(moves))
        values, expected = torch.func.jvp(formula, (x, w, b), zeros)
        with torch.no_grad(), forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(value, moves[place]) if place in moved else value
                for place, value in enumerate((x, w, b))
            ]
            found = forward_ad.unpack_dual(head._scored(*dual, targets, given)[0])
        torch.testing.assert_close(found.primal.double(), values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.tangent.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "data", "options"),
    [
        ("sft", "completion", {}),
        ("sft", "completion", {"packing": True, "max_length": 32}),
        ("sft", "completion", {"max_length": 7}),
        ("dpo", "pairs", {"precompute_ref_log_probs": True}),
    ],
)
@pytest.mark.parametrize("method", ["ghost", "jvp"])
def test_where_only_positions_with_labels_are_scored(
    server: ServerProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    data: str,
    options: dict[str, Any],
    method: str,
) -> None:
    """As TRL does on devices that have Triton: the same contributions, and the same training as TRL's."""
    with client_of(server, f"scored-{kind}-{len(options)}-{options.get('max_length', 0)}-{method}") as client:
        client.sent = []
        for compact in (True, False):
            monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device, compact=compact: compact)
            way = TrainingOptions(method=method if compact else "ghost")  # type: ignore[arg-type]
            policy = PolicyTraining(client, target=dataset(data, 6, 1), options=way)
            under_policy(kind, llama(), tmp_path, dataset(data), policy, max_steps=1, **options).train()
    (ids, compact_fields), (same_ids, fields) = client.sent
    assert ids == same_ids
    known = fields["scored"]
    assert relative_error(compact_fields["contributions"][known], fields["contributions"][known]) < 2e-6
    assert compact_fields["losses"] == pytest.approx(fields["losses"], rel=1e-6)


def test_a_target_in_any_form(server: ServerProcess, tmp_path: Path) -> None:
    """Raw, tokenised, prepared by a trainer of TRL's, packed by one, or a list: it is the same direction."""
    raw = dataset("text", 6, 1)
    tokenised = raw.map(lambda example: {"input_ids": spelt(example)[0]}, remove_columns=["text"])
    prepared = plain("sft", llama(), tmp_path, raw).train_dataset
    packed = plain("sft", llama(), tmp_path, raw, packing=True, max_length=32).train_dataset
    assert len(packed) < 6
    options: dict[str, Any] = {"packing": True, "max_length": 32, "max_steps": 1}
    with client_of(server, "forms") as client:
        for target in (raw, tokenised, prepared, packed, examples("text", 6, 1)):
            policy = PolicyTraining(client, target=target)
            under_policy("sft", llama(), tmp_path, dataset("text"), policy, **options).train()
    first = client.sent[0][1]
    for _, fields in client.sent[1:]:
        assert fields["target_loss"] == pytest.approx(first["target_loss"], rel=1e-6)
        assert relative_error(fields["contributions"], first["contributions"]) < 2e-6
