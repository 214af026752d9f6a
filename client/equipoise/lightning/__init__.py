"""Lightning under a policy, in four lines.

Example:
    >>> client = PolicyClient("localhost:50051", policy="run-7", num_examples=len(train), rule="strata")
    >>> policy = PolicyCallback(client, example_losses, target_batches)
    >>> class Model(lightning.LightningModule):
    ...     def training_step(self, batch, batch_idx):
    ...         return policy.loss(batch["id"], batch)  # instead of the mean of example_losses(self, batch)
    >>> lightning.Trainer(callbacks=[policy]).fit(model, loader)

A module that makes its forward pass itself gives the losses instead, and may skip a batch:

    >>> def training_step(self, batch, batch_idx):
    ...     losses = F.cross_entropy(self(batch["x"]), batch["y"], reduction="none")
    ...     return policy.weigh(batch["id"], losses) if losses.isfinite().all() else None

Needs Lightning: `pip install 'equipoise[lightning]'`.
"""

try:
    import lightning as _lightning  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    raise ModuleNotFoundError(
        "equipoise.lightning needs Lightning: pip install 'equipoise[lightning]'", name="lightning"
    ) from error

from equipoise.lightning.callback import PolicyCallback
from equipoise.torch.training import TrainingOptions

__all__ = ["PolicyCallback", "TrainingOptions"]
