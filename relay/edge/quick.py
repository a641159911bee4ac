"""Quick tunnels: a tunnel and a random name of the operator's domain, for whoever asks.

The API is the one that `cloudflared tunnel --url` asks (edge tunnel specification 13.1): `POST
/tunnel` on the domain itself. A tunnel lives as long as connectors use it, and a while longer.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import msgspec

from relay.edge.registry import Registry, Tunnel
from relay.edge.tunnel_files import new_credentials
from relay.limits import TokenBucket
from traversal.keys import Entropy
from traversal.wire.address import source_of

PATH: Final = "/tunnel"
SOURCES: Final = 10_000
"""Remembered for the limit per hour; beyond, the one that asked longest ago is forgotten."""
_NAME_BYTES: Final = 10


class QuickRefusedError(Exception):
    """No quick tunnel for this one; `status` is what it gets."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True)
class _Quick:
    tunnel: Tunnel
    host: str
    used_at: float


class QuickTunnels:
    """The quick tunnels of an edge. `now` is in monotonic seconds."""

    def __init__(
        self,
        registry: Registry,
        entropy: Entropy,
        *,
        domain: str,
        per_hour: int,
        limit: int,
        unused_seconds: float,
    ) -> None:
        self.domain = domain
        self.created = 0
        self._registry = registry
        self._entropy = entropy
        self._per_hour = per_hour
        self._limit = limit
        self._unused_seconds = unused_seconds
        self._by_host: dict[str, _Quick] = {}
        self._sources: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_host)

    def is_api(self, method: str, host: str, path: str) -> bool:
        """Whether a request asks for a quick tunnel."""
        return bool(self.domain) and (method, host, path) == ("POST", self.domain, PATH)

    def find(self, host: str) -> UUID | None:
        """The tunnel under this host (in lower case)."""
        quick = self._by_host.get(host)
        return None if quick is None else quick.tunnel.id

    def create(self, source: str, now: float) -> bytes:
        """Make a tunnel; returns the answer (JSON). Raises QuickRefusedError."""
        if len(self._by_host) >= self._limit:
            raise QuickRefusedError(503, "this edge has no room for more quick tunnels")
        if not self._bucket(source_of(source), now).try_take(now, 1):
            raise QuickRefusedError(429, f"{self._per_hour} quick tunnels per hour are enough")
        name = base64.b32encode(self._entropy(_NAME_BYTES)).decode().lower()
        host = f"{name}.{self.domain}"
        tunnel = Tunnel(f"quick-{name}", new_credentials(self._entropy))
        self._registry.add_tunnel(tunnel)
        self._by_host[host] = _Quick(tunnel, host, now)
        self.created += 1
        credentials = tunnel.credentials
        result = {
            "id": str(tunnel.id),
            "name": tunnel.name,
            "hostname": host,
            "account_tag": credentials.account_tag,
            "secret": base64.b64encode(credentials.secret).decode(),
        }
        return msgspec.json.encode({"success": True, "result": result, "errors": []})

    def forget_unused(self, now: float) -> list[UUID]:
        """Remove those that had no connector for too long; call it now and then."""
        removed = []
        for host, quick in list(self._by_host.items()):
            if any(self._registry.connections(quick.tunnel.id)):
                quick.used_at = now
            elif now >= quick.used_at + self._unused_seconds:
                del self._by_host[host]
                self._registry.remove_tunnel(quick.tunnel.id)
                removed.append(quick.tunnel.id)
        return removed

    def _bucket(self, source: str, now: float) -> TokenBucket:
        bucket = self._sources.get(source)
        if bucket is None:
            bucket = self._sources[source] = TokenBucket(self._per_hour / 3600, self._per_hour, now)
            if len(self._sources) > SOURCES:
                self._sources.popitem(last=False)
        self._sources.move_to_end(source)
        return bucket
