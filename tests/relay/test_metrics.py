"""Prometheus text: read back with prometheus_client's own parser."""

from __future__ import annotations

import random
import re

import msgspec
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from relay.certificates import CertificateStatus
from relay.counters import Counters, DropReason, Histogram, Kind
from relay.metrics import encode_metrics
from relay.refusals import Stage
from relay.sampling import RTT_LABELS, Rates
from relay.snapshot import Connections, QueueDelay, Resources, Snapshot, Traffic
from relay.stun import StunStatistics
from relay.upgrade import RateLimit

# DERP specification 16: c counter, g gauge.
DERPER_NAMES = """
c derp_accepts
g derp_current_connections
g derp_current_home_connections
g derp_current_notideal_connections
g derp_clients_total
g derp_clients_local
g derp_clients_remote
g derp_current_dup_client_keys
g derp_current_dup_client_conns
c derp_total_dup_client_conns
g derp_watchers
c derp_bytes_received
c derp_bytes_sent
c derp_packets_received
c derp_packets_sent
c derp_packets_received_kind
c derp_packets_dropped
c derp_bytes_dropped
c derp_packets_forwarded_out
c derp_packets_forwarded_in
c derp_multiforwarder_created
c derp_multiforwarder_deleted
c derp_packet_forwarder_delete_other_value
c derp_peer_gone_disconnected_frames
c derp_peer_gone_not_here_frames
c derp_home_moves_in
c derp_home_moves_out
c derp_got_ping
c derp_sent_pong
c derp_unknown_frames
c derp_sclient_write_timeouts
g derp_average_queue_duration_ms
c derp_tcp_rtt
g derp_memstats_sys0
g derp_current_file_descriptors
g derp_rate_limit_per_client_bytes_per_second
g derp_rate_limit_per_client_burst_bytes
c derp_rate_limit_per_client_waited
c derp_websocket_accepts
c derper_tls_request_version
g derper_tls_active_version
c tls_listener_accepted_connections
c tls_listener_rejected_connections
c stun_requests
c stun_addrfamily
c bootstrap_dns_requests
c bootstrap_dns_published_hits
c bootstrap_dns_published_misses
c bootstrap_dns_unpublished_hits
c bootstrap_dns_unpublished_misses
c bootstrap_dns_unpublished_percent_misses
c bootstrap_dns_queried_domains
"""


def snapshot() -> Snapshot:
    """Of a relay to which nothing has happened."""
    delay = Counters().queue_delay
    return Snapshot(
        hostname="relay.example.com",
        version="1.2.3",
        server_key="nodekey:00",
        unix_time=1_800_000_000.0,
        uptime_seconds=100.0,
        connections=Connections(),
        traffic=Traffic.of(Counters()),
        queue_delay=QueueDelay(
            bounds_seconds=delay.bounds, counts=tuple(delay.counts), total_seconds=0.0
        ),
        rates=Rates(),
        tcp_rtt=dict.fromkeys(RTT_LABELS, 0),
        refusals={str(stage): 0 for stage in Stage},
        accepted_connections=0,
        rejected_connections=0,
        websocket_accepts=0,
        tls_handshakes={"1.2": 0, "1.3": 0},
        tls_active={"1.2": 0, "1.3": 0},
        resources=Resources(),
        rate_limit=RateLimit(1000, 70000),
        certificate=CertificateStatus("files", "a", True, 2_000_000_000, None, 1, 0),
    )


def parse(subject: Snapshot) -> dict[str, Metric]:
    text = encode_metrics(subject).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(subject: Snapshot, name: str, **labels: str) -> float:
    """One sample, by the name that stands in the text."""
    text = encode_metrics(subject).decode()
    inner = ",".join(f'{label}="{wanted}"' for label, wanted in labels.items())
    pattern = "^" + re.escape(name + (f"{{{inner}}}" if labels else "")) + r" (\S+)$"
    found = re.findall(pattern, text, re.MULTILINE)
    assert len(found) == 1, f"{pattern}: {found}"
    return float(found[0])


