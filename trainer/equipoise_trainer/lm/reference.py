"""RHO's reference model: what the desired distribution teaches, learned from target A alone."""

import copy
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from equipoise_trainer.lm.learner import Learner, LearnerConfig
from equipoise_trainer.lm.steps import PlainSteps, Surroundings

STEPS = 60
"""Of its training; the state with the lowest loss on B counts. A model on A alone is at its best after some 50."""
MEASURED_EVERY = 10
SEED_OFFSET = 1000
"""Its first weights are others than those of the model that it judges."""


def reference_losses(around: Surroundings, config: LearnerConfig) -> NDArray[np.float64]:
    """Loss of each training sequence under a model of the same shape that was trained on target A: [N], nats.

    Training it, measuring B, and the losses are all counted by the meter of the run.
    """
    learner = Learner(replace(config, seed=config.seed + SEED_OFFSET))
    steps = PlainSteps(replace(around, learner=learner), data="target")
    lowest, best = float("inf"), copy.deepcopy(learner.model.state_dict())
    for step in range(STEPS):
        steps.make(step)
        learner.step(step)
        if (step + 1) % MEASURED_EVERY == 0:
            loss = learner.measure(around.task.guard)
            around.meter.forward += len(around.task.guard)
            if loss < lowest:
                lowest, best = loss, copy.deepcopy(learner.model.state_dict())
    learner.model.load_state_dict(best)
    train = around.task.train
    around.meter.forward += len(train)
    return learner.each(train)
