"""What cannot be right is refused, and the way out that the message names is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import trl
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from trl import KTOConfig, KTOTrainer, SFTTrainer
from trl.trainer import utils

from equipoise.errors import InvalidRequestError
from equipoise.testing import ServerProcess
from equipoise.torch import causal_lm_losses
from equipoise.torch.errors import UnsupportedModuleError
from equipoise.torch.training import TrainingOptions
from equipoise.transformers import PolicyMixin, PolicyTraining
from tests.client.torch.trl.formulas import relative_error
from tests.client.torch.trl.jobs import (
    SPECIAL,
    WORDS,
    N,
    checked,
    client_of,
    dataset,
    examples,
    llama,
    tokenizer,
    under_policy,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


REFUSED: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]] = {
    "wrapped": (
        "sft",
        "text",
        {"packing": True, "max_length": 24, "packing_strategy": "wrapped"},
        "packing_strategy = wrapped: lets examples of a row see each other.*use packing_strategy='bfd_split'",
        {"packing_strategy": "bfd_split"},
    ),
    "selective": (
        "sft",
        "text",
        {"gradient_checkpointing_kwargs": {"selective": True}},
        "gradient_checkpointing_kwargs = selective: allows one backward pass a step.*leave it out",
        {"gradient_checkpointing_kwargs": None},
    ),
    "aot": (
        "dpo",
        "pairs",
        {"loss_type": ["aot"], "precompute_ref_log_probs": True},
        "loss_type = aot: sorts the pairs of a batch.*such as loss_type='apo_zero'",
        {"loss_type": "apo_zero"},
    ),
    "aot_unpaired": (
        "dpo",
        "pairs",
        {"loss_type": ["sigmoid", "aot_unpaired"], "precompute_ref_log_probs": True},
        "loss_type = aot_unpaired: sorts the pairs of a batch.*such as loss_type='apo_zero'",
        {"loss_type": "apo_zero"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_the_way_out(server: ServerProcess, tmp_path: Path, case: str) -> None:
    kind, data, options, message, instead = REFUSED[case]
    settings, made = checked()
    with client_of(server, f"refused-{case}".replace("_", "-")) as client:
        policy = PolicyTraining(client, target=dataset(data, 6, 1), options=settings)
        with pytest.raises(InvalidRequestError, match=message):
            under_policy(kind, llama(), tmp_path, dataset(data), policy, **options)
        under_policy(kind, llama(), tmp_path, dataset(data), policy, **(options | instead)).train()
        assert max(made[0].errors()) < 2e-6


def test_groups_are_refused(server: ServerProcess, tmp_path: Path) -> None:
    with client_of(server, "refused-groups") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1), group_column="source")
        with pytest.raises(InvalidRequestError, match=r"group_column = .*source.*: is not for TRL's trainers"):
            under_policy("sft", llama(), tmp_path, dataset("text"), policy)


def test_the_balance_of_experts_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    def mixtral() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
        sizes |= {"vocab_size": len(SPECIAL) + WORDS, "pad_token_id": 0}
        return MixtralForCausalLM(MixtralConfig(**sizes, **experts, experts_implementation="eager"))

    settings, made = checked()
    with client_of(server, "balance") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1), options=settings)
        with pytest.raises(InvalidRequestError, match=r"router_aux_loss_coef = 0\.001: must be 0\.0 under a policy"):
            under_policy("sft", mixtral(), tmp_path, dataset("text"), policy)
        under_policy("sft", mixtral().double(), tmp_path, dataset("text"), policy, router_aux_loss_coef=0.0).train()
    assert len(made[0].errors()) >= 2  # of checkpointed experts nothing is known in the first step
    assert max(made[0].errors()) < 2e-6


class PolicyKTO(PolicyMixin, KTOTrainer):
    """A trainer whose loss of an example depends on the others."""


def test_other_trainers_need_losses(server: ServerProcess, tmp_path: Path) -> None:
    pairs = examples("pairs", N, 0)
    train = Dataset.from_list(
        [{"prompt": e["prompt"], "completion": e["chosen"], "label": i % 2 == 0} for i, e in enumerate(pairs)]
    )
    args = KTOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=2, loss_type="apo_zero_unpaired"
    )

    def losses(model: Any, batch: dict[str, Any]) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        logps = -F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
        return torch.where(batch["label"], 1 - logps.sigmoid(), logps.sigmoid())

    def trainer(client: Any, **options: Any) -> Any:
        policy = PolicyTraining(client, target=train.select(range(6)), **options)
        given = {"args": args, "train_dataset": train, "processing_class": tokenizer(), "ref_model": llama()}
        return PolicyKTO(llama(), policy=policy, **given)

    with client_of(server, "kto") as client:
        with pytest.raises(InvalidRequestError, match=r"losses: must be given for KTOTrainer.* SFTTrainer, DPO"):
            trainer(client)
        settings, made = checked()
        trainer(client, losses=losses, options=settings).train()
    assert max(made[0].errors()) < 2e-6


def test_a_loss_that_is_not_made_of_the_examples_is_found_out(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda self, *args, **kwargs: own(self, *args, **kwargs) / 2)
    with client_of(server, "halved") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1))
        with pytest.raises(InvalidRequestError, match=r"examples' losses make 4.*, where its own is 2.*losses=\.\.\."):
            under_policy("sft", llama(), tmp_path, dataset("text"), policy).train()


def test_older_versions_are_refused(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    with client_of(server, "older") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1))
        with pytest.raises(InvalidRequestError, match=r"trl = 1\.15\.0: must be 1\.16 or newer"):
            under_policy("sft", llama(), tmp_path, dataset("text"), policy)


def test_a_version_with_another_kernel_is_refused_and_losses_of_ones_own_are_the_way_out(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is TRL's own affair, and may change."""
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")

    def losses(model: Any, batch: dict[str, Any]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return causal_lm_losses(logits, batch["labels"])

    settings, made = checked()
    with client_of(server, "renamed") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1), options=settings)
        with pytest.raises(InvalidRequestError, match=r"trl = .*: must compute .*'trl==1\.16\.\*', or give PolicyTr"):
            under_policy("sft", llama(), tmp_path, dataset("text"), policy)
        policy = PolicyTraining(client, target=dataset("text", 6, 1), losses=losses, options=settings)
        under_policy("sft", llama(), tmp_path, dataset("text"), policy).train()
    assert max(made[0].errors()) < 2e-6


