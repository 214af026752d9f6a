"""A policy's specification: what is fixed at its creation."""

import json
import re
from dataclasses import asdict, dataclass
from enum import Enum

import torch

from equipoise_server.errors import invalid, quoted
from equipoise_server.rules import SettingValues, TableState, build

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")


class Durability(Enum):
    """When a step is answered."""

    LOGGED = "logged"
    """Once it is in the log, or after the log timeout."""
    BEHIND = "behind"
    """At once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """A resolved specification.

    Attributes:
        name: see `check_name`.
        num_examples: N ≥ 1.
        rule: name of the rule.
        settings: every setting of the rule, resolved.
        durability: when a step is answered.
        reference_nats: ln|V| for the compression ratio; None: not given.
    """

    name: str
    num_examples: int
    rule: str
    settings: SettingValues
    durability: Durability
    reference_nats: float | None

    def to_json(self) -> str:
        """The specification as stored."""
        fields = asdict(self) | {"durability": self.durability.value, "settings": dict(self.settings)}
        return json.dumps(fields, sort_keys=True)

    def outline(self) -> TableState:
        """The policy's tables with their shapes and types but no memory. Raises RuleError when they cannot be."""
        return build(self.rule, self.settings).init(self.num_examples, device=torch.device("meta"))

    @property
    def table_bytes(self) -> int:
        """Memory of the policy's tables."""
        return sum(column.numel() * column.element_size() for column in self.outline().columns.values())

    @classmethod
    def from_json(cls, text: str) -> "PolicySpec":
        """The stored specification."""
        fields = json.loads(text)
        return cls(**fields | {"durability": Durability(fields["durability"])})


def check_name(name: str, *, field: str) -> None:
    """Raises ServiceError unless `name` is a policy's name."""
    if not NAME.fullmatch(name):
        raise invalid("INVALID_POLICY_NAME", field, f"{quoted(name)} does not match {NAME.pattern}")
