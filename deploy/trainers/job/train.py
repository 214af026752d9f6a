"""A training job without a framework: two pods, each with half of the data, share one policy.

A fifth of the training labels is wrong, and 200 trusted examples say what is wanted.
"""

import os

import numpy as np

from equipoise import PolicyClient

NUM_EXAMPLES, SHARES = 1000, 2
STEPS = int(os.environ.get("STEPS", "300"))

rng = np.random.default_rng(0)
truth = rng.normal(size=50)
inputs, target_inputs = rng.normal(size=(NUM_EXAMPLES, 50)), rng.normal(size=(200, 50))
flipped = rng.random(NUM_EXAMPLES) < 0.2
labels, target_labels = (inputs @ truth > 0) ^ flipped, target_inputs @ truth > 0

index = int(os.environ["JOB_COMPLETION_INDEX"])
share = np.arange(index, NUM_EXAMPLES, SHARES)


def errors(model: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Derivative of the logistic loss by the logits."""
    return 1 / (1 + np.exp(-inputs @ model)) - labels


model = np.zeros(50)
draws = np.random.default_rng(index)
with PolicyClient(
    os.environ["POLICY_SERVER"], policy=os.environ["POLICY_NAME"], num_examples=NUM_EXAMPLES, rule="ema_sign"
) as client:
    for _ in range(STEPS):
        ids = draws.choice(share, size=100)
        gradients = errors(model, inputs[ids], labels[ids])[:, None] * inputs[ids]
        target_gradient = errors(model, target_inputs, target_labels) @ target_inputs / 200
        weights = client.step(ids, contributions=gradients @ target_gradient).weights
        model -= 0.5 * weights @ gradients / len(ids)
    client.flush(60, durable=True)
    scores = client.read_weights("score")[share]

worst = np.argsort(scores)[: flipped[share].sum()]
print(f"{flipped[share][worst].mean():.0%} of this share's examples with the lowest scores are mislabelled", flush=True)
