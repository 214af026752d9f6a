"""The Hugging Face `Trainer` under a policy, in four lines.

Example:
    >>> client = PolicyClient("localhost:50051", policy="run-7", num_examples=len(train), rule="strata")
    >>> policy = PolicyTraining(client, target=target, guard=guard)
    >>> trainer = PolicyTrainer(model, arguments, train_dataset=train, policy=policy)
    >>> trainer.train()

Other trainers take the mixin, `class MyTrainer(PolicyMixin, Trainer)`, which weighs the loss of their own
`compute_loss`; see there for losses that it cannot weigh.

TRL's trainers (1.16 or newer) take it, too, with raw data as TRL takes it, packed or not:

    >>> class PolicySFTTrainer(PolicyMixin, SFTTrainer): ...
    >>> PolicySFTTrainer("Qwen/Qwen3-0.6B", SFTConfig(packing=True), train_dataset=train, policy=policy).train()

`GRPOTrainer` and `RLOOTrainer` learn from prompts that the policy draws, by how often their completions succeed; see
`PromptMixin`:

    >>> class PromptGRPOTrainer(PromptMixin, GRPOTrainer): ...
    >>> client = PolicyClient("localhost:50051", policy="maths", num_examples=len(prompts), rule="learnability")
    >>> PromptGRPOTrainer(model, correct, train_dataset=prompts, policy=PromptTraining(client)).train()

Needs transformers: `pip install 'equipoise[transformers]'`, or `'equipoise[trl]'`.
"""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "equipoise.transformers needs transformers: pip install 'equipoise[transformers]'", name="transformers"
    ) from error

from equipoise.torch.training import TrainingOptions
from equipoise.transformers.losses import model_losses
from equipoise.transformers.trainer import PolicyMixin, PolicyTrainer, PolicyTraining
from equipoise.transformers.trl.prompts import PromptMixin, PromptSampler, PromptTraining

__all__ = [
    "PolicyMixin",
    "PolicyTrainer",
    "PolicyTraining",
    "PromptMixin",
    "PromptSampler",
    "PromptTraining",
    "TrainingOptions",
    "model_losses",
]
