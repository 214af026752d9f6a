"""Each alert fires where it should and is silent where it should, by promtool; and each has a runbook."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.alert_cases import CASES, Case, Series
from tests.deploy.prometheus import programs
from tests.deploy.rules import DEPLOY, FILES, RECORDING, RUNBOOKS, alerts, rules


def written_test(series: Series, *, query: str, at: str, expected: list[str]) -> dict[str, Any]:
    """One of promtool's tests: these series, then this query gives just these series, all of them 1."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": at, "exp_samples": [{"labels": each, "value": 1} for each in expected]}
        ],
    }


def firing(case: Case) -> list[str]:
    """The alerts of a case, as Prometheus stores them."""
    found = []
    for severity in case.severities:
        labels = {"alertname": case.alert, "alertstate": "firing", "severity": severity, **case.labels}
        found.append("ALERTS{" + ",".join(f'{name}="{value}"' for name, value in sorted(labels.items())) + "}")
    return found


def unit_tests(case: Case) -> list[dict[str, Any]]:
    query = f'ALERTS{{alertname="{case.alert}",alertstate="firing"}}'
    return [
        written_test(case.fires, query=query, at=case.at, expected=firing(case)),
        *(written_test(series, query=query, at=case.at, expected=[]) for series in case.silent),
    ]


@pytest.mark.slow  # they fetch promtool
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_rules_are_valid(file: Path) -> None:
    subprocess.run([programs() / "promtool", "check", "rules", file], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("rule_file", [file for file in FILES if file != RECORDING], ids=lambda file: file.name)
def test_each_alert_fires_and_stays_silent(rule_file: Path, tmp_path: Path) -> None:
    names = {rule.name for rule in rules(rule_file)}
    tests = [each for case in CASES if case.alert in names for each in unit_tests(case)]
    file = tmp_path / "alerts.json"  # which is YAML, too
    file.write_text(json.dumps({"rule_files": [str(RECORDING), str(rule_file)], "tests": tests}))
    done = subprocess.run([programs() / "promtool", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_case_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    """Else the test above might say nothing."""
    [fires, *_] = unit_tests(CASES[1])
    fires["promql_expr_test"][0]["exp_samples"] = []
    file = tmp_path / "alerts.json"
    file.write_text(json.dumps({"rule_files": [str(each) for each in FILES], "tests": [fires]}))
    done = subprocess.run([programs() / "promtool", "test", "rules", file], capture_output=True, check=False)
    assert done.returncode == 1


def test_each_alert_and_severity_has_a_case() -> None:
    cases = {(case.alert, severity) for case in CASES for severity in case.severities}
    assert cases == {(alert.name, alert.severity) for alert in alerts()}


def test_each_alert_says_what_is_wrong_and_where_to_read_on() -> None:
    for alert in alerts():
        assert alert.annotations == ("description", "runbook_url", "summary"), alert.name
        assert alert.severity in {"critical", "warning", "info"}, alert.name
        assert DEPLOY.parent / alert.runbook == RUNBOOKS / f"{alert.name}.md", alert.name


def test_names_follow_the_convention() -> None:
    for rule in rules():
        pattern = r"Equipoise[A-Z][A-Za-z]+" if rule.is_alert else r"(job|instance|policy):equipoise_server_\w+:\w+"
        assert re.fullmatch(pattern, rule.name), rule.name


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    pages = {page.stem for page in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == {alert.name for alert in alerts()}


def test_a_runbook_says_what_it_means_how_to_look_and_what_to_do() -> None:
    for name in {alert.name for alert in alerts()}:
        text = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
        severities = " or ".join(alert.severity for alert in alerts() if alert.name == name)
        assert text.startswith(f"# {name}\n\nSeverity: {severities}."), name
        assert re.findall(r"^## (.*)", text, re.M) == ["What it means", "How to look", "What to do"], name
        assert "```sh\n" in text, name


def test_the_pages_link_to_pages_that_there_are_and_are_listed() -> None:
    for page in RUNBOOKS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    listed = set(re.findall(r"\((Equipoise\w+)\.md\)", (RUNBOOKS / "README.md").read_text(encoding="utf-8")))
    assert listed == {alert.name for alert in alerts()}
