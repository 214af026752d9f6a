"""Policies as values: what one is, how it stands, and the server that holds it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, TypeAlias, get_args

from equipoise.errors import is_integer, require
from equipoise.v1 import policy_pb2 as pb

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
"""Names of policies."""

Durability: TypeAlias = Literal["logged", "behind"]
"""When a step is answered: once it is in the log, or at once."""

SettingValue: TypeAlias = float | bool | str
"""Value of a rule's setting."""

_DURABILITIES = {"logged": pb.DURABILITY_LOGGED, "behind": pb.DURABILITY_BEHIND}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """What a policy is. It is fixed when the policy is created.

    Attributes:
        name: matches `[a-z0-9][a-z0-9._-]{0,127}`.
        num_examples: N, in [0, 2^63). Ids are the integers in [0, N).
        rule: name of the rule. Empty: the server's default.
        settings: settings of the rule by name: numbers, booleans or strings. The rule's defaults hold for the others.
        durability: `"logged"` answers a step once it is in the server's log, `"behind"` at once. None: `"logged"`.
        reference_nats: ln|V|, the loss of a uniform guess, nats, 0 or more. The server reports the compression ratio if
            it is set.

    Raises:
        InvalidRequestError: a field has the wrong type or is out of range.
    """

    name: str
    num_examples: int
    rule: str = ""
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    durability: Durability | None = None
    reference_nats: float | None = None

    def __post_init__(self) -> None:
        require(isinstance(self.name, str), field="name", value=self.name, rule="must be a string")
        fits = is_integer(self.num_examples, 0, 1 << 63)
        require(fits, field="num_examples", value=self.num_examples, rule="must be an integer in [0, 2^63)")
        require(isinstance(self.rule, str), field="rule", value=self.rule, rule="must be a string")
        fits = isinstance(self.settings, Mapping)
        require(fits, field="settings", value=self.settings, rule="must be values by name")
        fits = self.durability is None or self.durability in get_args(Durability)
        require(fits, field="durability", value=self.durability, rule="must be 'logged' or 'behind'")
        nats = self.reference_nats
        fits = nats is None or (isinstance(nats, int | float) and 0 <= nats < math.inf)
        require(fits, field="reference_nats", value=nats, rule="must be a finite number of nats, 0 or more")
        for name, value in self.settings.items():
            require(isinstance(name, str), field="settings", value=name, rule="must have strings as names")
            fits = isinstance(value, bool | int | float | str)
            require(fits, field=f"settings.{name}", value=value, rule="must be a number, a boolean or a string")

    def to_proto(self) -> pb.PolicySpec:
        """The specification as a message."""
        return pb.PolicySpec(
            name=self.name,
            num_examples=self.num_examples,
            rule=pb.RuleSpec(name=self.rule, settings={k: _setting(v) for k, v in self.settings.items()}),
            durability=_DURABILITIES[self.durability] if self.durability else pb.DURABILITY_UNSPECIFIED,
            reference_nats=self.reference_nats or 0.0,
        )

    @classmethod
    def from_proto(cls, message: pb.PolicySpec) -> "PolicySpec":
        """The specification in a message."""
        return cls(
            name=message.name,
            num_examples=message.num_examples,
            rule=message.rule.name,
            settings={name: _setting_value(value) for name, value in sorted(message.rule.settings.items())},
            durability="behind" if message.durability == pb.DURABILITY_BEHIND else "logged",
            reference_nats=message.reference_nats or None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """What rule `strata` knows of a stratum: examples of one group with about the same smoothed loss.

    Attributes:
        group: its group, in [0, groups).
        stratum: which of its group, in [0, strata), by rising loss.
        examples: number of examples in it.
        above_loss: smoothed loss above which it begins, nats. None: it is the first of its group, or there was no loss.
        contributions: number of contributions that count, older ones less.
        mean: their mean, in units of the running root mean square of all contributions.
        error: standard error of the mean; 0 without contributions.
        z: mean over standard error, of it and its neighbours; 0 where there are too few contributions.
        ratio: the share of the target's losses that lie in it over the share of the training examples', at most 1; 1
            where the target has told too few.
        weight: served weight of its examples.
    """

    group: int
    stratum: int
    examples: int
    above_loss: float | None
    contributions: float
    mean: float
    error: float
    z: float
    ratio: float
    weight: float

    @classmethod
    def from_proto(cls, message: pb.StratumStatus) -> "Stratum":
        """The stratum in a message."""
        return cls(
            group=message.group,
            stratum=message.stratum,
            examples=message.examples,
            above_loss=message.above_loss if message.HasField("above_loss") else None,
            contributions=message.contributions,
            mean=message.mean,
            error=message.error,
            z=message.z,
            ratio=message.ratio,
            weight=message.weight,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStatus:
    """How a policy stands.

    Attributes:
        spec: what it is, with every setting filled in.
        uid: random id of this policy; a policy made anew under the same name has another one.
        create_time: when it was created, by the server's clock, with time zone.
        epoch: grows each time a server takes the policy over.
        version: number of steps that were applied or refused.
        durable_version: the newest version in the server's store.
        scored_examples: number of examples that were scored at least once, in [0, N].
        effective_examples: 1/Σγ² over all examples, γ their weights with sum 1; in [1, N], N when uniform.
        largest_weight: largest weight among the rows of the last step; the mean over all examples is 1.
        sim: mean over standard deviation of the last step's contributions, the evidence of the Learning Law (paper,
            section 4). None: not defined yet.
        positive_share: share of the scored rows of the last step with a positive contribution, in [0, 1]. None: there
            was no step yet.
        target_loss: the mean loss on the target set A reported last, nats. None: never reported.
        guard_loss: the mean loss on the guard set B reported last, nats. None: never reported.
        guard_strength: how far the guard pulls the weights to uniform, in [0, 1].
        guard_trials_won: trials of the guard after which the policy's weights were served.
        guard_trials_lost: trials of the guard after which uniform weights were served.
        compression_ratio: `reference_nats` over the mean of the target losses. None without them.
        bytes: memory of the policy's tables on the server's device.
        training_step: the training step reported last.
        strata_contrast: of rule `strata`: F, how much more the mean contributions of strata differ than their errors
            explain; about 1 where it is chance. None: too few have enough of them, or the rule has no strata.
        strata: of rule `strata`, all of them, group after group. `watch` leaves them out.
    """

    spec: PolicySpec
    uid: str
    create_time: datetime
    epoch: int
    version: int
    durable_version: int
    scored_examples: int
    effective_examples: float
    largest_weight: float
    sim: float | None
    positive_share: float | None
    target_loss: float | None
    guard_loss: float | None
    guard_strength: float
    guard_trials_won: int
    guard_trials_lost: int
    compression_ratio: float | None
    bytes: int
    training_step: int
    strata_contrast: float | None = None
    strata: tuple[Stratum, ...] = ()

    @classmethod
    def from_proto(cls, message: pb.PolicyStatus) -> "PolicyStatus":
        """The status in a message."""
        return cls(
            spec=PolicySpec.from_proto(message.spec),
            uid=message.uid,
            create_time=message.create_time.ToDatetime(UTC),
            epoch=message.epoch,
            version=message.version,
            durable_version=message.durable_version,
            scored_examples=message.scored_examples,
            effective_examples=message.effective_examples,
            largest_weight=message.largest_weight,
            sim=message.sim if message.HasField("sim") else None,
            positive_share=message.positive_share if message.HasField("positive_share") else None,
            target_loss=message.target_loss if message.HasField("target_loss") else None,
            guard_loss=message.guard_loss if message.HasField("guard_loss") else None,
            guard_strength=message.guard_strength,
            guard_trials_won=message.guard_trials_won,
            guard_trials_lost=message.guard_trials_lost,
            compression_ratio=message.compression_ratio if message.HasField("compression_ratio") else None,
            bytes=message.bytes,
            training_step=message.training_step,
            strata_contrast=message.strata_contrast if message.HasField("strata_contrast") else None,
            strata=tuple(Stratum.from_proto(each) for each in message.strata),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedPolicy:
    """A policy in a listing, without its state.

    Attributes:
        spec: what it is, with every setting filled in.
        uid: random id of this policy.
        create_time: when it was created, by the server's clock, with time zone.
    """

    spec: PolicySpec
    uid: str
    create_time: datetime

    @classmethod
    def from_proto(cls, message: pb.ListedPolicy) -> "ListedPolicy":
        """The entry in a message."""
        return cls(
            spec=PolicySpec.from_proto(message.spec),
            uid=message.uid,
            create_time=message.create_time.ToDatetime(UTC),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """A server, and what it takes.

    Attributes:
        api_version: version of the contract, `"v1"`.
        build_version: version of the server.
        device: the device that holds the policies, such as `"cuda"`.
        max_batch_examples: most rows of one step.
        max_examples: most examples of one policy.
        max_message_bytes: largest message, bytes.
        rules: names of the rules.
    """

    api_version: str
    build_version: str
    device: str
    max_batch_examples: int
    max_examples: int
    max_message_bytes: int
    rules: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: pb.GetServerInfoResponse) -> "ServerInfo":
        """The server in a message."""
        return cls(
            api_version=message.api_version,
            build_version=message.build_version,
            device=message.device,
            max_batch_examples=message.max_batch_examples,
            max_examples=message.max_examples,
            max_message_bytes=message.max_message_bytes,
            rules=tuple(message.rules),
        )


def check_name(name: str) -> str:
    """The name.

    Raises:
        InvalidRequestError: it is none for a policy.
    """
    fits = isinstance(name, str) and NAME.fullmatch(name) is not None
    require(fits, field="policy", value=name, rule=f"must match {NAME.pattern}")
    return name


def _setting(value: SettingValue) -> pb.SettingValue:
    if isinstance(value, bool):  # before numbers: a bool is an int
        return pb.SettingValue(flag=value)
    return pb.SettingValue(text=value) if isinstance(value, str) else pb.SettingValue(number=value)


def _setting_value(value: pb.SettingValue) -> SettingValue:
    kind = value.WhichOneof("kind")
    if kind == "flag":
        return value.flag
    return value.text if kind == "text" else value.number
