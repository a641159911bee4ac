"""The regular expressions of ingress rules (edge tunnel specification 12.2).

RE2's syntax, which is that of cloudflared (Go's), by the same library: matching takes time linear
in the path, whatever the expression, so that neither a visitor nor whoever pushes a configuration
can stop a connector with one.
"""

from __future__ import annotations

from typing import Final, Protocol

from traversal.wire.tunnel.errors import TunnelError

MAX_PATTERN_CHARACTERS: Final = 1024
_MEMORY_BYTES: Final = 1 << 20


class PathPattern(Protocol):
    """A compiled expression."""

    def search(self, text: str) -> object:
        """Something true if it matches anywhere in a path."""


def compile_path_pattern(text: str) -> PathPattern:
    """Raises TunnelError that says what is wrong with the expression."""
    # Imported late: few configurations have paths.
    import re2

    if len(text) > MAX_PATTERN_CHARACTERS:
        raise TunnelError(f"longer than {MAX_PATTERN_CHARACTERS} characters")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY_BYTES
    try:
        compiled: PathPattern = re2.compile(text, options)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0] if error.args else error
        if isinstance(reason, bytes):
            reason = reason.decode("utf-8", "replace")
        raise TunnelError(f"no regular expression (RE2): {reason}") from None
    return compiled
