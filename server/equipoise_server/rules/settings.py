"""Settings: declared once, as dataclass fields with a range, and bound from a typed map."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from equipoise_server.rules.base import RuleError, SettingValues

SettingsT = TypeVar("SettingsT", bound="RuleSettings")

RANGE = "range"
"""Key of a field's metadata under which its `Range` or `Flag` lies."""

MIN_FLOOR = 1e-4
"""Smallest floor but zero: at the fixed-point unit 2^-30 its relative rounding error stays below 5e-6."""

MAX_DECAY = 0.9999
"""Largest decay: the newest value always counts, so that a value over the running RMS stays bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The closed interval [low, high] of numbers, or of integers where `whole`, and 0 where `or_zero`."""

    low: float
    high: float
    or_zero: bool = False
    whole: bool = False

    def __contains__(self, value: float) -> bool:
        if self.whole and not float(value).is_integer():
            return False
        return self.low <= value <= self.high or (self.or_zero and value == 0)

    def __str__(self) -> str:
        interval = f"in [{self.low:g}, {self.high:g}]"
        if self.whole:
            interval = f"whole and {interval}"
        return f"0 or {interval}" if self.or_zero else interval


def number(default: float | None, *, low: float, high: float, or_zero: bool = False, whole: bool = False) -> Any:
    """A dataclass field for a number in [low, high], or 0 where `or_zero`; None as default: it must be given."""
    metadata = {RANGE: Range(low=low, high=high, or_zero=or_zero, whole=whole)}
    return field(default=MISSING if default is None else default, metadata=metadata)


def integer(default: float | None, *, low: float, high: float, or_zero: bool = False) -> Any:
    """As `number`, for a whole number."""
    return number(default, low=low, high=high, or_zero=or_zero, whole=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """True or false."""

    def __str__(self) -> str:
        return "true or false"


def flag(default: bool) -> Any:
    """A dataclass field for a yes or no."""
    return field(default=default, metadata={RANGE: Flag()})


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSettings:
    """Settings of every rule."""

    guard: bool = flag(True)
    """Whether guard losses decide between the policy's weights and uniform ones, see `guard.Guard`. Without guard
    losses there is nothing to decide by, and the weights are served."""

    guard_stretch: float = number(0.125, low=0.01, high=1.0)
    """How long the guard tries uniform weights before it judges them, as a share of all guard losses so far; the
    weights are tried for twice as long. Longer trials see more of what is slow, or hidden by noise, and cost more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalSettings(RuleSettings):
    """Settings of every rule that reads a signal relative to its running RMS, such as contributions."""

    rms_decay: float = number(0.99, low=0.0, high=MAX_DECAY)
    """Decay per step of the running mean square that the signal is divided by; 0: each step by its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaSettings(SignalSettings):
    """Settings of the rules that keep a moving average per example."""

    ema_decay: float = number(0.95, low=0.0, high=MAX_DECAY)
    """Decay per visit of an example's moving average. The default looks back some 20 visits: between 0.9, which still
    follows the noise of single contributions, and 0.99, which holds on to the first one for 100 visits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlooredEmaSettings(EmaSettings):
    """Settings of the rules that map a moving average into [floor, 1]."""

    floor: float = number(0.01, low=MIN_FLOOR, high=1.0, or_zero=True)
    """Smallest raw weight; 1/floor bounds the ratio of two weights. At 0 an example can lose all weight."""


def bind(settings_type: type[SettingsT], values: SettingValues, *, rule: str) -> SettingsT:
    """Settings of a rule from a typed map; those left out get their defaults.

    Raises:
        RuleError: `rule.settings.<key>` is unknown, no number (or no flag), not finite or out of its range, or absent
            without a default.
    """
    ranges: dict[str, Range | Flag] = {each.name: each.metadata[RANGE] for each in fields(settings_type)}
    for each in fields(settings_type):
        if each.default is MISSING and each.name not in values:
            where = f"rule.settings.{each.name}"
            raise RuleError(where, f"{where} is absent: rule {rule} needs a value {ranges[each.name]}")
    bound: dict[str, Any] = {key: _checked(key, value, ranges, rule) for key, value in values.items()}
    return settings_type(**bound)


def resolved(settings: RuleSettings) -> dict[str, float | bool | str]:
    """All settings by name."""
    return asdict(settings)


def _checked(key: str, value: float | bool | str, ranges: dict[str, Range | Flag], rule: str) -> float | bool:
    where = f"rule.settings.{key}"
    if key not in ranges:
        raise RuleError(where, f"{where}: rule {rule} has no such setting; it has {', '.join(sorted(ranges))}")
    allowed = ranges[key]
    if isinstance(allowed, Flag):
        if not isinstance(value, bool):
            raise RuleError(where, f"{where} = {value!r}: rule {rule} needs {allowed}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RuleError(where, f"{where} = {value!r}: rule {rule} needs a number {allowed}")
    if value not in allowed:
        raise RuleError(where, f"{where} = {value!r}: rule {rule} needs a value {allowed}")
    return float(value)
