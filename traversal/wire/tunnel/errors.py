"""The one error of the tunnel's wire formats."""

from __future__ import annotations


class TunnelError(ValueError):
    """Bytes of the other side, or a document, that are not what the specification says."""
