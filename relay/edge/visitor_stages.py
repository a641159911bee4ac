"""Where the edge turns a visitor away: for `relay.refusals`, which counts and logs."""

from __future__ import annotations

import enum


class VisitorStage(enum.StrEnum):
    """Where a visitor was turned away."""

    CONNECTIONS = "connections"
    """More visitors, of one source or together, than there may be."""
    PROXY = "proxy"
    TLS = "tls"
    HTTP = "http"
    """No HTTP, too slow, or too much of it."""
    REQUEST = "request"
    """A request that is malformed, forbidden or one too many, or for what is not published."""
    TUNNEL = "tunnel"
    """No connector did what was asked."""
    DATAGRAM = "datagram"
    QUICK = "quick"
