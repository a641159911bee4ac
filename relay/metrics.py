"""A snapshot as Prometheus text, under derper's names where the meaning is equal.

derper's counters have no `_total` at their end, which prometheus_client would add: so its families
serve as data here, and the text is written below. Left out of derper's names, because nothing here
means the same: `derp_buffered_write_frames` and `derp_mesh_update_*`. Ours begin with
`underpass_`; those every program has, with `process_`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import Metric

from relay.admission import AdmissionStatistics
from relay.bootstrap_dns import BootstrapDnsCounters
from relay.counters import Kind
from relay.edge.metrics import edge_families
from relay.snapshot import Snapshot
from relay.stun import StunStatistics

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[str, ...]

_NO_ADMISSION: Final = AdmissionStatistics(
    allowed=0,
    denied=0,
    cut=0,
    reloads=0,
    reload_failures=0,
    hook_requests=0,
    hook_failures=0,
    hook_cached_answers=0,
    hook_failed_open=0,
    hook_is_failing=False,
)


def encode_metrics(snapshot: Snapshot) -> bytes:
    """The text of all metrics. Every label combination is there from the start."""
    return "".join(map(_encode_family, families(snapshot))).encode()


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """All metrics of a relay; every sample's name is exactly what is to be written."""
    yield from _connection_families(snapshot)
    yield from _traffic_families(snapshot)
    yield from _front_families(snapshot)
    yield from _stun_families(snapshot.stun or StunStatistics())
    yield from _bootstrap_dns_families(snapshot.bootstrap_dns or BootstrapDnsCounters())
    yield from _admission_families(snapshot.admission or _NO_ADMISSION)
    if snapshot.edge is not None:
        yield from edge_families(snapshot.edge)
    yield from _process_families(snapshot)


def _connection_families(snapshot: Snapshot) -> Iterator[Metric]:
    connections = snapshot.connections
    keys = connections.local_keys + connections.remote_keys
    yield _gauge("derp_current_connections", "Registered connections.", connections.current)
    yield _gauge("derp_current_home_connections", "Of clients at home here.", connections.home)
    yield _gauge(
        "derp_current_notideal_connections",
        "Of clients that would rather use another node of the region.",
        connections.not_ideal,
    )
    yield _gauge("derp_clients_total", "Distinct keys in the region.", keys)
    yield _gauge("derp_clients_local", "Distinct keys connected here.", connections.local_keys)
    yield _gauge("derp_clients_remote", "Distinct keys only elsewhere.", connections.remote_keys)
    yield _gauge(
        "derp_current_dup_client_keys",
        "Keys with several connections.",
        connections.duplicate_keys,
    )
    yield _gauge(
        "derp_current_dup_client_conns",
        "Connections of keys with several.",
        connections.duplicate_connections,
    )
    yield _gauge("derp_watchers", "Connections told who comes and goes.", connections.watchers)
    yield _gauge(
        "underpass_waiting_packets",
        "Packets that wait for slow readers.",
        connections.waiting_packets,
    )
    yield _gauge(
        "underpass_waiting_bytes", "Bytes of packets that wait.", connections.waiting_bytes
    )
    yield _labeled(
        "gauge",
        "underpass_mesh_links",
        "Connections to the region's other servers: those there should be, those there are.",
        ("state",),
        {
            ("configured",): len(snapshot.mesh_links),
            ("connected",): sum(link.is_up for link in snapshot.mesh_links),
        },
    )


