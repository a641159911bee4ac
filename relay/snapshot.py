"""A frozen picture of a relay, for metrics, the status page, `top` and whoever asks by HTTP.

Everything here encodes to JSON and back with msgspec, so that worker processes can send their
snapshots to the one that answers; `merge` makes one of several.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

import msgspec
from msgspec import Struct, field

from relay.admission import AdmissionStatistics
from relay.bootstrap_dns import BootstrapDnsCounters
from relay.certificates import CertificateStatus
from relay.counters import Counters, DropReason, Kind
from relay.edge.view import EdgeView
from relay.limits import AcceptStatistics
from relay.mesh import LinkState
from relay.pump import Connection, Pump
from relay.refusals import Refusals, Stage
from relay.sampling import HISTORY_SAMPLES, Rates, Sampler
from relay.stun import StunStatistics
from relay.upgrade import RateLimit
from traversal.keys import NodePublic

MAX_CLIENTS: Final = 1000
"""Listed in a snapshot, those who moved most bytes first: about 400 bytes of JSON each."""
TLS_VERSIONS: Final = ("1.2", "1.3")

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


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
    """A link to another relay of the region that should be up."""

    name: str
    is_up: bool
    problem: str
    """Why it is not up."""


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
    tls_handshakes: dict[str, int]
    """By TLS version."""
    tls_active: dict[str, int]
    """Clients by TLS version."""
    resources: Resources
    pump_problem: str = ""
    """Why the pump does not serve, if it does not."""
    rate_limit: RateLimit | None = None
    stun: StunStatistics | None = None
    bootstrap_dns: BootstrapDnsCounters | None = None
    admission: AdmissionStatistics | None = None
    certificate: CertificateStatus | None = None
    clients: tuple[ClientView, ...] = ()
    clients_left_out: int = 0
    """Connected, but not listed."""
    mesh_links: tuple[MeshLink, ...] = ()
    edge: EdgeView | None = None
    """Of the process that the operator started: workers have none."""

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
        refusals: Refusals[Stage],
        accepts: AcceptStatistics,
        websocket_accepts: int,
        tls_handshakes: Mapping[str, int],
        is_draining: bool = False,
        rate_limit: RateLimit | None = None,
        stun: StunStatistics | None = None,
        bootstrap_dns: BootstrapDnsCounters | None = None,
        admission: AdmissionStatistics | None = None,
        certificate: CertificateStatus | None = None,
        mesh_links: Sequence[LinkState] = (),
        max_clients: int = MAX_CLIENTS,
    ) -> Self:
        """Of this process.

        Args:
            now, started_at: monotonic seconds.
            tls_handshakes: by what `TlsEngine.version` calls the version.
            max_clients: listed at most.
        """
        delay = pump.switch.counters.queue_delay
        clients = [
            each
            for each in pump.connections.values()
            if not each.is_outgoing and not each.is_sibling
        ]
        listed = heapq.nlargest(max_clients, clients, key=lambda c: c.bytes_in + c.bytes_out)
        tls_active = Counter(client.tls.version() or "" for client in clients if client.tls)
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
            accepted_connections=accepts.accepted,
            rejected_connections=accepts.rejected,
            websocket_accepts=websocket_accepts,
            tls_handshakes=_by_tls_version(tls_handshakes),
            tls_active=_by_tls_version(tls_active),
            resources=Resources.read(),
            pump_problem=sampler.pump_problem,
            rate_limit=rate_limit,
            stun=stun,
            bootstrap_dns=None if bootstrap_dns is None else dataclasses.replace(bootstrap_dns),
            admission=admission,
            certificate=certificate,
            clients=tuple(_view_of(client, now) for client in listed),
            clients_left_out=len(clients) - len(listed),
            mesh_links=tuple(
                MeshLink(name=link.name, is_up=link.is_up, problem=link.problem)
                for link in mesh_links
            ),
        )


def without_gauges(snapshot: Snapshot) -> Snapshot:
    """Only what was counted: of a worker that is gone, so that no sum ever goes down."""
    return msgspec.structs.replace(
        snapshot,
        workers=0,
        is_draining=False,
        connections=Connections(),
        rates=Rates(),
        tls_active=dict.fromkeys(snapshot.tls_active, 0),
        resources=Resources(),
        clients=(),
        clients_left_out=0,
        mesh_links=(),
        pump_problem="",
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
        certificate=min(certificates, key=lambda status: status.not_after_unix, default=None),
        clients=tuple(clients[:MAX_CLIENTS]),
        clients_left_out=sum(each.clients_left_out for each in snapshots)
        + len(clients[MAX_CLIENTS:]),
        pump_problem=next(filter(None, (each.pump_problem for each in snapshots)), ""),
        mesh_links=_merge_links([link for each in snapshots for link in each.mesh_links]),
        **{name: _sum([getattr(each, name) for each in snapshots]) for name in _SUMMED},
    )


_SUMMED: Final = (
    "traffic",
    "tcp_rtt",
    "refusals",
    "accepted_connections",
    "rejected_connections",
    "websocket_accepts",
    "tls_handshakes",
    "tls_active",
    "resources",
    "stun",
    "bootstrap_dns",
    "admission",
)

_T = TypeVar("_T")


def _sum(values: Sequence[_T]) -> _T:
    """Numbers added up, also inside dictionaries and classes; None counts as nothing.

    What is true for one is true for all.
    """
    present: list[Any] = [value for value in values if value is not None]
    if not present:
        return values[0]
    first = present[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in present for key in value)
        total: Any = {key: _sum([value[key] for value in present if key in value]) for key in keys}
    elif isinstance(first, bool):
        total = any(present)
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


def _merge_links(links: Sequence[MeshLink]) -> tuple[MeshLink, ...]:
    """Each worker has its own link to each relay: up is what is up for all of them."""
    merged: dict[str, MeshLink] = {}
    for link in links:
        if link.name not in merged or not link.is_up:
            merged[link.name] = link
    return tuple(merged.values())


def _by_tls_version(counts: Mapping[str, int]) -> dict[str, int]:
    """`TLSv1.3` as `1.3`, with those that did not occur."""
    zeros = dict.fromkeys(TLS_VERSIONS, 0)
    return zeros | {version.removeprefix("TLSv"): count for version, count in counts.items()}


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
        local_keys=switch.presence.local_keys,
        remote_keys=switch.presence.remote_keys,
        duplicate_keys=switch.presence.duplicate_keys,
        duplicate_connections=switch.presence.duplicate_connections,
        watchers=switch.presence.watchers,
        waiting_packets=waiting_packets,
        waiting_bytes=switch.outbox.waiting_bytes,
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
