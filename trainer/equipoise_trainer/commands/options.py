"""Options that are written as text: settings, batch sizes and lists."""

from collections.abc import Sequence

from equipoise.policies import SettingValue

USAGE_ERROR = 2
"""Exit status for arguments that cannot be used."""
FAILED = 1
"""Exit status of a command that failed."""


def parse_setting(text: str) -> SettingValue:
    """A setting's value: `true` and `false` are flags, what reads as a number is one, all else is text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def parse_settings(pairs: Sequence[str]) -> dict[str, SettingValue]:
    """Settings by name from `key=value`. Raises ValueError naming `set`."""
    return {key: parse_setting(value) for key, value in (_pair(pair, option="set") for pair in pairs)}


def parse_tuned(pairs: Sequence[str]) -> dict[str, tuple[SettingValue, ...]]:
    """Values by setting from `key=value,value`. Raises ValueError naming `tune`."""
    split = (_pair(pair, option="tune") for pair in pairs)
    return {key: tuple(parse_setting(value) for value in values.split(",")) for key, values in split}


def parse_batch(text: str) -> int | None:
    """A batch size; None for `full`. Raises ValueError naming `batch`."""
    if text == "full":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"batch: {text!r}, must be full or a whole number of at least 1")
    return int(text)


def parse_rates(text: str) -> tuple[float, ...]:
    """Learning rates from a comma-separated list, possibly empty. Raises ValueError naming `learning_rates`."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"learning_rates: {text!r}, must be numbers separated by commas") from error


def _pair(text: str, *, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"{option}: {text!r}, must be key=value")
    return key, value
