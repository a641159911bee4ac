"""A frozen picture of a relay, for metrics, the status page, `top` and whoever asks by HTTP.

Everything here encodes to JSON and back with msgspec, so that worker processes can send their
snapshots to the one that answers; `merge` makes one of several.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import msgspec
from msgspec import Struct, field

from relay.bootstrap_dns import BootstrapDnsCounters
from relay.counters import Counters, DropReason, Kind
from relay.pump import Connection, Pump
from relay.refusals import Refusals
from relay.sampling import HISTORY_SAMPLES, Rates, Sampler
from relay.stun import StunStatistics
from relay.upgrade import RateLimit
from traversal.keys import NodePublic

MAX_CLIENTS: Final = 1000
"""Listed in a snapshot, those who moved most bytes first: about 400 bytes of JSON each."""
TLS_VERSIONS: Final = ("1.2", "1.3")

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class FrontCounters:
    """What the server counts in front of the pump, since its start."""

    accepted_connections: int = 0
    rejected_connections: int = 0
    """By the accept rate limit."""
    websocket_accepts: int = 0
    tls_requests: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(TLS_VERSIONS, 0)
    )
    """HTTP requests by TLS version (TLS_VERSIONS)."""


class Traffic(Struct, frozen=True, kw_only=True):
    """`relay.counters.Counters`, frozen; drops are by reason, then by kind."""

    accepts: int = 0
    packets_received: dict[str, int] = field(default_factory=dict)
    bytes_received: int = 0
    packets_sent: int = 0
    bytes_sent: int = 0
    packets_waited: int = 0
    packets_dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    bytes_dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    packets_forwarded_out: int = 0
    packets_forwarded_in: int = 0
    peer_gone_disconnected_frames: int = 0
    peer_gone_not_here_frames: int = 0
    home_moves_in: int = 0
    home_moves_out: int = 0
    got_ping: int = 0
    sent_pong: int = 0
    unknown_frames: int = 0
    write_timeouts: int = 0
    rate_limit_waits: int = 0
    duplicate_connections: int = 0
    multiforwarder_created: int = 0
    multiforwarder_deleted: int = 0
    forwarder_delete_other_value: int = 0
    protocol_violations: int = 0

    @classmethod
    def of(cls, counters: Counters) -> Self:
        """A copy of the counters as they are."""
        values = {name: getattr(counters, name) for name in cls.__struct_fields__}
        values["packets_received"] = {str(k): n for k, n in counters.packets_received.items()}
        for name in ("packets_dropped", "bytes_dropped"):
            counts = values[name]
            values[name] = {str(r): {str(k): counts[r, k] for k in Kind} for r in DropReason}
        return cls(**values)


class QueueDelay(Struct, frozen=True, kw_only=True):
    """From reading a packet to writing it: counts per bucket, one more than `bounds_seconds`."""

    bounds_seconds: tuple[float, ...]
    counts: tuple[int, ...]
    total_seconds: float


class Connections(Struct, frozen=True, kw_only=True):
    """Who is connected now. Connections between workers of one host are not counted."""

    current: int = 0
    home: int = 0
    not_ideal: int = 0
    local_keys: int = 0
    remote_keys: int = 0
    """Distinct keys that are only elsewhere in the region."""
    duplicate_keys: int = 0
    duplicate_connections: int = 0
    watchers: int = 0
    waiting_packets: int = 0
    waiting_bytes: int = 0
    """Of packets that wait for slow readers."""


class Resources(Struct, frozen=True, kw_only=True):
    """Of the process."""

    memory_bytes: int = 0
    """Resident."""
    open_descriptors: int = 0
    cpu_seconds: float = 0.0

    @classmethod
    def read(cls) -> Self:
        """Of this process, now; zeros where there is no /proc."""
        try:
            with open("/proc/self/statm", "rb") as file:
                memory_bytes = int(file.read().split()[1]) * _PAGE_BYTES
            # Linux 6.2 and newer give the count as the size; listing takes 30 ms at 50000.
            descriptors = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
        except OSError:
            memory_bytes = descriptors = 0
        return cls(
            memory_bytes=memory_bytes,
            open_descriptors=descriptors,
            cpu_seconds=time.process_time(),
        )


class Certificate(Struct, frozen=True, kw_only=True):
    """The certificate that is served."""

    names: tuple[str, ...]
    not_after_unix_time: float
    is_ready: bool = True
    """False while ACME has not brought the first one."""
    pin: str = ""
    """`sha256-raw:...` where it is self-signed."""


class Admission(Struct, frozen=True, kw_only=True):
    """Decisions about clients since the start; the attributes of admission's own statistics."""

    allowed: int = 0
    denied: int = 0
    cut: int = 0
    """Sessions ended because they are no longer admitted."""
    reloads: int = 0
    reload_failures: int = 0
    hook_requests: int = 0
    hook_failures: int = 0
    hook_cached_answers: int = 0
    hook_failed_open: int = 0


