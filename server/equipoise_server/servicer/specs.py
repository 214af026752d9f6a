"""Specifications and statuses between wire and domain."""

import math
from dataclasses import asdict, replace

from google.protobuf.timestamp_pb2 import Timestamp

from equipoise.v1 import policy_pb2 as pb
from equipoise_server.engine import Durability, PolicyRunner, PolicySpec
from equipoise_server.engine.spec import check_name
from equipoise_server.errors import invalid, policy_exists
from equipoise_server.rules import RuleError, SettingValues, build
from equipoise_server.servicer.limits import ServiceLimits
from equipoise_server.store import StoredPolicy

DEFAULT_RULE = "ema_sign"
DURABILITIES = {
    pb.DURABILITY_UNSPECIFIED: Durability.LOGGED,
    pb.DURABILITY_LOGGED: Durability.LOGGED,
    pb.DURABILITY_BEHIND: Durability.BEHIND,
}


FRAME_BYTES = 4096
"""Room that a message leaves for its framing and the fields around the arrays."""


def resolve_spec(message: pb.PolicySpec, *, limits: ServiceLimits) -> PolicySpec:
    """A full specification, defaults filled in. Raises ServiceError (INVALID_ARGUMENT)."""
    check_name(message.name, field="policy.name")
    if not 1 <= message.num_examples <= limits.max_examples:
        description = f"{message.num_examples} is not in [1, {limits.max_examples}]"
        raise invalid("OUT_OF_RANGE_VALUE", "policy.num_examples", description)
    if message.durability not in DURABILITIES:
        raise invalid("OUT_OF_RANGE_VALUE", "policy.durability", f"{message.durability} is not a Durability")
    if not (math.isfinite(message.reference_nats) and message.reference_nats >= 0):
        description = f"{message.reference_nats} is not a finite number ≥ 0 (ln|V| in nats; 0: not given)"
        raise invalid("OUT_OF_RANGE_VALUE", "policy.reference_nats", description)
    rule_name = message.rule.name or DEFAULT_RULE
    spec = PolicySpec(
        name=message.name,
        num_examples=message.num_examples,
        rule=rule_name,
        settings=resolve_settings(rule_name, settings_from(message.rule)),
        durability=DURABILITIES[message.durability],
        reference_nats=message.reference_nats or None,
    )
    _check_size(spec, limits)
    return spec


def resolve_settings(rule_name: str, given: SettingValues) -> SettingValues:
    """Every setting of the rule. Raises ServiceError (UNKNOWN_RULE, INVALID_SETTING)."""
    try:
        return dict(build(rule_name, given).settings)
    except RuleError as error:
        reason = "UNKNOWN_RULE" if error.field == "rule.name" else "INVALID_SETTING"
        raise invalid(reason, f"policy.{error.field}", str(error)) from error


def settings_from(rule: pb.RuleSpec) -> SettingValues:
    """The settings as plain values. Raises ServiceError (INVALID_SETTING) for an unset one."""
    values: dict[str, float | bool | str] = {}
    for name, setting in rule.settings.items():
        kind = setting.WhichOneof("kind")
        if kind is None:
            raise invalid("INVALID_SETTING", f"policy.rule.settings.{name}", "has no value")
        values[name] = getattr(setting, kind)
    return values


def num_weights(spec: PolicySpec) -> int:
    """How many examples it counts for in a quota: N, or of a trajectory those of all its rows, T·N."""
    try:
        return max((column.numel() for column in spec.outline().columns.values()), default=spec.num_examples)
    except RuleError:  # a stored one, whose rule a newer release knows
        return spec.num_examples


def check_same(message: pb.PolicySpec, stored: PolicySpec) -> None:
    """Raises ServiceError (POLICY_EXISTS) at the first set field that differs from the stored one."""
    asked: list[tuple[str, object, object]] = []
    if message.num_examples:
        asked.append(("num_examples", message.num_examples, stored.num_examples))
    if message.rule.name:
        asked.append(("rule.name", message.rule.name, stored.rule))
    for name, setting in settings_from(message.rule).items():
        asked.append((f"rule.settings.{name}", setting, stored.settings.get(name)))
    if message.durability:
        asked.append(("durability", DURABILITIES.get(message.durability), stored.durability))
    if message.reference_nats:
        asked.append(("reference_nats", message.reference_nats, stored.reference_nats))
    for field, value, existing in asked:
        if value != existing:
            raise policy_exists(stored.name, f"policy.{field}", existing, value)


