"""With a real Prometheus and servers that work: every query of every panel and rule finds data, every command runs."""

import os
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from json import load
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.dashboards import Question, chosen, of_panels, of_rules, recorded_in, selectors_in
from tests.deploy.prometheus import programs, queried, until
from tests.deploy.rules import RUNBOOKS, recorded
from tests.deploy.scene import Scene, scene, shell
from tests.deploy.training import COLLAPSED

pytestmark = pytest.mark.slow

WITHOUT_DATA = {
    "streams / Turned away for want of room / {{reason}}": "no bound of the server is reached by so few trainers",
    "tenants / Because a share was used up / {{reason}}": "nor one of a tenant",
}
"""Queries that find nothing here, by where they are, and why."""

RATE = "15s"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The scene after half a minute in which all that can happen has happened."""
    with scene(tmp_path_factory.mktemp("scene")) as found:
        steps = 'sum(equipoise_server_updates_total{result="applied"}) > 200'
        until(lambda: queried(found.prometheus, steps), "jobs train")
        found.misbehave()
        found.forget()
        found.reload()
        found.stumble()
        time.sleep(4)  # samples after the events: rates need two
        found.misbehave()
        found.forget()
        refused = 'equipoise_server_reloads_total{file="certificates", result="ok"} > 0'
        until(lambda: queried(found.prometheus, refused), "files are read again")
        until(lambda: queried(found.prometheus, 'ALERTS{alertstate="pending"}'), "an alert is about to fire")
        time.sleep(4)
        yield found


def over_time(url: str, expression: str) -> list[dict[str, Any]]:
    """What a panel draws of the last minutes."""
    now = time.time()
    asked = urllib.parse.urlencode({"query": expression, "start": now - 120, "end": now, "step": 1})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{asked}") as answer:
        found: list[dict[str, Any]] = load(answer)["data"]["result"]
        return found


def test_every_query_of_every_panel_finds_data(world: Scene) -> None:
    without = {
        question.where
        for question in of_panels(rate=RATE)
        if not any(
            value != "NaN" for each in over_time(world.prometheus, question.expression) for _, value in each["values"]
        )
    }
    assert without == WITHOUT_DATA.keys()


def test_every_series_that_rules_ask_for_is_there(world: Scene) -> None:
    """An alert that is silent gives nothing: what it compares is asked for, each part by itself."""
    without = {
        f"{question.where}: {selector}"
        for question in of_rules()
        for selector in selectors_in(question.expression)
        if not over_time(world.prometheus, selector)
    }
    assert without == set()


def test_every_recorded_series_is_recorded(world: Scene) -> None:
    assert {name for name in recorded() if not over_time(world.prometheus, name)} == set()


def test_every_rule_kind_is_there_and_only_the_collapsed_policy_has_collapsed(world: Scene) -> None:
    """The condition of the alert, at once: it would have to hold for a quarter of an hour."""
    kinds = queried(world.prometheus, "count by (kind) (equipoise_server_policy_info)")
    assert {each["metric"]["kind"] for each in kinds} == {"table", "batch", "trajectory"}
    [rule] = [each for each in of_rules() if each.where == "EquipoiseWeightCollapse"]
    found = {each["metric"]["policy"] for each in queried(world.prometheus, rule.expression)}
    assert found == {COLLAPSED.policy}


def commands() -> list[Question]:
    found = []
    for page in sorted(RUNBOOKS.glob("Equipoise*.md")):
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for command in re.split(r"\n(?! )", block.strip()):
                found.append(Question(where=page.stem, expression=command))
    return found


def test_every_command_of_every_runbook_runs(world: Scene) -> None:
    path = f"{programs()}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PROMETHEUS": world.prometheus,
        "METRICS": world.guarded.metrics_address,  # it has a certificate, a Redis of its own, and processes
        "SERVER": world.servers[0].address,
        "POLICY": "run-ema-sign",
    }
    done = {
        (command.where, command.expression): shell(command.expression, environment=environment)
        for command in commands()
    }
    failed = {key: result.stderr for key, result in done.items() if result.returncode}
    assert failed == {}


def test_what_runbooks_ask_for_is_there(world: Scene) -> None:
    """A query may find nothing while all is well, but not because it asks for what does not exist."""
    for command in commands():
        if "promtool query" in command.expression:
            expression = command.expression.partition("'")[2].rpartition("'")[0]
            missing = [each for each in selectors_in(expression) if not over_time(world.prometheus, each)]
            assert missing == [], command
        assert recorded_in(command.expression) <= recorded(), command


def test_all_chosen_is_a_query() -> None:
    assert chosen('up{job=~"$job"}[$__rate_interval]', rate="3s") == 'up{job=~".*"}[3s]'
