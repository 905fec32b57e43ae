"""The two forms of a line of the log: text for people, and JSON for programs (``server.log_format``)."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

from lesson_server.cli.log_limit import LimitedHandler

# The event of a line that a library has logged.
LIBRARY_EVENT = "library_message"
TEXT = "%(asctime)s %(levelname)s %(name)s %(event)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON: what every line has, then the fields of the event, then the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "event": getattr(record, "event", LIBRARY_EVENT),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_log(log_format: str) -> None:
    """Let everything that this process and its workers log go to stderr, rate limited.

    Args:
        log_format: ``server.log_format``.
    """
    handler = LimitedHandler()
    handler.setFormatter(
        JsonFormatter() if log_format == "json" else logging.Formatter(TEXT, defaults={"event": LIBRARY_EVENT})
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("lesson_server").setLevel(logging.INFO)
    logging.captureWarnings(True)
