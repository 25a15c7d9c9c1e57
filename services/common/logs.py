"""Process-wide logging: plain text by default, JSON lines with `DSPARK_LOG_FORMAT=json`.

Called once by a process's main; library code only ever asks for `logging.getLogger(__name__)`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from opentelemetry import trace

from services.common.env import Env

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OMITTED = _STANDARD_FIELDS | {"color_message"}
"""`color_message` is uvicorn's message again, with terminal colour codes."""


def setup_logging(service: str, environ: Mapping[str, str] = os.environ) -> None:
    """Sends all logs to stderr, as `DSPARK_LOG_LEVEL` (INFO) and `DSPARK_LOG_FORMAT` (plain | json) say.

    Raises ConfigError for any other value. Calling it again replaces the handler.
    """
    env = Env(environ)
    level = env.choice("DSPARK_LOG_LEVEL", "INFO", _LEVELS)
    style = env.choice("DSPARK_LOG_FORMAT", "plain", ("plain", "json"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service) if style == "json" else PlainFormatter(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)


class PlainFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {service} %(name)s: %(message)s")


class JsonFormatter(logging.Formatter):
    """One object per line; `extra=` fields and the ids of the current span become keys."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update({key: value for key, value in vars(record).items() if key not in _OMITTED})
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            entry["trace_id"] = trace.format_trace_id(span.trace_id)
            entry["span_id"] = trace.format_span_id(span.span_id)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)
