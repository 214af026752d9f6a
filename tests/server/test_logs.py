"""Logs: whatever library logs, one line comes out, with the facts of the request and without secrets."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from equipoise_server import logs


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_both_ways_to_log_give_the_same_line() -> None:
    stream = io.StringIO()
    logs.configure(level="info", form="json", stream=stream)
    structlog.get_logger("equipoise.x").info("served", policy="p")
    logging.getLogger("equipoise.x").info("served", extra={"policy": "p"})
    one, other = lines(stream)
    assert {**one, "timestamp": None} == {**other, "timestamp": None}
    assert (one["event"], one["logger"], one["level"], one["policy"]) == ("served", "equipoise.x", "info", "p")


def test_bound_facts_are_in_every_line_until_the_block_ends() -> None:
    stream = io.StringIO()
    logs.configure(level="info", form="json", stream=stream)
    request_id = logs.new_id()
    with logs.bound(request_id=request_id):
        logging.getLogger("a").info("in")
        structlog.get_logger("b").info("in")
    logging.getLogger("a").info("out")
    assert [line.get("request_id") for line in lines(stream)] == [request_id, request_id, None]


def test_what_is_below_the_level_is_not_logged() -> None:
    stream = io.StringIO()
    logs.configure(level="warning", form="json", stream=stream)
    logging.getLogger("a").info("no")
    structlog.get_logger("b").info("no")
    structlog.get_logger("b").warning("yes")
    assert [line["event"] for line in lines(stream)] == ["yes"]


@pytest.mark.parametrize("form", ["json", "console"])
def test_an_exception_keeps_its_traceback_but_shows_no_local_variables(form: Any) -> None:
    stream = io.StringIO()
    logs.configure(level="info", form=form, stream=stream)
    password = "open sesame"
    try:
        raise RuntimeError("broken pipe to nowhere")
    except RuntimeError:
        structlog.get_logger("a").exception("failed", error_id="e1")
    assert "RuntimeError: broken pipe to nowhere" in stream.getvalue()
    assert "e1" in stream.getvalue()
    assert password not in stream.getvalue()


def test_programs_get_json_and_people_get_text() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, is_json in ((io.StringIO(), True), (Terminal(), False)):
        logs.configure(level="info", form="auto", stream=stream)
        structlog.get_logger("a").info("served")
        assert stream.getvalue().startswith("{") is is_json


def test_ids_differ() -> None:
    assert len({logs.new_id() for _ in range(100)}) == 100
