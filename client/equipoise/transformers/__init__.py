"""The Hugging Face `Trainer` under a policy, in four lines.

Example:
    >>> client = PolicyClient("localhost:50051", policy="run-7", num_examples=len(train), rule="ema_sign")
    >>> policy = PolicyTraining(client, target=target, guard=guard)
    >>> trainer = PolicyTrainer(model, arguments, train_dataset=train, policy=policy)
    >>> trainer.train()

Other trainers take the mixin: `class MyTrainer(PolicyMixin, SFTTrainer)`.

Needs transformers: `pip install 'equipoise[transformers]'`.
"""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "equipoise.transformers needs transformers: pip install 'equipoise[transformers]'", name="transformers"
    ) from error

from equipoise.transformers.losses import model_losses
from equipoise.transformers.trainer import PolicyMixin, PolicyTrainer, PolicyTraining

__all__ = ["PolicyMixin", "PolicyTrainer", "PolicyTraining", "model_losses"]
