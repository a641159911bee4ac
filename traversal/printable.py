"""Text of others for a terminal or a log of lines."""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    """One line of text without control characters: each is a question mark instead. Otherwise who
    chose the text could forge further lines, or command the reader's terminal."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


class LineFormatter(logging.Formatter):
    """Formats records as `logging.Formatter` does; every message is one printable line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """See logging.Formatter."""
        record.message = printable(record.message)
        return super().formatMessage(record)
