"""What the store tells whoever counts."""

from typing import Protocol


class Observer(Protocol):
    """Counts commands and errors; called on the event loop, so it must not block."""

    def command(self, name: str, seconds: float) -> None:
        """A command of the store (`append`, `stage`, ...) ended, well or not, after `seconds`."""

    def error(self, kind: str) -> None:
        """A command failed; `kind` as in `Unavailable.kind`, or `fenced`, `lost`."""


class NoObserver:
    """Counts nothing."""

    def command(self, name: str, seconds: float) -> None:
        """Ignored."""

    def error(self, kind: str) -> None:
        """Ignored."""
