"""The rules by name: a new rule is one file and one line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from equipoise_server.rules.base import RuleError, SettingValues
from equipoise_server.rules.boltzmann import Boltzmann, BoltzmannSettings
from equipoise_server.rules.ema_relu import EmaReluSettings, ema_relu
from equipoise_server.rules.ema_sign import EmaSignSettings, ema_sign
from equipoise_server.rules.excess_loss import ExcessLoss, ExcessLossSettings
from equipoise_server.rules.exp3 import Exp3, Exp3Settings
from equipoise_server.rules.exponentiated_gradient import ExponentiatedGradientSettings, exponentiated_gradient
from equipoise_server.rules.group_dro import GroupDro, GroupDroSettings
from equipoise_server.rules.group_softmax import GroupSoftmaxSettings, group_softmax
from equipoise_server.rules.learnability import Learnability, LearnabilitySettings
from equipoise_server.rules.loss_linear_upper import LossLinearUpper, LossLinearUpperSettings
from equipoise_server.rules.projected_gradient import ProjectedGradient, ProjectedGradientSettings
from equipoise_server.rules.rho import RhoSettings, rho
from equipoise_server.rules.rule import Rule
from equipoise_server.rules.settings import EmaSettings, bind
from equipoise_server.rules.strata import Strata, StrataSettings
from equipoise_server.rules.trajectory import Trajectory, TrajectorySettings
from equipoise_server.rules.uniform import uniform


@dataclass(frozen=True, slots=True)
class _Entry:
    """A rule's settings, and what makes the rule of them."""

    settings_type: type[Any]
    make: Callable[[Any], Rule]


_RULES = {
    "boltzmann": _Entry(BoltzmannSettings, Boltzmann),
    "ema_relu": _Entry(EmaReluSettings, ema_relu),
    "ema_sign": _Entry(EmaSignSettings, ema_sign),
    "excess_loss": _Entry(ExcessLossSettings, ExcessLoss),
    "exp3": _Entry(Exp3Settings, Exp3),
    "exponentiated_gradient": _Entry(ExponentiatedGradientSettings, exponentiated_gradient),
    "group_dro": _Entry(GroupDroSettings, GroupDro),
    "group_softmax": _Entry(GroupSoftmaxSettings, group_softmax),
    "learnability": _Entry(LearnabilitySettings, Learnability),
    "loss_linear_upper": _Entry(LossLinearUpperSettings, LossLinearUpper),
    "projected_gradient": _Entry(ProjectedGradientSettings, ProjectedGradient),
    "rho": _Entry(RhoSettings, rho),
    "strata": _Entry(StrataSettings, Strata),
    "trajectory": _Entry(TrajectorySettings, Trajectory),
    "uniform": _Entry(EmaSettings, uniform),
}


def names() -> list[str]:
    """Names of the rules, sorted."""
    return sorted(_RULES)


def build(name: str, settings: SettingValues) -> Rule:
    """The rule with its settings bound; settings left out get their defaults, where they have one.

    Raises:
        RuleError: `rule.name` is unknown, or a setting is unknown or out of range (`rule.settings.<key>`).
    """
    entry = _RULES.get(name)
    if entry is None:
        raise RuleError("rule.name", f"rule.name = {name!r} is not a rule; available: {', '.join(names())}")
    return entry.make(bind(entry.settings_type, settings, rule=name))
