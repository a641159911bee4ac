"""Log lines for people, or JSON lines for machines, on standard error."""

from __future__ import annotations

import logging
import sys
import time

import msgspec

from relay.config import LogConfig
from traversal.printable import LineFormatter


class _JsonFormatter(logging.Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        members = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._prefix + record.getMessage(),
        }
        if record.exc_info:
            members["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(members).decode()


class _TextFormatter(LineFormatter):
    def __init__(self, prefix: str) -> None:
        super().__init__(
            "%(asctime)s %(levelname)-7s " + prefix.replace("%", "%%") + "%(message)s",
            "%Y-%m-%d %H:%M:%S",
        )


def set_up_logging(config: LogConfig, *, prefix: str = "") -> None:
    """Send this process's log to standard error. `prefix` tells workers apart."""
    formatter = _JsonFormatter(prefix) if config.format == "json" else _TextFormatter(prefix)
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # qh3 warns of every connection that its other side closes.
    logging.getLogger("quic").setLevel(logging.ERROR)
    set_level(config)


def set_level(config: LogConfig) -> None:
    """The level alone, for a reload."""
    logging.getLogger().setLevel(config.level.upper())
