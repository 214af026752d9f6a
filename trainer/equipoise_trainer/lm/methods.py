"""The methods that are compared: what each trains on, and who weighs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from equipoise.policies import SettingValue

Kind: TypeAlias = Literal["plain", "trim", "losses", "candidates", "weighted", "mixed"]
"""How a step is made: see `equipoise_trainer.lm.steps` and `equipoise_trainer.lm.served`."""
Data: TypeAlias = Literal["train", "target", "mixture", "oracle"]
"""What is trained on: all training sequences, target A alone, both, or the clean training sequences."""
Ids: TypeAlias = Literal["sequences", "buckets", "sources"]
"""What the ids of a policy stand for: each sequence, perplexity buckets, or the three sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
        name: on the command line.
        title: in tables and pictures.
        kind: how a step is made.
        data: what is trained on.
        rule: of the policy server; empty: no server.
        settings: of the rule; the others have the server's defaults.
        ids: what the ids stand for.
    """

    name: str
    title: str
    kind: Kind
    data: Data = "train"
    rule: str = ""
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    ids: Ids = "sequences"


HEADLINE: Final = "buckets"
"""The method that others are compared with, and the length of whose moves `norm-matched` repeats."""
MATCHED: Final = "norm-matched"
"""The method that waits for the headline's runs."""
LOSS_ONLY: Final = ("trim", "lin-upper", "rho")
"""Methods that know losses and no gradient."""

_RELU: Final[Mapping[str, SettingValue]] = {"ema_decay": 0.9, "floor": 0.02, "saturation": 0.3}
_EG: Final[Mapping[str, SettingValue]] = {"learning_rate": 0.4, "decay": 0.0, "floor": 0.005, "unit": 1.0}
"""Contributions arrive in spreads of their batch, the smaller the less they say."""

METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        Method(name="uniform", title="uniform", kind="plain"),
        Method(name=MATCHED, title="norm-matched", kind="plain"),
        Method(name="target", title="target A alone", kind="plain", data="target"),
        Method(name="mixture", title="train + target A", kind="plain", data="mixture"),
        Method(name="trim", title="low-loss half", kind="trim"),
        Method(name="lin-upper", title="LinUpper", kind="losses", rule="loss_linear_upper"),
        Method(name="rho", title="RHO", kind="losses", rule="rho"),
        Method(name="boltzmann", title="Boltzmann", kind="candidates", rule="boltzmann"),
        Method(name="sign", title="ema_sign", kind="weighted", rule="ema_sign"),
        Method(name="relu", title="ema_relu", kind="weighted", rule="ema_relu"),
        Method(
            name="buckets-relu",
            title="buckets, ema_relu",
            kind="mixed",
            rule="ema_relu",
            settings=_RELU,
            ids="buckets",
        ),
        Method(
            name="buckets",
            title="buckets, EG",
            kind="mixed",
            rule="exponentiated_gradient",
            settings=_EG,
            ids="buckets",
        ),
        Method(
            name="unguarded",
            title="buckets, no guard",
            kind="mixed",
            rule="exponentiated_gradient",
            settings={**_EG, "guard": False},
            ids="buckets",
        ),
        Method(
            name="sources",
            title="known sources, EG",
            kind="mixed",
            rule="exponentiated_gradient",
            settings=_EG,
            ids="sources",
        ),
        Method(name="oracle", title="oracle, clean only", kind="plain", data="oracle"),
    )
}
"""By name, in the order of the table."""

COMPARED: Final = (
    "uniform",
    MATCHED,
    "target",
    "mixture",
    "trim",
    "lin-upper",
    "rho",
    "boltzmann",
    HEADLINE,
    "oracle",
)
"""The methods of a table unless told otherwise: the headline, what it must beat, and what it cannot reach."""


def parse_methods(text: str) -> tuple[str, ...]:
    """Methods from a comma-separated list, in the order of the table.

    Raises:
        ValueError: a name is unknown, or norm-matched comes without the method whose moves it needs.
    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in METHODS:
            raise ValueError(f"methods: {name!r}, must be among {', '.join(METHODS)}")
    if not wanted:
        raise ValueError(f"methods: {text!r}, must name at least one of {', '.join(METHODS)}")
    if MATCHED in wanted and HEADLINE not in wanted:
        raise ValueError(f"methods: {MATCHED} needs {HEADLINE}, since it repeats the length of its moves")
    return tuple(name for name in METHODS if name in wanted)
