"""Writes the golden vectors from the server's rules; `--check` only tells whether they are current.

Run by `make vectors`, with the Python that has the server. What is written goes through all that a request of a stream
goes through but the store: conversion, refusal, rule, guard, answer, status.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vector_cases import Asked, Request, asked

from equipoise.conformance.vectors import FORMAT, step_request
from equipoise_server.engine import Durability, Policy, PolicySpec
from equipoise_server.engine.trainers import Trainers
from equipoise_server.errors import ServiceError
from equipoise_server.rules import build
from equipoise_server.servicer.convert import to_refused, to_step
from equipoise_server.servicer.fields import StepFields
from equipoise_server.servicer.limits import ServiceLimits

FOLDER = Path(__file__).parent / "vectors"
TRAINER = "trainer"
TOLERANCE = {"relative": 1e-5, "absolute": 1e-6}
LIMITS = ServiceLimits(
    max_batch_examples=1 << 18, max_examples=1 << 31, max_message_bytes=1 << 24, max_streams=1, max_import_bytes=1,
    max_inflight_bytes=1, max_tenant_inflight_bytes=1,
    write_timeout_s=1.0, first_message_timeout_s=1.0, build_version="", device="cpu",
)  # fmt: skip
STATUS = ("sim", "positive_share", "target_loss", "guard_loss", "largest_weight", "training_step", "version")


def main() -> int:
    """Writes or checks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the vectors are not current")
    check: bool = parser.parse_args().check
    stale = []
    for rule, cases in groupby(sorted(asked(), key=lambda case: case.rule), key=lambda case: case.rule):
        path, text = FOLDER / f"{rule}.json", _file(rule, [_answered(case) for case in cases])
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        if not check:
            path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{'stale, run make vectors' if check else 'written'}: {path}")
    return int(check and bool(stale))


def _answered(case: Asked) -> dict[str, Any]:
    """The case as it is written: with responses, and with how the policy stands at the end."""
    policy = _policy(case)
    steps = []
    sequence = 0
    for request in case.requests:
        if request.get("sequence") != 0:
            sequence += 1
            request = {"sequence": sequence, **request}
        steps.append({"request": request, "response": _response(policy, request)})
    given: dict[str, Any] = {"num_examples": case.num_examples, "settings": case.settings}
    if case.reference_nats:
        given["reference_nats"] = case.reference_nats
    return {
        "name": case.name,
        "about": case.about,
        "policy": given,
        "resolved_settings": dict(policy.rule.settings),
        "steps": steps,
        "final": _final(policy),
    }


def _policy(case: Asked) -> Policy:
    rule = build(case.rule, case.settings)
    spec = PolicySpec(
        name="vectors",
        num_examples=case.num_examples,
        rule=case.rule,
        settings=dict(rule.settings),
        durability=Durability.LOGGED,
        reference_nats=case.reference_nats or None,
    )
    state = rule.init(case.num_examples, device=torch.device("cpu"))
    return Policy(spec, "0" * 32, rule=rule, state=state, trainers=Trainers(idle_s=1.0, max_known=1))


def _response(policy: Policy, request: Request) -> dict[str, Any]:
    fields = StepFields.of(step_request(request))
    try:
        step = to_step(fields, trainer_id=TRAINER, policy=policy, limits=LIMITS)
    except ServiceError as error:
        step = to_refused(fields, error, trainer_id=TRAINER)
    answer = policy.apply(step, now=0.0).answer
    response: dict[str, Any] = {"outcome": f"OUTCOME_{answer.outcome.name}", "version": answer.version}
    if answer.error is not None:
        response["reason"] = answer.error.reason
    if answer.weights is not None:
        response["weights"] = _floats(answer.weights)
    return response


def _final(policy: Policy) -> dict[str, Any]:
    rule, state, status = policy.rule, policy.state, policy.status()
    progress = status.progress
    facts: dict[str, Any] = {"weights": _floats(policy.weights(None)), "scores": _floats(rule.scores(state, None))}
    if rule.trajectory_rows:
        rows = rule.trajectory_weights(state, slice(0, rule.trajectory_rows), None)
        facts["rows"] = [_floats(row) for row in rows]
    described = {name: value for name in STATUS if (value := getattr(progress, name)) is not None}
    facts["status"] = described | {
        "scored_examples": status.scored_examples,
        "effective_examples": status.effective_examples,
        "guard_strength": status.guard_strength,
        **({"compression_ratio": status.compression_ratio} if status.compression_ratio is not None else {}),
    }
    return facts


def _floats(values: NDArray[np.float32]) -> list[float | None]:
    """The shortest decimals that mean these float32, also when read as float64 and rounded; null is NaN."""
    texts = [None if np.isnan(value) else float(str(value)) for value in values]
    again = np.array([np.nan if text is None else text for text in texts], np.float32)
    assert np.array_equal(again, values, equal_nan=True)
    return texts


def _file(rule: str, cases: Iterable[dict[str, Any]]) -> str:
    """JSON with one line for each step, so that a change can be read."""
    lines = [f'{{"format": {FORMAT}, "rule": {_line(rule)}, "tolerance": {_line(TOLERANCE)}, "cases": [']
    written = []
    for case in cases:
        parts = [f" {_line(name)}: {_line(case[name])}" for name in ("name", "about", "policy", "resolved_settings")]
        parts.append(' "steps": [\n' + ",\n".join(f"  {_line(step)}" for step in case["steps"]) + "\n ]")
        parts.append(f' "final": {_line(case["final"])}')
        written.append("{\n" + ",\n".join(parts) + "\n}")
    return "\n".join([*lines, ",\n".join(written), "]}"]) + "\n"


def _line(value: object) -> str:
    return json.dumps(value, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())
