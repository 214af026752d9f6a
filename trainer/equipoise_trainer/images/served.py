"""Networks trained under a policy, as a user's would be.

Shape legend: N training images.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from equipoise import PolicyClient, PolicySpec, Timeout
from equipoise.torch import TrainingOptions, weighted_steps
from equipoise_trainer.images.data import ImageTask, order
from equipoise_trainer.images.network import Losses, Schedule, Trained, build, example_losses, score
from equipoise_trainer.images.rivals import Outcome

RULES: Final[Mapping[str, str | None]] = {"served": None, "ema-sign": "ema_sign"}
"""Methods under a policy, and their rules; None: that of the experiment, with its settings."""


def served(
    task: ImageTask, schedule: Schedule, *, address: str, spec: PolicySpec, options: TrainingOptions
) -> tuple[Outcome, Mapping[str, Any]]:
    """A network trained under a policy by the lines of the README, and what the policy came to.

    Args:
        task: ids are the places of the training images.
        schedule: as of any other method.
        address: `host:port` of the server.
        spec: the policy.
        options: how contributions are measured.
    """
    network: nn.Module = build(schedule.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=schedule.learning_rate)
    trained = Trained(network, Losses.of(len(task.train)))
    with PolicyClient(
        address,
        policy=spec.name,
        num_examples=spec.num_examples,
        rule=spec.rule,
        settings=spec.settings,
        timeout=Timeout(step=30.0, call=60.0),
    ) as client:
        steps = weighted_steps(
            client,
            network,
            example_losses,
            task.target.batches(schedule.batch),
            guard=task.guard.batches(schedule.batch),
            options=options,
        )
        for epoch in range(schedule.epochs):
            for ids in order(len(task.train), batch=schedule.batch, seed=schedule.seed, epoch=epoch):
                batch = task.train.take(ids)
                with steps.capture(ids) as step:
                    step.loss((batch.pixels, batch.labels)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
            trained.curve.append(score(network, task.test))
        steps.close()
        client.flush()
        scores, status = _scores(client, spec.rule), client.status()
        facts = {
            "rule": status.spec.rule,
            "settings": dict(status.spec.settings),
            "steps": status.version,
            "effective_examples": status.effective_examples,
            "guard_strength": status.guard_strength,
            "guard_trials_won": status.guard_trials_won,
            "guard_trials_lost": status.guard_trials_lost,
            "strata_contrast": status.strata_contrast,
            "not_served": client.stats.fallbacks,
        }
    return Outcome(trained=trained, scores=scores), facts


def _scores(client: PolicyClient, rule: str) -> NDArray[np.float64]:
    """What the policy makes of each example, [N]; low: wrong; NaN: never scored."""
    scores = client.read_weights("score").astype(float)
    if rule != "strata":
        return scores
    seen = ~np.isnan(scores)  # examples of a stratum have its score: among them the larger loss is the worse
    scores[seen] = np.lexsort((-client.read_weights("loss")[seen], scores[seen])).argsort()
    return scores
