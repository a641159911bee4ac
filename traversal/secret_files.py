"""Files that hold a key or a secret."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

logger = logging.getLogger("underpass")


def read_secret(path: Path) -> str:
    """The text of a file; warns if other users of this machine can read it, too.

    Raises OSError, and UnicodeDecodeError for what is no text.
    """
    text = path.read_text()
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("%s: other users can read this secret; chmod 600 %s", path, path)
    return text