def forked_spec(message: pb.PolicySpec, source: PolicySpec) -> PolicySpec:
    """The specification of a fork: the source's under another name, with durability and reference_nats if given."""
    check_name(message.name, field="policy.name")
    fixed = pb.PolicySpec(num_examples=message.num_examples, rule=message.rule)
    check_same(fixed, source)
    return replace(
        source,
        name=message.name,
        durability=DURABILITIES[message.durability] if message.durability else source.durability,
        reference_nats=message.reference_nats or source.reference_nats,
    )


def spec_message(spec: PolicySpec) -> pb.PolicySpec:
    """The specification as it goes out."""
    settings = {name: _setting_message(value) for name, value in spec.settings.items()}
    logged = spec.durability is Durability.LOGGED
    return pb.PolicySpec(
        name=spec.name,
        num_examples=spec.num_examples,
        rule=pb.RuleSpec(name=spec.rule, settings=settings),
        durability=pb.DURABILITY_LOGGED if logged else pb.DURABILITY_BEHIND,
        reference_nats=spec.reference_nats or 0.0,
    )


def listed_message(stored: StoredPolicy) -> pb.ListedPolicy:
    """A policy in a listing."""
    return pb.ListedPolicy(
        spec=spec_message(PolicySpec.from_json(stored.spec)), uid=stored.uid, create_time=_timestamp(stored)
    )


def status_message(runner: PolicyRunner, *, with_strata: bool = False) -> pb.PolicyStatus:
    """The policy's picture of now, with each of its strata or without."""
    status, spec = runner.status, runner.policy.spec
    report = status.read_strata()
    progress = status.progress
    return pb.PolicyStatus(
        spec=spec_message(spec),
        uid=runner.policy.uid,
        create_time=_timestamp(runner.stored),
        epoch=runner.epoch,
        version=progress.version,
        durable_version=min(runner.log.record.durable_version, progress.version),
        scored_examples=status.scored_examples,
        effective_examples=status.effective_examples,
        largest_weight=progress.largest_weight or 0.0,
        sim=progress.sim,
        positive_share=progress.positive_share,
        target_loss=progress.target_loss,
        guard_loss=progress.guard_loss,
        guard_strength=status.guard_strength,
        guard_trials_won=status.guard_trials[0],
        guard_trials_lost=status.guard_trials[1],
        compression_ratio=status.compression_ratio,
        bytes=status.table_bytes,
        training_step=progress.training_step,
        strata_contrast=report.contrast if report else None,
        strata=[pb.StratumStatus(**asdict(each)) for each in report.strata] if report and with_strata else [],
    )


def _check_size(spec: PolicySpec, limits: ServiceLimits) -> None:
    """Raises ServiceError (OUT_OF_RANGE_VALUE) where a trajectory's rows would not fit a step, or not the server."""
    rule, num_examples = build(spec.rule, spec.settings), spec.num_examples
    rows, most = rule.trajectory_rows, min(limits.max_batch_examples, (limits.max_message_bytes - FRAME_BYTES) // 4)
    if rows and num_examples > most:
        description = f"{num_examples}: a step of rule {rule.name!r} has all examples, and takes at most {most} here"
        raise invalid("OUT_OF_RANGE_VALUE", "policy.num_examples", description)
    if rows * num_examples > limits.max_examples:
        description = (
            f"{rows} rows of {num_examples} examples are more weights than max_examples, {limits.max_examples}"
        )
        raise invalid("OUT_OF_RANGE_VALUE", "policy.rule.settings.rows", description)
    try:
        spec.outline()
    except RuleError as error:
        raise invalid("OUT_OF_RANGE_VALUE", f"policy.{error.field}", str(error)) from error


def _setting_message(value: float | bool | str) -> pb.SettingValue:
    if isinstance(value, bool):
        return pb.SettingValue(flag=value)
    if isinstance(value, str):
        return pb.SettingValue(text=value)
    return pb.SettingValue(number=value)


def _timestamp(stored: StoredPolicy) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(stored.create_time * 1e9))
    return timestamp