def _traffic_families(snapshot: Snapshot) -> Iterator[Metric]:
    traffic = snapshot.traffic
    for name, text, value in (
        ("derp_accepts", "Accepted DERP connections.", traffic.accepts),
        (
            "derp_total_dup_client_conns",
            "Connections of keys that had one already.",
            traffic.duplicate_connections,
        ),
        ("derp_bytes_received", "Payload bytes from clients.", traffic.bytes_received),
        ("derp_bytes_sent", "Payload bytes to clients.", traffic.bytes_sent),
        (
            "derp_packets_received",
            "Packets from clients.",
            sum(traffic.packets_received.values()),
        ),
        ("derp_packets_sent", "Packets to clients.", traffic.packets_sent),
        ("derp_packets_forwarded_out", "To the mesh.", traffic.packets_forwarded_out),
        ("derp_packets_forwarded_in", "From the mesh.", traffic.packets_forwarded_in),
        (
            "derp_multiforwarder_created",
            "Keys that became reachable over a second link.",
            traffic.multiforwarder_created,
        ),
        (
            "derp_multiforwarder_deleted",
            "Keys that are reachable over one link again.",
            traffic.multiforwarder_deleted,
        ),
        (
            "derp_packet_forwarder_delete_other_value",
            "Departures told by a link that did not lead there.",
            traffic.forwarder_delete_other_value,
        ),
        (
            "derp_peer_gone_disconnected_frames",
            "Clients told that a peer has left.",
            traffic.peer_gone_disconnected_frames,
        ),
        (
            "derp_peer_gone_not_here_frames",
            "Clients told that a peer is not here.",
            traffic.peer_gone_not_here_frames,
        ),
        ("derp_home_moves_in", "Clients that made this their home.", traffic.home_moves_in),
        ("derp_home_moves_out", "Clients that moved away.", traffic.home_moves_out),
        ("derp_got_ping", "Pings.", traffic.got_ping),
        ("derp_sent_pong", "Answers to pings.", traffic.sent_pong),
        ("derp_unknown_frames", "Frames of unknown type.", traffic.unknown_frames),
        (
            "derp_sclient_write_timeouts",
            "Clients closed because they took nothing.",
            traffic.write_timeouts,
        ),
        (
            "underpass_protocol_violations_total",
            "Clients closed because they broke the protocol.",
            traffic.protocol_violations,
        ),
        (
            "underpass_packets_waited_total",
            "Packets that were sent after waiting for a slow reader.",
            traffic.packets_waited,
        ),
    ):
        yield _counter(name, text, value)
    yield _labeled(
        "counter",
        "derp_packets_received_kind",
        "Packets from clients by what they look like.",
        ("kind",),
        {(kind,): traffic.packets_received.get(kind, 0) for kind in Kind},
    )
    for name, drops in (
        ("derp_packets_dropped", traffic.packets_dropped),
        ("derp_bytes_dropped", traffic.bytes_dropped),
    ):
        yield _labeled(
            "counter",
            name,
            "Not delivered, by reason and kind.",
            ("reason", "kind"),
            {(reason, kind): drops[reason][kind] for reason in drops for kind in drops[reason]},
        )
    yield _gauge(
        "derp_average_queue_duration_ms",
        "Mean time between reading and writing a packet, over the last 10 s.",
        snapshot.rates.queue_delay_ms,
    )
    yield _queue_delay_family(snapshot)
    yield _labeled(
        "counter",
        "derp_tcp_rtt",
        "The kernel's RTT of each client, sampled every 10 s; not cumulative.",
        ("le",),
        {(label,): count for label, count in snapshot.tcp_rtt.items()},
    )
    limit = snapshot.rate_limit
    if limit is not None:
        yield _gauge(
            "derp_rate_limit_per_client_bytes_per_second",
            "What is read of a client per second at most.",
            limit.bytes_per_second,
        )
        yield _gauge(
            "derp_rate_limit_per_client_burst_bytes",
            "What may be read of a client at once.",
            limit.burst_bytes,
        )
    # There without a common limit too: tokens may carry limits.
    yield _counter(
        "derp_rate_limit_per_client_waited",
        "Times that a client was not read from because of its limit.",
        traffic.rate_limit_waits,
    )


def _queue_delay_family(snapshot: Snapshot) -> Metric:
    name = "underpass_queue_delay_seconds"
    family = Metric(name, "From reading a packet to writing it.", "histogram")
    delay = snapshot.queue_delay
    cumulative = 0
    for bound, count in zip((*delay.bounds_seconds, float("inf")), delay.counts, strict=True):
        cumulative += count
        family.add_sample(f"{name}_bucket", {"le": _number(bound)}, cumulative)
    family.add_sample(f"{name}_sum", {}, delay.total_seconds)
    family.add_sample(f"{name}_count", {}, cumulative)
    return family


def _front_families(snapshot: Snapshot) -> Iterator[Metric]:
    yield _counter(
        "derp_websocket_accepts", "Accepted WebSocket clients.", snapshot.websocket_accepts
    )
    yield _counter(
        "tls_listener_accepted_connections",
        "Connections that the accept rate limit let in.",
        snapshot.accepted_connections,
    )
    yield _counter(
        "tls_listener_rejected_connections",
        "Connections that the accept rate limit closed at once.",
        snapshot.rejected_connections,
    )
    for kind, name, text, counts in (
        ("counter", "derper_tls_request_version", "Connections.", snapshot.tls_handshakes),
        ("gauge", "derper_tls_active_version", "Connected clients.", snapshot.tls_active),
    ):
        by_version: dict[Labels, int] = {(version,): count for version, count in counts.items()}
        yield _labeled(kind, name, f"{text[:-1]} by TLS version.", ("version",), by_version)
    yield _labeled(
        "counter",
        "underpass_refusals_total",
        "Connections turned away, by stage.",
        ("stage",),
        {(stage,): count for stage, count in snapshot.refusals.items()},
    )
    if snapshot.certificate is not None:
        yield _gauge(
            "underpass_certificate_not_after_timestamp_seconds",
            "When the certificate expires, in Unix time.",
            snapshot.certificate.not_after_unix,
        )


