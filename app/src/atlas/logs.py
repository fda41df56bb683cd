"""One JSON object per line on standard output, for our own events and for those of every library."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from atlas.settings import Identity


def configure(level: str, service: str, identity: Identity) -> None:
    """Send all logging to standard output as JSON, stamped with where it comes from.

    `request_id` and whatever else is bound with structlog.contextvars goes into each line.
    """
    stamp = {"service": service, "host": identity.host, "slot": identity.slot, "release": identity.release}

    def add_stamp(_logger: Any, _method: str, event: EventDict) -> EventDict:
        return {**stamp, **event}

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        add_stamp,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.PositionalArgumentsFormatter(), *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
            ],
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
