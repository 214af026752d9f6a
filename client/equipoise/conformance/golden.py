"""Checks of the rules: the golden vectors, played."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.conformance.check import Check, MismatchError, Refusal, expect
from equipoise.conformance.target import Target
from equipoise.conformance.vectors import Case, Json, floats, load, setting_value, step_request
from equipoise.v1 import policy_pb2 as pb

EXACT = {"relative": 0.0, "absolute": 0.0}


def checks(folder: Path, *, exact: bool) -> Iterator[Check]:
    """One check for each case of the files in a folder; `exact`: every bit must be the same."""
    for case in load(folder):
        tolerance = EXACT if exact else case.tolerance
        about = f"{len(case.steps)} answers and the final state are those of the vector ({case.facts['about']})"
        yield Check(f"rules/{case.name}", about, lambda target, c=case, t=tolerance: _Play(target, c, t).run())  # type: ignore[misc]


class _Play:
    """One case against a server.

    Args:
        target: the server.
        case: the case.
        tolerance: `relative` and `absolute`.
    """

    def __init__(self, target: Target, case: Case, tolerance: Json) -> None:
        self._target = target
        self._case = case
        self._tolerance = tolerance
        self._largest = 0.0

    def run(self) -> str:
        """Plays it; how close the answers came."""
        policy = self._target.new_name()
        request = pb.CreatePolicyRequest(policy=self._case.spec(policy))
        self._target.call("CreatePolicy", request, policy=policy)
        with self._target.conversation(policy) as stream:
            expect("last_sequence of a new trainer", stream.opened().last_sequence, 0)
            for place, step in enumerate(self._case.steps):
                answer = stream.step(step_request(step["request"]))
                self._check_answer(f"step {place}", answer, step["response"])
        self._check_final(policy, self._case.facts["final"])
        return f"equal, largest difference {self._largest:.1g}" if self._largest else "equal to the last bit"

    def _check_answer(self, where: str, answer: pb.StepResponse, expected: Json) -> None:
        expect(f"{where}: outcome", pb.Outcome.Name(answer.outcome), expected["outcome"])
        expect(f"{where}: version", answer.version, expected["version"])
        if "reason" in expected:
            expect(f"{where}: reason", Refusal.of(answer.error).reason, expected["reason"])
        self._compare(f"{where}: weights", np.frombuffer(answer.weights, "<f4"), floats(expected.get("weights", [])))

    def _check_final(self, policy: str, expected: Json) -> None:
        for name, field in (("weights", pb.FIELD_WEIGHT), ("scores", pb.FIELD_SCORE)):
            found = np.frombuffer(self._target.weights(policy, field), "<f4")
            self._compare(f"final {name}", found, floats(expected[name]))
        if "rows" in expected:
            request = pb.ReadWeightsRequest(policy=policy, num_rows=len(expected["rows"]))
            chunks = self._target.read("ReadWeights", request, policy=policy)
            found = np.frombuffer(b"".join(chunk.values for chunk in chunks), "<f4")
            self._compare("final rows", found, floats(chain.from_iterable(expected["rows"])))
        status = self._target.status(policy)
        settings = {name: setting_value(value) for name, value in status.spec.rule.settings.items()}
        expect("the resolved settings", settings, self._case.facts["resolved_settings"])
        for name, value in expected["status"].items():
            self._compare(f"status {name}", np.array([getattr(status, name)]), np.array([value]))
        for name in ("sim", "positive_share", "target_loss", "guard_loss", "compression_ratio"):
            expect(f"status {name} is set", status.HasField(name), name in expected["status"])  # type: ignore[arg-type]

    def _compare(self, what: str, found: Any, expected: Any) -> None:
        expect(f"{what}: how many", len(found), len(expected))
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        differences = np.where(np.isnan(found) & np.isnan(expected), 0.0, np.abs(found - expected))
        allowed = self._tolerance["absolute"] + self._tolerance["relative"] * np.abs(np.nan_to_num(expected))
        bad = ~(differences <= allowed)  # also where one alone is NaN
        if bad.any():
            place = int(np.argmax(bad))
            raise MismatchError(f"{what}[{place}] is {float(found[place])!r}, not {float(expected[place])!r}")
        self._largest = max(self._largest, float(differences.max(initial=0.0)))
