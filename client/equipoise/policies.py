"""Policies as values: what one is, how it stands, and the server that holds it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, TypeAlias, get_args

from equipoise.errors import InvalidRequestError
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
    """What a policy is: fixed at its creation.

    Attributes:
        name: `[a-z0-9][a-z0-9._-]{0,127}`.
        num_examples: N; ids are in [0, N).
        rule: name of the rule; empty: the server's default.
        settings: the rule's settings by name; those left out get the rule's defaults.
        durability: `logged`: a step is answered once it is in the server's log; `behind`: at once. None: `logged`.
        reference_nats: ln|V|, nats: the loss of a uniform guess, for the compression ratio.
    """

    name: str
    num_examples: int
    rule: str = ""
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    durability: Durability | None = None
    reference_nats: float | None = None

    def __post_init__(self) -> None:
        if self.num_examples < 0:
            raise InvalidRequestError(field="num_examples", value=self.num_examples, rule="must not be negative")
        if self.durability is not None and self.durability not in get_args(Durability):
            raise InvalidRequestError(field="durability", value=self.durability, rule="must be 'logged' or 'behind'")
        for name, value in self.settings.items():
            if not isinstance(value, bool | int | float | str):
                raise InvalidRequestError(
                    field=f"settings.{name}", value=repr(value), rule="must be a number, a boolean or a string"
                )

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
class PolicyStatus:
    """A policy as it stands.

    Attributes:
        spec: what it is; every setting resolved.
        uid: random id of this incarnation.
        create_time: when it was created (the server's clock).
        epoch: grows with each change of the policy's owner.
        version: number of steps applied or refused.
        durable_version: newest version in the server's store.
        scored_examples: number of examples scored at least once.
        effective_examples: 1/Σγ² over all examples, in [1, N].
        largest_weight: largest served weight among the last step's rows.
        sim: mean over standard deviation of the last step's contributions (paper, section 4); None: not defined yet.
        positive_share: share of positive contributions among the last step's scored rows; None: no step yet.
        target_loss: last mean loss on the target set A, nats; None: never reported.
        guard_loss: last mean loss on the guard set B, nats; None: never reported.
        guard_strength: how far the guard pulls the weights to uniform, in [0, 1].
        compression_ratio: reference_nats over the mean target loss; None without them.
        bytes: memory of the tables on the server's device.
        training_step: training step last reported.
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
    compression_ratio: float | None
    bytes: int
    training_step: int

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
            compression_ratio=message.compression_ratio if message.HasField("compression_ratio") else None,
            bytes=message.bytes,
            training_step=message.training_step,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedPolicy:
    """A policy in a listing; its state is not read.

    Attributes:
        spec: what it is; every setting resolved.
        uid: random id of this incarnation.
        create_time: when it was created (the server's clock).
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
    """A server.

    Attributes:
        api_version: version of the contract.
        build_version: version of the build.
        device: device that holds the policies.
        max_batch_examples: most rows of a step.
        max_examples: most examples of a policy.
        max_message_bytes: largest message.
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
    if not NAME.fullmatch(name):
        raise InvalidRequestError(field="policy", value=repr(name), rule=f"must match {NAME.pattern}")
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
