"""The methods that are compared: what each trains on, and what it may choose on guard B."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from equipoise.policies import SettingValue
from equipoise_trainer.tasks import Examples, Task

Method: TypeAlias = Literal["uniform", "uniform-tuned", "norm-matched", "target", "served", "oracle"]
"""Name of a method."""

METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""All methods, in the order of the table."""

TITLES: Final[Mapping[Method, str]] = {
    "uniform": "uniform",
    "uniform-tuned": "uniform, tuned η",
    "norm-matched": "uniform, norm-matched",
    "target": "target A alone",
    "served": "served policy",
    "oracle": "oracle (no flips)",
}
"""What the methods are called in tables and pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Hyper-parameters of one run. `settings` are those of the rule, empty for methods without one."""

    learning_rate: float
    settings: Mapping[str, SettingValue]


def training_set(method: Method, task: Task) -> Examples:
    """What a method trains on."""
    if method == "target":
        return task.target
    if method == "oracle":
        return task.train.take(~task.flipped)
    return task.train


def parse_methods(text: str) -> tuple[Method, ...]:
    """Methods from a comma-separated list, in the order of the table.

    Raises:
        ValueError: a name is unknown, or norm-matched comes without served, whose gradient norms it needs.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in METHODS:
            raise ValueError(f"methods: {name!r}, must be among {', '.join(METHODS)}")
    if not wanted:
        raise ValueError(f"methods: {text!r}, must name at least one of {', '.join(METHODS)}")
    if "norm-matched" in wanted and "served" not in wanted:
        raise ValueError("methods: norm-matched needs served, since it takes over its gradient norms")
    return tuple(method for method in METHODS if method in wanted)