class TestNames:
    @pytest.mark.parametrize("line", DERPER_NAMES.strip().splitlines())
    def test_derpers_metrics_have_name_and_type(self, line: str) -> None:
        """So that dashboards made for derper work."""
        letter, name = line.split()
        kind = "counter" if letter == "c" else "gauge"
        text = encode_metrics(snapshot()).decode()
        assert f"# TYPE {name} {kind}\n" in text
        assert re.search(rf"^{name}[ {{]", text, re.MULTILINE)

    def test_text_is_valid_and_names_are_unique(self) -> None:
        """Each family once, with help, and samples of its own name only."""
        text = encode_metrics(snapshot()).decode()
        families = list(text_string_to_metric_families(text))
        assert all(family.type != "unknown" for family in families)
        assert all(family.documentation for family in families)
        names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
        assert len(names) == len(set(names)) == len(families)
        series = [line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"]
        assert len(series) == len(set(series))

    def test_every_combination_is_there_from_the_start(self) -> None:
        """A rate over a series that appears late misses its first event."""
        families = parse(snapshot())
        for name in ("derp_packets_dropped", "derp_bytes_dropped"):
            labels = {(s.labels["reason"], s.labels["kind"]) for s in families[name].samples}
            assert labels == {(str(r), str(k)) for r in DropReason for k in Kind}
        stages = {s.labels["stage"] for s in families["underpass_refusals"].samples}
        assert stages == set(Stage)
        assert {s.labels["le"] for s in families["derp_tcp_rtt"].samples} == set(RTT_LABELS)
        dispositions = {s.labels["disposition"] for s in families["stun_requests"].samples}
        assert dispositions >= {"success", "not_stun", "read_error", "write_error"}

    def test_optional_parts_may_be_missing(self) -> None:
        """Without a limit and a certificate there is nothing to say of them."""
        bare = msgspec.structs.replace(snapshot(), rate_limit=None, certificate=None)
        text = encode_metrics(bare).decode()
        assert "derp_rate_limit_per_client_bytes_per_second" not in text
        assert "underpass_certificate" not in text


class TestValues:
    def test_counts_arrive(self) -> None:
        """Under the labels where they belong."""
        counters = Counters()
        counters.accepts = 3
        counters.disco_received = 4
        counters.other_received = 5
        counters.drop(DropReason.DUP_CLIENT, Kind.DISCO, 100, packets=2)
        subject = msgspec.structs.replace(
            snapshot(), traffic=Traffic.of(counters), stun=StunStatistics(success=6, ipv6=2)
        )
        assert value(subject, "derp_accepts") == 3
        assert value(subject, "derp_packets_received") == 9
        assert value(subject, "derp_packets_received_kind", kind="disco") == 4
        assert value(subject, "derp_packets_dropped", reason="dup_client", kind="disco") == 2
        assert value(subject, "derp_bytes_dropped", reason="dup_client", kind="disco") == 100
        assert value(subject, "stun_requests", disposition="success") == 6
        assert value(subject, "stun_addrfamily", family="ipv6") == 2
        assert value(subject, "process_start_time_seconds") == 1_800_000_000 - 100

    def test_queue_delay_is_cumulative(self) -> None:
        """Each bucket counts all that was at most so long; the last one everything."""
        delay = Histogram((0.001, 0.01))
        random_values = [random.Random(1).expovariate(200) for _ in range(100)]
        for each in random_values:
            delay.observe(each)
        view = QueueDelay(
            bounds_seconds=delay.bounds, counts=tuple(delay.counts), total_seconds=delay.total
        )
        subject = msgspec.structs.replace(snapshot(), queue_delay=view)
        name = "underpass_queue_delay_seconds"
        for bound in (0.001, 0.01):
            expected = sum(each <= bound for each in random_values)
            assert value(subject, f"{name}_bucket", le=str(bound)) == expected
        assert value(subject, f"{name}_bucket", le="+Inf") == 100
        assert value(subject, f"{name}_count") == 100
        assert value(subject, f"{name}_sum") == pytest.approx(sum(random_values))

    def test_labels_are_escaped(self) -> None:
        """A version can't break the text."""
        subject = msgspec.structs.replace(snapshot(), version='1"\\\n')
        family = parse(subject)["underpass_build_info"]
        assert family.samples[0].labels == {"version": '1"\\\n'}
