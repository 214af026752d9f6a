"""Structured logs: one line an event, as JSON or for eyes, with the ids of request and error.

Modules log with `structlog.get_logger(name)` and pass facts as keywords, or with `logging.getLogger(__name__)` and
`extra`: both come out alike. Nothing is configured on import: only the server's start calls `configure`.
"""

import logging
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

import structlog
from structlog.contextvars import bound_contextvars
from structlog.typing import EventDict, Processor

QUIET = ("asyncio", "grpc")
"""Libraries whose everyday messages are not news."""


def configure(
    *, level: str, form: Literal["auto", "json", "console"], stream: TextIO | None = None, process: int | None = None
) -> None:
    """Sends everything logged in this process, by whatever library, to `stream` (default: standard error).

    With `auto` a terminal gets `console`, anything else `json`. Every event has the number of the `process`, if given.
    """
    stream = stream or sys.stderr
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        *([] if process is None else [_numbered(process)]),
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if form == "json" or (form == "auto" and not stream.isatty()):
        last: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:  # plain tracebacks, as in JSON: the others print local variables, secrets among them
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=common,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _numbered(process: int) -> Processor:
    def add(_: object, __: str, event: EventDict) -> EventDict:
        return {"process": process, **event}

    return add


@contextmanager
def bound(**facts: object) -> Iterator[None]:
    """Adds `facts` to every event of this task until the block ends, such as `request_id` and `policy`."""
    with bound_contextvars(**facts):
        yield


def new_id() -> str:
    """A random id of a request or an error, 16 hexadecimal digits."""
    return secrets.token_hex(8)
