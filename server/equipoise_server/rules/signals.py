"""What a rule reads of a step: which statistics it needs, and that they fit the step's rows."""

import numpy as np
from numpy.typing import NDArray

from equipoise_server.rules.base import RuleError, Statistics


def check_signals(statistics: Statistics, *, signals: tuple[str, ...], rule: str) -> None:
    """Raises RuleError when a step with rows lacks one of `signals`, or has reference losses that are not among them.

    Contributions and losses that a rule does not read are welcome: contributions show the Learning Law at work, and
    the price of reference losses is such that who sends them expects them to matter.
    """
    if not statistics.size:
        return
    for name in signals:
        if getattr(statistics, name) is None:
            raise RuleError(name, f"{name} is absent: rule {rule} needs it in every step")
    name = "reference_losses"
    if statistics.reference_losses is not None and name not in signals:
        raise RuleError(name, f"{name}: rule {rule} does not use them (it reads {', '.join(signals)}); leave them out")
    if statistics.groups is not None:
        raise RuleError("groups", f"groups: rule {rule} does not use them; leave them out")
    for name in ("target_losses", "target_groups"):
        if getattr(statistics, name) is not None:
            raise RuleError(name, f"{name}: rule {rule} does not use them; leave them out")
    check_no_outcomes(statistics, signals=signals, rule=rule)


def check_no_outcomes(statistics: Statistics, *, signals: tuple[str, ...], rule: str) -> None:
    """Raises RuleError when a step has successes of attempts, and they are not among `signals`."""
    if statistics.attempts is not None and "attempts" not in signals:
        raise RuleError("successes", f"successes: rule {rule} does not use them; leave successes and attempts out")


def check_length(
    signal: NDArray[np.float32], statistics: Statistics, *, num_examples: int, name: str, rule: str
) -> NDArray[np.float32]:
    """The signal, which has one value per id of the step; else RuleError."""
    num_rows = num_examples if statistics.ids is None else len(statistics.ids)
    if len(signal) != num_rows:
        raise RuleError(name, f"{name} has {len(signal)} values for {num_rows} examples: not one each for rule {rule}")
    return signal


def check_finite(signal: NDArray[np.float32], *, name: str, rule: str) -> None:
    """Raises RuleError that names the first value that is not finite."""
    finite = np.isfinite(signal)
    if not finite.all():
        index = int(np.argmin(finite))
        raise RuleError(name, f"{name}[{index}] = {signal[index]}: rule {rule} needs finite values")


def reducible_losses(statistics: Statistics) -> NDArray[np.float32] | None:
    """loss - reference_loss, nats, float32 [B]; None where the trainer did not send both."""
    if statistics.losses is None or statistics.reference_losses is None:
        return None
    with np.errstate(over="ignore"):  # what becomes infinite is refused as such
        return statistics.losses - statistics.reference_losses