def test_rows_that_are_no_examples_are_not_drawn(server: ServerProcess, tmp_path: Path) -> None:
    with client_of(server, "drawn") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1), options=TrainingOptions(sampled=True))
        for options in ({"packing": True, "max_length": 32}, {"max_length": 7, "completion_only_loss": True}):
            data = dataset("completion" if "completion_only_loss" in options else "text")
            with pytest.raises(
                InvalidRequestError, match=r"sampled = True: draws places .* rows of TRL that are packed"
            ):
                under_policy("sft", llama(), tmp_path, data, policy, **options)
        under_policy("sft", llama(), tmp_path, dataset("text"), policy).train()
        assert len(client.sent) == 3


def test_a_target_that_can_not_be_had(server: ServerProcess, tmp_path: Path) -> None:
    """All too long, or a stream."""
    with client_of(server, "target") as client:
        stream = IterableDataset.from_generator(lambda: iter(examples("text", 6, 1)))
        for target, options in (
            (dataset("completion", 6, 1), {"max_length": 2, "completion_only_loss": True}),
            (stream, {}),
            ([], {}),
        ):
            policy = PolicyTraining(client, target=target)
            with pytest.raises(InvalidRequestError, match=r"target = .*: must be a dataset with a length, of at least"):
                under_policy("sft", llama(), tmp_path, dataset("text"), policy, **options).train()


def test_compiled_models_are_refused(server: ServerProcess, tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "eager", "gradient_checkpointing": False}
    with client_of(server, "compiled") as client:
        policy = PolicyTraining(client, target=dataset("text", 6, 1))
        with pytest.raises(UnsupportedModuleError, match=r'TrainingOptions\(method="jvp"\)'):
            under_policy("sft", llama(), tmp_path, dataset("text"), policy, **options).train()
        found = []
        for compiled in (options, {}):
            way = TrainingOptions(method="jvp" if compiled else "ghost")
            policy = PolicyTraining(client, target=dataset("text", 6, 1), options=way)
            client.sent = []
            under_policy("sft", llama(), tmp_path, dataset("text"), policy, max_steps=1, **compiled).train()
            found.append(client.sent[0][1]["contributions"])
        assert relative_error(*found) < 1e-5