class ClientView(Struct, frozen=True, kw_only=True):
    """One connected client, as an operator sees it."""

    key: str
    """`nodekey:` and 64 hex digits."""
    short: str
    address: str
    port: int
    connected_seconds: float
    is_home: bool
    is_mesh: bool
    is_prober: bool
    is_duplicate: bool
    """Its key has other connections here."""
    packets_in: int
    bytes_in: int
    packets_out: int
    bytes_out: int
    packets_dropped: int
    waiting_packets: int
    waiting_bytes: int
    rate_limit_bytes_per_second: float | None
    is_held_back: bool
    """It is above its rate, and not read from just now."""


class MeshLink(Struct, frozen=True, kw_only=True):
    """A connection that this relay made to another one of its region."""

    short: str
    address: str
    port: int
    connected_seconds: float
    waiting_bytes: int


class Snapshot(Struct, frozen=True, kw_only=True):
    """A relay at one moment. Counts are since the start."""

    hostname: str
    version: str
    server_key: str
    unix_time: float
    uptime_seconds: float
    workers: int = 1
    is_draining: bool = False
    connections: Connections
    traffic: Traffic
    queue_delay: QueueDelay
    rates: Rates
    tcp_rtt: dict[str, int]
    """Samples by label (`relay.sampling`)."""
    refusals: dict[str, int]
    """Connections turned away, by stage."""
    accepted_connections: int
    rejected_connections: int
    websocket_accepts: int
    tls_requests: dict[str, int]
    tls_active: dict[str, int]
    """Clients by TLS version."""
    resources: Resources
    rate_limit: RateLimit | None = None
    stun: StunStatistics | None = None
    bootstrap_dns: BootstrapDnsCounters | None = None
    admission: Admission | None = None
    certificate: Certificate | None = None
    clients: tuple[ClientView, ...] = ()
    clients_left_out: int = 0
    """Connected, but not listed."""
    mesh_links: tuple[MeshLink, ...] = ()
    mesh_peers: int = 0
    """Mesh links that should be there."""

    @classmethod
    def of(
        cls,
        pump: Pump,
        *,
        hostname: str,
        version: str,
        server_key: NodePublic,
        now: float,
        unix_time: float,
        started_at: float,
        sampler: Sampler,
        refusals: Refusals,
        front: FrontCounters,
        is_draining: bool = False,
        rate_limit: RateLimit | None = None,
        stun: StunStatistics | None = None,
        bootstrap_dns: BootstrapDnsCounters | None = None,
        admission: object | None = None,
        certificate: Certificate | None = None,
        mesh_peers: int = 0,
        max_clients: int = MAX_CLIENTS,
    ) -> Self:
        """Of this process.

        Args:
            now, started_at: monotonic seconds.
            admission: anything with the attributes of `Admission`.
            mesh_peers: how many mesh links should be there.
            max_clients: listed at most; 0 for metrics, which need none.
        """
        delay = pump.switch.counters.queue_delay
        connections = list(pump.connections.values())
        clients = [each for each in connections if not each.is_outgoing and not each.is_sibling]
        listed = heapq.nlargest(max_clients, clients, key=lambda c: c.bytes_in + c.bytes_out)
        tls_active = dict.fromkeys(TLS_VERSIONS, 0)
        for client in clients:
            if client.tls is not None:
                tls = (client.tls.version() or "").removeprefix("TLSv")
                tls_active[tls] = tls_active.get(tls, 0) + 1
        return cls(
            hostname=hostname,
            version=version,
            server_key=str(server_key),
            unix_time=unix_time,
            uptime_seconds=now - started_at,
            is_draining=is_draining,
            connections=_count_connections(pump, clients),
            traffic=Traffic.of(pump.switch.counters),
            queue_delay=QueueDelay(
                bounds_seconds=delay.bounds, counts=tuple(delay.counts), total_seconds=delay.total
            ),
            rates=sampler.rates,
            tcp_rtt=dict(sampler.rtt),
            refusals={str(stage): count for stage, count in refusals.counts.items()},
            accepted_connections=front.accepted_connections,
            rejected_connections=front.rejected_connections,
            websocket_accepts=front.websocket_accepts,
            tls_requests=dict(front.tls_requests),
            tls_active=tls_active,
            resources=Resources.read(),
            rate_limit=rate_limit,
            stun=stun,
            bootstrap_dns=None if bootstrap_dns is None else dataclasses.replace(bootstrap_dns),
            admission=(
                None
                if admission is None
                else msgspec.convert(admission, Admission, from_attributes=True)
            ),
            certificate=certificate,
            clients=tuple(_view_of(client, now) for client in listed),
            clients_left_out=len(clients) - len(listed),
            mesh_links=tuple(
                MeshLink(
                    short=NodePublic(link.key).short(),
                    address=str(link.address or ""),
                    port=link.port,
                    connected_seconds=now - link.connected_at,
                    waiting_bytes=link.backlog.size_bytes if link.backlog else 0,
                )
                for link in connections
                if link.is_outgoing and not link.is_sibling
            ),
            mesh_peers=mesh_peers,
        )


