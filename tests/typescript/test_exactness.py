"""What the TypeScript client is answered, beside the Python client and the golden vectors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from equipoise import PolicyClient
from tests.servers import ServerProcess
from tests.typescript.node import Json, float32s, play

NUM_EXAMPLES = 300
RULES: dict[str, dict[str, float]] = {
    "uniform": {},
    "ema_sign": {"floor": 0.1},
    "ema_relu": {},
    "exponentiated_gradient": {"learning_rate": 0.5},
    "projected_gradient": {"step_size": 0.5},
    "rho": {},
    "boltzmann": {},
    "loss_linear_upper": {},
    "excess_loss": {},
    "exp3": {"temperature": 0.5},
    "group_dro": {"learning_rate": 0.5, "adjustment": 1.0},
    "group_softmax": {},
    "learnability": {"decay": 0.8},
    "strata": {"strata": 4.0, "groups": 3.0, "min_count": 5.0},
}
STATISTICS = {
    **{key: {"losses", "reference_losses"} for key in ("excess_loss", "rho")},
    **{key: {"losses"} for key in ("exp3", "group_dro", "group_softmax", "learnability", "loss_linear_upper")},
}
"""What rules read, where that is not contributions; some refuse what they do not read."""
VECTORS = sorted((Path(__file__).parents[2] / "proto" / "vectors").glob("*.json"))


def drawn_steps(rule: str, random: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Steps for a rule; ids repeat, some rows are not scored."""
    statistics = STATISTICS.get(rule, {"contributions", "losses"})
    steps = []
    for number in range(count):
        rows = int(random.integers(1, 40))
        step: dict[str, Any] = {
            "ids": random.integers(0, NUM_EXAMPLES, rows),
            **{name: random.standard_normal(rows).astype(np.float32) for name in sorted(statistics)},
            "scored": random.random(rows) < 0.9,
            "step": number,
        }
        if rule == "strata":
            step |= {"groups": step["ids"] % 3, "measured": random.random(rows) < 0.7}
        if rule == "learnability":
            step["attempts"] = random.integers(1, 17, rows)
            step["successes"] = random.binomial(step["attempts"], 0.4)
        if number % 5 == 0:
            step |= {"target_loss": float(random.random()), "guard_loss": float(random.random())}
        if number % 7 == 0:
            step["weights_for"] = random.integers(0, NUM_EXAMPLES, 3)
        steps.append(step)
    return steps


def camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)


def as_json(step: dict[str, Any]) -> Json:
    """A step as player.mjs takes it."""
    plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in step.items()}
    return {"ids": plain.pop("ids"), "fields": {camel(name): value for name, value in plain.items()}}


def test_every_rule_answers_it_the_bits_that_it_answers_the_python_client(
    server: ServerProcess, tmp_path: Path
) -> None:
    steps = {rule: drawn_steps(rule, np.random.default_rng(1), 40) for rule in RULES}
    cases: list[Json] = [
        {
            "options": {"policy": f"ts-{rule}", "numExamples": NUM_EXAMPLES, "rule": rule, "settings": settings},
            "steps": [as_json(step) for step in steps[rule]],
        }
        for rule, settings in RULES.items()
    ]
    for (rule, settings), played in zip(RULES.items(), play(tmp_path, server.address, cases), strict=True):
        with PolicyClient(
            server.address, policy=f"py-{rule}", num_examples=NUM_EXAMPLES, rule=rule, settings=settings
        ) as client:
            for step, answer in zip(steps[rule], played["answers"], strict=True):
                result = client.step(**step)
                assert (answer["outcome"], answer["version"]) == (result.outcome, result.version)
                assert_equal(float32s(answer["weights"]), result.weights, rule)
            assert_equal(float32s(played["final"]["weights"]), client.read_weights(), rule)
            assert_equal(float32s(played["final"]["scores"]), client.read_weights("score"), rule)
        assert played["durable"]
        assert played["stats"]["applied"] == len(steps[rule])


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_golden_vectors(server: ServerProcess, tmp_path: Path, path: Path) -> None:
    vectors = json.loads(path.read_text(encoding="utf-8"))
    cases = [case_of(vectors["rule"], facts) for facts in vectors["cases"]]
    for facts, played in zip(vectors["cases"], play(tmp_path, server.address, cases), strict=True):
        for step, answer in zip(facts["steps"], played["answers"], strict=True):
            response = step["response"]
            assert f"OUTCOME_{answer['outcome'].upper()}" == response["outcome"]
            if answer["outcome"] == "refused":
                assert answer["reason"] == response["reason"]
                continue
            assert answer["version"] == response["version"]
            assert_equal(float32s(answer["weights"]), numbers(response.get("weights", [])), facts["name"])
        for name in {"weights", "scores", "rows"} & facts["final"].keys():
            expected = np.concatenate([numbers(row) for row in rows_of(facts["final"][name])])
            assert_equal(float32s(played["final"][name]), expected, f"{facts['name']}: {name}")


def case_of(rule: str, facts: Json) -> Json:
    """A case of a vector as player.mjs takes it."""
    policy = facts["policy"]
    options = {
        "policy": f"vector-{rule.replace('_', '-')}-{facts['name']}",
        "numExamples": policy["num_examples"],
        "rule": rule,
        "settings": policy["settings"],
        "referenceNats": policy.get("reference_nats", 0),
    }
    steps = [step_of(step["request"]) for step in facts["steps"]]
    return {"options": options, "steps": steps, "rows": len(facts["final"].get("rows", []))}


def step_of(request: Json) -> Json:
    fields = dict(request)
    half = fields.pop("sketch_type", "") == "SKETCH_TYPE_FLOAT16"
    if half:
        for name in ("gradient_sketches", "target_sketch"):
            fields[name] = np.array(fields[name], np.float16).view(np.uint16).tolist()
    ids = "all" if fields.pop("all_examples", False) else fields.pop("example_ids", None)
    read = fields.pop("sequence") == 0
    return {"ids": ids, "half": half, "read": read, "fields": {camel(name): value for name, value in fields.items()}}


def rows_of(values: list[Any]) -> list[list[Any]]:
    return values if values and isinstance(values[0], list) else [values]


def numbers(values: list[float | None]) -> NDArray[np.float32]:
    return np.array([np.nan if value is None else value for value in values], np.float32)


def assert_equal(answered: NDArray[np.float32], expected: NDArray[np.float32], of: str) -> None:
    np.testing.assert_array_equal(answered, expected, err_msg=of)
