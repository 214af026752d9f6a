import math

import pytest

from equipoise_server.rules import RuleError, build, names

REQUIRED = {"trajectory": {"rows": 2, "learning_rate": 0.1}}
"""Settings without a default."""


def test_names_are_sorted_and_build() -> None:
    gradient = ["exponentiated_gradient", "projected_gradient"]
    others = ["boltzmann", "ema_relu", "ema_sign", "learnability", "loss_linear_upper", "rho", "strata"]
    others += ["trajectory", "uniform"]
    others += ["excess_loss", "exp3", "group_dro", "group_softmax"]
    assert names() == sorted(gradient + others)
    assert [build(name, REQUIRED.get(name, {})).name for name in names()] == names()


def test_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(RuleError, match=r"'ema' is not a rule; available: boltzmann, .*uniform") as caught:
        build("ema", {})
    assert caught.value.field == "rule.name"


@pytest.mark.parametrize(("given", "missing"), [({}, "rows"), ({"rows": 3}, "learning_rate")])
def test_a_setting_without_default_is_required(given: dict[str, float], missing: str) -> None:
    with pytest.raises(RuleError, match=f"rule.settings.{missing} is absent: rule trajectory needs a value") as caught:
        build("trajectory", given)
    assert caught.value.field == f"rule.settings.{missing}"


def test_settings_are_resolved() -> None:
    settings = build("ema_sign", {"floor": 1, "ema_decay": 0.5}).settings
    own = {"floor": 1.0, "ema_decay": 0.5, "rms_decay": 0.99, "threshold": 0.0, "loss_penalty": 0.0}
    assert settings == own | {"guard": True, "guard_stretch": 0.125}
    assert all(type(value) is float for name, value in settings.items() if name != "guard")
    assert settings["guard"] is True
    assert build("ema_sign", settings).settings == settings


@pytest.mark.parametrize(
    ("name", "key", "value", "allowed"),
    [
        ("ema_sign", "floor", 1e-5, r"a value 0 or in \[0.0001, 1\]"),
        ("ema_sign", "floor", -1, r"a value 0 or in \[0.0001, 1\]"),
        ("exponentiated_gradient", "floor", 0, r"a value in \[0.0001, 1\]"),
        ("ema_sign", "ema_decay", 1.0, r"a value in \[0, 0.9999\]"),
        ("ema_sign", "ema_decay", math.nan, r"a value in \[0, 0.9999\]"),
        ("ema_sign", "ema_decay", 10**400, r"a value in \[0, 0.9999\]"),
        ("projected_gradient", "cap", math.inf, r"a value in \[1.01, 1000\]"),
        ("projected_gradient", "floor", 1.0, r"a value in \[0, 0.99\]"),
        ("ema_relu", "saturation", "1", r"a number in \[0.001, 1000\]"),
        ("boltzmann", "guard", 1.0, "rule boltzmann needs true or false"),
        ("rho", "guard", "yes", "rule rho needs true or false"),
        ("uniform", "guard_stretch", 0.0, r"a value in \[0.01, 1\]"),
        ("ema_relu", "saturation", True, r"a number in \[0.001, 1000\]"),
        ("group_softmax", "temperature", 0.0, r"a value in \[0.01, 1000\]"),
        ("group_softmax", "floor", 0.0, r"a value in \[0.0001, 1\]"),
        ("exp3", "floor", 1e-5, r"a value 0 or in \[0.0001, 1\]"),
        ("exp3", "reward_decay", 1.0, r"a value in \[0, 0.9999\]"),
        ("group_dro", "learning_rate", 0.0, r"a value in \[1e-06, 10\]"),
        ("group_dro", "adjustment", -1.0, r"a value in \[0, 1e\+06\]"),
        ("excess_loss", "floor", 0.0, r"a value in \[0.0001, 1\]"),
        ("trajectory", "rows", 2.5, r"a value whole and in \[1, 1e\+07\]"),
        ("trajectory", "rows", 0, r"a value whole and in \[1, 1e\+07\]"),
        ("trajectory", "rows", math.inf, r"a value whole and in \[1, 1e\+07\]"),
        ("trajectory", "policy_epochs", -1, r"a value 0 or whole and in \[1, 1e\+09\]"),
        ("trajectory", "learning_rate", 0, r"a value in \[1e-30, 1e\+30\]"),
        ("uniform", "floor", 0.1, r"no such setting; it has ema_decay, guard, guard_stretch, rms_decay"),
    ],
)
def test_bad_setting_names_field_value_rule_and_range(
    name: str, key: str, value: float | bool | str, allowed: str
) -> None:
    with pytest.raises(RuleError, match=allowed) as caught:
        build(name, REQUIRED.get(name, {}) | {key: value})
    assert caught.value.field == f"rule.settings.{key}"
    message = str(caught.value)
    assert name in message
    assert f"rule.settings.{key}" in message
    assert "no such setting" in message or repr(value) in message
