"""The rules by name: a new rule is one file and one line here."""

from typing import Any

from equipoise_server.rules.base import Rule, RuleError, SettingValues
from equipoise_server.rules.batch import BatchRule
from equipoise_server.rules.boltzmann import Boltzmann
from equipoise_server.rules.ema_relu import EmaRelu
from equipoise_server.rules.ema_sign import EmaSign
from equipoise_server.rules.exponentiated_gradient import ExponentiatedGradient
from equipoise_server.rules.learnability import Learnability
from equipoise_server.rules.loss_linear_upper import LossLinearUpper
from equipoise_server.rules.projected_gradient import ProjectedGradient
from equipoise_server.rules.rho import Rho
from equipoise_server.rules.settings import bind
from equipoise_server.rules.strata import Strata
from equipoise_server.rules.table import TableRule
from equipoise_server.rules.trajectory import Trajectory
from equipoise_server.rules.uniform import Uniform

_RULES: dict[str, type[TableRule[Any] | BatchRule[Any] | Learnability | Strata | Trajectory]] = {
    rule.name: rule
    for rule in (
        Boltzmann,
        EmaRelu,
        EmaSign,
        ExponentiatedGradient,
        Learnability,
        LossLinearUpper,
        ProjectedGradient,
        Rho,
        Strata,
        Trajectory,
        Uniform,
    )
}


def names() -> list[str]:
    """Names of the rules, sorted."""
    return sorted(_RULES)


def build(name: str, settings: SettingValues) -> Rule:
    """The rule with its settings bound; settings left out get their defaults, where they have one.

    Raises:
        RuleError: `rule.name` is unknown, or a setting is unknown or out of range (`rule.settings.<key>`).
    """
    rule_type = _RULES.get(name)
    if rule_type is None:
        raise RuleError("rule.name", f"rule.name = {name!r} is not a rule; available: {', '.join(names())}")
    return rule_type(bind(rule_type.settings_type, settings, rule=name))
