"""What others say in logs and on terminals."""

from __future__ import annotations

import logging
import sys

from relay.config import LogConfig
from relay.logs import set_up_logging
from traversal.printable import LineFormatter, printable

HOSTILE = "aborted: x\n2026-01-01 00:00:00 INFO    all is well\x1b[2J\r\x9b1m\u2028\u202e\ud800"


def test_printable() -> None:
    """Letters of all languages pass; controls, line ends, direction marks and halves don't."""
    assert printable("Zürich 東京") == "Zürich 東京"
    assert printable(HOSTILE).isprintable()
    assert len(printable(HOSTILE)) == len(HOSTILE)


def test_one_record_is_one_line() -> None:
    """Also where the text came as an argument; a traceback of ours keeps its lines."""
    formatter = LineFormatter("%(levelname)s %(message)s")
    try:
        raise ValueError("ours")
    except ValueError:
        information = sys.exc_info()
    record = logging.LogRecord("x", logging.INFO, "f", 1, "refused: %s", (HOSTILE,), information)
    first, *rest = formatter.format(record).split("\n")
    assert first.startswith("INFO refused: aborted: x?2026-01-01")
    assert first.isprintable()
    assert rest[-1] == "ValueError: ours"


def test_the_relays_log() -> None:
    """`underpass-relay` formats so, too."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        set_up_logging(LogConfig())
        record = logging.LogRecord("x", logging.INFO, "f", 1, "%s", (HOSTILE,), None)
        assert root.handlers[0].format(record).isprintable()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