def _stun_families(stun: StunStatistics) -> Iterator[Metric]:
    dispositions = ("success", "not_stun", "read_error", "write_error", "over_budget")
    yield _labeled(
        "counter",
        "stun_requests",
        "STUN datagrams by what became of them.",
        ("disposition",),
        {(name,): getattr(stun, name) for name in dispositions},
    )
    yield _labeled(
        "counter",
        "stun_addrfamily",
        "STUN requests by address family.",
        ("family",),
        {("ipv4",): stun.ipv4, ("ipv6",): stun.ipv6},
    )


def _bootstrap_dns_families(counters: BootstrapDnsCounters) -> Iterator[Metric]:
    for name, text in (
        ("requests", "Requests for /bootstrap-dns."),
        ("published_hits", "For a published name."),
        ("published_misses", "For a published name without addresses."),
        ("unpublished_hits", "For an unpublished name."),
        ("unpublished_misses", "For a name that is on no list."),
        ("unpublished_percent_misses", "For an unpublished name, by clients not yet selected."),
        ("queried_domains", "Distinct names that were asked for, up to 1000."),
    ):
        yield _counter(f"bootstrap_dns_{name}", text, getattr(counters, name))


def _admission_families(admission: AdmissionStatistics) -> Iterator[Metric]:
    yield _labeled(
        "counter",
        "underpass_admission_decisions_total",
        "Clients that asked to be let in.",
        ("verdict",),
        {("allowed",): admission.allowed, ("denied",): admission.denied},
    )
    for name, text in (
        ("cut", "Sessions ended because they are no longer admitted."),
        ("reloads", "Times that the rules were read again."),
        ("reload_failures", "Times that changed rules could not be read."),
        ("hook_requests", "Questions to the admission hook."),
        ("hook_failures", "Questions that it did not answer."),
        ("hook_cached_answers", "Decided by its last known answer instead."),
        ("hook_failed_open", "Admitted although it did not answer."),
    ):
        yield _counter(f"underpass_admission_{name}_total", text, getattr(admission, name))


def _process_families(snapshot: Snapshot) -> Iterator[Metric]:
    resources = snapshot.resources
    yield _labeled(
        "gauge",
        "underpass_build_info",
        "Always 1; the version is in the label.",
        ("version",),
        {(snapshot.version,): 1},
    )
    yield _gauge("underpass_workers", "Processes that serve.", snapshot.workers)
    yield _gauge(
        "underpass_draining", "1 while the relay is stopping, else 0.", int(snapshot.is_draining)
    )
    yield _gauge("derp_memstats_sys0", "Resident memory.", resources.memory_bytes)
    yield _gauge("derp_current_file_descriptors", "Open descriptors.", resources.open_descriptors)
    yield _gauge("process_resident_memory_bytes", "Resident memory.", resources.memory_bytes)
    yield _gauge("process_open_fds", "Open descriptors.", resources.open_descriptors)
    yield _counter("process_cpu_seconds_total", "CPU time.", resources.cpu_seconds)
    yield _gauge(
        "process_start_time_seconds",
        "When the relay started, in Unix time.",
        snapshot.unix_time - snapshot.uptime_seconds,
    )


def _counter(name: str, text: str, value: float) -> Metric:
    return _labeled("counter", name, text, (), {(): value})


def _gauge(name: str, text: str, value: float) -> Metric:
    return _labeled("gauge", name, text, (), {(): value})


def _labeled(
    kind: str, name: str, text: str, labels: Labels, values: Mapping[Labels, float]
) -> Metric:
    family = Metric(name, text, kind)
    for label_values, value in values.items():
        family.add_sample(name, dict(zip(labels, label_values, strict=True)), value)
    return family


def _encode_family(family: Metric) -> str:
    """In the Prometheus text format, version 0.0.4."""
    lines = [
        f"# HELP {family.name} {family.documentation}\n",
        f"# TYPE {family.name} {family.type}\n",
    ]
    for sample in family.samples:
        labels = ",".join(f'{name}="{_escape(value)}"' for name, value in sample.labels.items())
        braces = f"{{{labels}}}" if labels else ""
        lines.append(f"{sample.name}{braces} {_number(sample.value)}\n")
    return "".join(lines)


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    return "+Inf" if value == float("inf") else repr(value)
