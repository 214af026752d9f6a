"""The page of all metrics has every one that is exported, as it is, and nothing else."""

import re
from pathlib import Path

import pytest

from tests.deploy.metrics_page import PAGE, rows, written

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_server_exports() -> None:
    assert PAGE.read_text(encoding="utf-8") == written(), "run: python -m tests.deploy.metrics_page"


def test_every_metric_has_a_meaning() -> None:
    for _, row in rows():
        *_, meaning = (cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|\n")))
        assert len(meaning) > 8, row


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_the_text_names_only_metrics_that_there_are(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    exported = {row.split("`")[1] for _, row in rows()}
    bases = {re.sub(r"_total$", "", name) for name in exported}
    for name in re.findall(r"equipoise_server_\w+", text):
        known = {name, re.sub(r"_(count|sum|bucket)$", "", name)}
        assert known & (exported | bases) or any(each.startswith(name) for each in exported), name
