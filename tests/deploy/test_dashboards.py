"""The dashboards: what is committed is what the code makes, every panel is explained, and no metric is forgotten."""

import json
import re
from collections import Counter

import pytest

from deploy.grafana.board import Board
from deploy.grafana.boards import FOLDER, boards
from tests.deploy.dashboards import exported, metrics_in, of_panels, of_rules, reached_from, recorded_in
from tests.deploy.rules import DEPLOY, RUNBOOKS, alerts, recorded

NOT_SHOWN: dict[str, str] = {}
"""Metrics without a panel, and why."""

UNITS = {"short", "ops", "s", "d", "decbytes", "percentunit", "none", "suffix: nats"}
each_board = pytest.mark.parametrize("board", boards(), ids=lambda board: board.name)


def test_the_files_are_what_the_code_makes() -> None:
    files = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.json")}
    assert files == {f"{board.name}.json": board.json() for board in boards()}, "run: python -m deploy.grafana"


@each_board
def test_every_panel_says_what_it_shows_and_in_which_unit(board: Board) -> None:
    for panel in board.panels:
        assert len(panel.description) > 30, panel.title
        assert panel.description.endswith("."), panel.title
        assert panel.unit in UNITS, panel.title
        assert panel.queries, panel.title
    titles = Counter(panel.title for panel in board.panels)
    assert titles.most_common(1)[0][1] == 1


@each_board
def test_rows_are_full_and_nothing_overlaps(board: Board) -> None:
    """Panels of a row stand beside each other, and fill Grafana's 24 columns."""
    places: dict[int, int] = {}
    for panel in json.loads(board.json())["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        places[at["y"]] = places.get(at["y"], 0) + at["w"]
    assert set(places.values()) <= {24, 16, 8}, places


@each_board
def test_the_choices_at_the_top_are_those_that_queries_use(board: Board) -> None:
    built = json.loads(board.json())
    offered = {variable["name"] for variable in built["templating"]["list"]}
    text = json.dumps(built["panels"]) + json.dumps(built["annotations"])
    used = set(re.findall(r"\$\{?([a-z]+)\}?", text))
    assert used <= offered
    assert offered - used <= {"namespace", "job", "instance", "runbooks"}
    assert built["uid"] == f"equipoise-{board.name}"


@each_board
def test_links_lead_to_runbooks_that_there_are(board: Board) -> None:
    for panel in board.panels:
        for name in panel.runbooks:
            assert (RUNBOOKS / f"{name}.md").exists(), panel.title


def test_every_alert_is_linked_from_a_panel() -> None:
    linked = {name for board in boards() for panel in board.panels for name in panel.runbooks}
    assert linked == {alert.name for alert in alerts()}


def test_every_metric_has_a_panel() -> None:
    shown = reached_from(question.expression for question in of_panels())
    assert exported() - shown == NOT_SHOWN.keys()


def test_every_panel_and_rule_asks_for_metrics_that_there_are() -> None:
    known = exported()
    for question in (*of_panels(), *of_rules()):
        assert metrics_in(question.expression) <= known, question
        assert recorded_in(question.expression) <= recorded(), question
        assert metrics_in(question.expression) | recorded_in(question.expression) or "ALERTS" in question.expression


def test_every_recorded_series_is_used() -> None:
    used = {name for question in (*of_panels(), *of_rules()) for name in recorded_in(question.expression)}
    assert used == recorded()


def test_every_board_has_a_picture() -> None:
    pictures = {file.stem: file.stat().st_size for file in FOLDER.with_name("pictures").glob("*.png")}
    assert pictures.keys() == {board.name for board in boards()}
    assert max(pictures.values()) < 300_000
    text = (DEPLOY / "grafana" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(pictures/(\w+)\.png\)", text)) == pictures.keys()


def test_the_readme_shows_every_board() -> None:
    text = (DEPLOY / "grafana" / "README.md").read_text(encoding="utf-8")
    assert [name for name in re.findall(r"^## (.*)", text, re.M) if name in {board.title for board in boards()}] == [
        board.title for board in boards()
    ]
