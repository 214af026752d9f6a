"""A Ray job: trainers on the cluster's workers share one policy.

A fifth of the training labels is wrong, and 200 trusted examples say what is wanted.
"""

import os

import numpy as np
import ray

NUM_EXAMPLES, TRAINERS, STEPS = 1000, 2, 300
SERVER, POLICY = os.environ["POLICY_SERVER"], os.environ["POLICY_NAME"]

rng = np.random.default_rng(0)
truth = rng.normal(size=50)
inputs, target_inputs = rng.normal(size=(NUM_EXAMPLES, 50)), rng.normal(size=(200, 50))
flipped = rng.random(NUM_EXAMPLES) < 0.2
labels, target_labels = (inputs @ truth > 0) ^ flipped, target_inputs @ truth > 0


@ray.remote(num_cpus=1)
def train(index: int) -> np.ndarray:
    """Trains on one trainer's share; the scores of all examples when it ends."""
    from equipoise import PolicyClient  # in the worker's process: a client does not travel

    def errors(model: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-inputs @ model)) - labels

    model, share = np.zeros(50), np.arange(index, NUM_EXAMPLES, TRAINERS)
    draws = np.random.default_rng(index)
    with PolicyClient(SERVER, policy=POLICY, num_examples=NUM_EXAMPLES, rule="ema_sign") as client:
        for _ in range(STEPS):
            ids = draws.choice(share, size=100)
            gradients = errors(model, inputs[ids], labels[ids])[:, None] * inputs[ids]
            target_gradient = errors(model, target_inputs, target_labels) @ target_inputs / 200
            weights = client.step(ids, contributions=gradients @ target_gradient).weights
            model -= 0.5 * weights @ gradients / len(ids)
        client.flush(60, durable=True)
        return client.read_weights("score")[share]


ray.init()
shares = ray.get([train.remote(index) for index in range(TRAINERS)])
scores = np.empty(NUM_EXAMPLES)
for index, share in enumerate(shares):
    scores[index::TRAINERS] = share
worst = np.argsort(scores)[: flipped.sum()]
print(f"{flipped[worst].mean():.0%} of the examples with the lowest scores are mislabelled", flush=True)