def merge(snapshots: Sequence[Snapshot]) -> Snapshot:
    """One snapshot of several workers' of one relay; there must be at least one.

    Counts are added and clients put together, busiest first. Two things are approximate: a key
    that is connected to two workers counts as two local keys, and `remote_keys` is what the best
    informed worker knows beyond those.
    """
    first = snapshots[0]
    if len(snapshots) == 1:
        return first
    connections = _sum([each.connections for each in snapshots])
    # To each worker the others' keys are remote ones.
    in_region = max(c.local_keys + c.remote_keys for c in (each.connections for each in snapshots))
    clients = sorted(
        (client for each in snapshots for client in each.clients),
        key=lambda client: client.bytes_in + client.bytes_out,
        reverse=True,
    )
    certificates = [each.certificate for each in snapshots if each.certificate is not None]
    return msgspec.structs.replace(
        first,
        unix_time=max(each.unix_time for each in snapshots),
        uptime_seconds=max(each.uptime_seconds for each in snapshots),
        workers=sum(each.workers for each in snapshots),
        is_draining=any(each.is_draining for each in snapshots),
        connections=msgspec.structs.replace(
            connections, remote_keys=max(0, in_region - connections.local_keys)
        ),
        queue_delay=QueueDelay(
            bounds_seconds=first.queue_delay.bounds_seconds,
            counts=tuple(map(sum, zip(*(s.queue_delay.counts for s in snapshots), strict=True))),
            total_seconds=sum(each.queue_delay.total_seconds for each in snapshots),
        ),
        rates=_merge_rates([each.rates for each in snapshots]),
        certificate=min(certificates, key=lambda c: c.not_after_unix_time, default=None),
        clients=tuple(clients[:MAX_CLIENTS]),
        clients_left_out=sum(each.clients_left_out for each in snapshots)
        + len(clients[MAX_CLIENTS:]),
        mesh_links=tuple(link for each in snapshots for link in each.mesh_links),
        **{name: _sum([getattr(each, name) for each in snapshots]) for name in _SUMMED},
    )


