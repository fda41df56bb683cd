"""One JSON object per line on standard output, for our own events and for those of every library."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from atlas.settings import Identity


class _Output:
    """Standard output, by lines. A reader that has gone away must not fail what was to be logged."""

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    debug = info = warning = error = exception = critical = msg


def configure(level: str, service: str, identity: Identity) -> None:
    """Send all logging to standard output as JSON, stamped with where it comes from.

    `request_id` and whatever else is bound with structlog.contextvars goes into each line.
    """
    stamp = {"service": service, "host": identity.host, "slot": identity.slot, "release": identity.release}

    def add_stamp(_logger: Any, _method: str, event: EventDict) -> EventDict:
        return {**stamp, **event}

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        add_stamp,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
    ]
    render = structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    # Our own events go past the logging module: that costs a third, and there is one for each request.
    structlog.configure(
        processors=[*shared, render],
        logger_factory=lambda *_names: _Output(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.PositionalArgumentsFormatter(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These speak of each request or each statement, which is ours to log.
    for noisy in (
        "httpx",
        "httpcore",
        "trafilatura",
        "htmldate",
        "alembic",
        "sqlalchemy",
        "urllib3",
        "charset_normalizer",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)
