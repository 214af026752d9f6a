"""Sketches through a server: it serves what the rule makes of their products."""

import asyncio

import numpy as np
import pytest

from equipoise import PolicyClient, Source, aio
from equipoise.errors import InvalidRequestError
from tests.patience import PATIENT
from tests.servers import ServerProcess

NUM_EXAMPLES, ROWS, K = 300, 48, 37


def batches(kind: type) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids (some repeated), sketches and target sketches of some steps."""
    random = np.random.default_rng(7)
    return [
        (
            random.integers(0, NUM_EXAMPLES, ROWS),
            random.standard_normal((ROWS, K)).astype(kind),
            random.standard_normal(K).astype(kind),
        )
        for _ in range(12)
    ]


def products(sketches: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The client's own product in float64."""
    return (sketches.astype(np.float64) * target.astype(np.float64)).sum(axis=1).astype(np.float32)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_the_server_s_contributions_equal_the_client_s_float64_product(server: ServerProcess, kind: type) -> None:
    name = f"sketches-{kind.__name__}"
    with (
        PolicyClient(
            server.address, policy=name, num_examples=NUM_EXAMPLES, rule="ema_relu", timeout=PATIENT
        ) as sketching,
        PolicyClient(
            server.address, policy=f"{name}-own", num_examples=NUM_EXAMPLES, rule="ema_relu", timeout=PATIENT
        ) as multiplying,
    ):
        for ids, sketches, target in batches(kind):
            served = sketching.step(ids, gradient_sketches=sketches, target_sketch=target)
            own = multiplying.step(ids, contributions=products(sketches, target))
            assert served.source is Source.SERVED
            np.testing.assert_allclose(served.weights, own.weights, rtol=1e-6)
        scores = [client.read_weights("score") for client in (sketching, multiplying)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5, atol=1e-6)
    assert np.nanstd(scores[0]) > 0.1


def test_rows_that_are_not_scored_may_hold_nan(server: ServerProcess) -> None:
    sketches = np.array([[1.0, 2.0], [np.nan, 0.0]], np.float32)
    with PolicyClient(server.address, policy="sketches-nan", num_examples=4, timeout=PATIENT) as client:
        client.step([0, 1], gradient_sketches=sketches, target_sketch=np.ones(2, np.float32), scored=[1, 0])
        scores = client.read_weights("score")
    assert np.isnan(scores).tolist() == [False, True, True, True]


def test_asyncio_callers_send_sketches_too(server: ServerProcess) -> None:
    async def run() -> np.ndarray:
        async with aio.PolicyClient(server.address, policy="sketches-aio", num_examples=4, timeout=PATIENT) as client:
            sketches = np.array([[1.0, 2.0], [-1.0, -2.0]], np.float32)
            result = await client.step([2, 3], gradient_sketches=sketches, target_sketch=np.ones(2, np.float32))
            return result.weights

    weights = asyncio.run(run())
    assert weights[0] > 1.9 > 0.1 > weights[1]


def test_a_client_refuses_what_the_server_would(server: ServerProcess) -> None:
    sketches, target = np.ones((2, 3), np.float32), np.ones(3, np.float32)
    with PolicyClient(server.address, policy="sketches-bad", num_examples=4, timeout=PATIENT) as client:
        for fields, message in (
            ({"gradient_sketches": sketches}, "target_sketch: must be given with gradient_sketches"),
            ({"gradient_sketches": sketches, "target_sketch": target[:2]}, r"must have the sketches' k values"),
            (
                {"gradient_sketches": sketches, "target_sketch": target, "contributions": [1.0, 1.0]},
                "contributions or sketches, not both",
            ),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                client.step([0, 1], **fields)