_SUMMED: Final = (
    "traffic",
    "tcp_rtt",
    "refusals",
    "accepted_connections",
    "rejected_connections",
    "websocket_accepts",
    "tls_requests",
    "tls_active",
    "resources",
    "stun",
    "bootstrap_dns",
    "admission",
    "mesh_peers",
)

_T = TypeVar("_T")


def _sum(values: Sequence[_T]) -> _T:
    """Numbers added up, also inside dictionaries and classes; None counts as nothing."""
    present: list[Any] = [value for value in values if value is not None]
    if not present:
        return values[0]
    first = present[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in present for key in value)
        total: Any = {key: _sum([value[key] for value in present if key in value]) for key in keys}
    elif isinstance(first, (int, float)):
        total = sum(present)
    else:
        names = (
            first.__struct_fields__
            if isinstance(first, Struct)
            else [each.name for each in dataclasses.fields(first)]
        )
        total = type(first)(**{n: _sum([getattr(value, n) for value in present]) for n in names})
    return total  # type: ignore[no-any-return]  # as its parts


def _merge_rates(rates: Sequence[Rates]) -> Rates:
    packets = sum(each.packets_per_second for each in rates)
    delay = sum(each.queue_delay_ms * each.packets_per_second for each in rates)
    # Workers that started later have shorter histories.
    length = max(len(each.history) for each in rates)
    padded = [(0.0,) * (length - len(each.history)) + each.history for each in rates]
    return Rates(
        packets_per_second=packets,
        bytes_per_second=sum(each.bytes_per_second for each in rates),
        drops_per_second=sum(each.drops_per_second for each in rates),
        queue_delay_ms=delay / packets if packets else 0.0,
        history=tuple(map(sum, zip(*padded, strict=True)))[-HISTORY_SAMPLES:],
    )


def _count_connections(pump: Pump, clients: Iterable[Connection]) -> Connections:
    switch = pump.switch
    current = home = not_ideal = waiting_packets = 0
    for client in clients:
        current += 1
        home += client.home
        not_ideal += client.not_ideal
        if client.backlog is not None:
            waiting_packets += client.backlog.packets
    return Connections(
        current=current,
        home=home,
        not_ideal=not_ideal,
        local_keys=switch.local_keys,
        remote_keys=switch.remote_keys,
        duplicate_keys=switch.duplicate_keys,
        duplicate_connections=switch.duplicate_connections,
        watchers=switch.watchers,
        waiting_packets=waiting_packets,
        waiting_bytes=switch.waiting_bytes,
    )


def _view_of(client: Connection, now: float) -> ClientView:
    key = NodePublic(client.key)
    return ClientView(
        key=str(key),
        short=key.short(),
        address=str(client.address or ""),
        port=client.port,
        connected_seconds=now - client.connected_at,
        is_home=client.home,
        is_mesh=client.is_mesh,
        is_prober=client.is_prober,
        is_duplicate=client.duplicate,
        packets_in=client.packets_in,
        bytes_in=client.bytes_in,
        packets_out=client.packets_out,
        bytes_out=client.bytes_out,
        packets_dropped=client.packets_dropped,
        waiting_packets=client.backlog.packets if client.backlog is not None else 0,
        waiting_bytes=client.backlog.size_bytes if client.backlog is not None else 0,
        rate_limit_bytes_per_second=client.bucket.rate if client.bucket is not None else None,
        is_held_back=client.paused,
    )
