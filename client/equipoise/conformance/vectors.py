"""Golden vectors: steps as JSON, and what a rule answers; `proto/vectors/README.md` describes the format."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from equipoise.v1 import policy_pb2 as pb

Json: TypeAlias = Mapping[str, Any]

FORMAT = 1
IDS = ("example_ids", "weights_for")
PER_ROW = ("contributions", "losses", "reference_losses", "target_losses")
COUNTS = ("groups", "successes", "attempts", "target_groups")
MASKS = ("scored", "measured")
SKETCHES = ("gradient_sketches", "target_sketch")
PLAIN = ("sequence", "step", "all_examples", "target_loss", "guard_loss", "omit_weights")
SKETCH_DTYPES = {"SKETCH_TYPE_FLOAT32": "<f4", "SKETCH_TYPE_FLOAT16": "<f2"}


@dataclass(frozen=True, slots=True)
class Case:
    """One case of a rule's file: a policy, its steps with their answers, and how it stands at the end."""

    rule: str
    facts: Json
    tolerance: Json

    @property
    def name(self) -> str:
        """`rule/case`."""
        return f"{self.rule}/{self.facts['name']}"

    @property
    def steps(self) -> list[Json]:
        """Each with `request` and `response`."""
        found: list[Json] = self.facts["steps"]
        return found

    def spec(self, name: str) -> pb.PolicySpec:
        """The policy to create, under this name."""
        policy = self.facts["policy"]
        settings = {key: _setting(value) for key, value in policy["settings"].items()}
        return pb.PolicySpec(
            name=name,
            num_examples=policy["num_examples"],
            rule=pb.RuleSpec(name=self.rule, settings=settings),
            reference_nats=policy.get("reference_nats", 0.0),
        )


def load(folder: Path) -> Iterator[Case]:
    """All cases of all files of a folder, in order. Raises ValueError when it holds none, or something else."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{folder}: holds no golden vectors (*.json)")
    for path in paths:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(contents, dict) or contents.get("format") != FORMAT:
            raise ValueError(f"{path}: is no file of golden vectors of format {FORMAT}")
        for facts in contents["cases"]:
            yield Case(contents["rule"], facts, contents["tolerance"])


def step_request(request: Json) -> pb.StepRequest:
    """The message that a `request` of a vector stands for."""
    fields: dict[str, Any] = {name: request[name] for name in PLAIN if name in request}
    fields |= {name: np.array(request[name], "<u8").tobytes() for name in IDS if name in request}
    fields |= {name: floats(request[name]).tobytes() for name in PER_ROW if name in request}
    fields |= {name: bytes(request[name]) for name in MASKS if name in request}
    fields |= {name: np.array(request[name], "<u4").tobytes() for name in COUNTS if name in request}
    if "sketch_type" in request:
        dtype = SKETCH_DTYPES[request["sketch_type"]]
        fields["sketch_type"] = pb.SketchType.Value(request["sketch_type"])
        fields |= {name: np.array(request[name], dtype).tobytes() for name in SKETCHES}
    return pb.StepRequest(**fields)


def floats(values: Any) -> NDArray[np.float32]:
    """float32 values as JSON has them: null stands for NaN."""
    flat = [math.nan if value is None else value for value in values]
    return np.array(flat, "<f4")


def setting_value(setting: pb.SettingValue) -> float | bool | str | None:
    """The plain value of a setting; None: unset."""
    kind = setting.WhichOneof("kind")
    value: float | bool | str | None = None if kind is None else getattr(setting, kind)
    return value


def _setting(value: float | bool | str) -> pb.SettingValue:
    if isinstance(value, bool):
        return pb.SettingValue(flag=value)
    return pb.SettingValue(text=value) if isinstance(value, str) else pb.SettingValue(number=value)
