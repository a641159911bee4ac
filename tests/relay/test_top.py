"""`underpass-relay top`: rates between snapshots, what is shown, what goes wrong."""

from __future__ import annotations

import io
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from click.testing import CliRunner
from rich.console import Console

from relay.admin import admin_responder
from relay.counters import Counters, DropReason, Histogram, Kind
from relay.http import serve_http
from relay.sampling import RTT_LABELS, Rates
from relay.snapshot import (
    ClientView,
    Connections,
    QueueDelay,
    Resources,
    Snapshot,
    Traffic,
)
from relay.top import Source, TopError, client_rates, delay_quantile, render, top_command
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import NodePublic

TOKEN = "a-token-of-some-length"


def queue_delay(*values: float) -> QueueDelay:
    histogram = Histogram((0.001, 0.01, 0.1))
    for value in values:
        histogram.observe(value)
    return QueueDelay(
        bounds_seconds=histogram.bounds,
        counts=tuple(histogram.counts),
        total_seconds=histogram.total,
    )


def snapshot(unix_time: float, *clients: ClientView, counters: Counters | None = None) -> Snapshot:
    return Snapshot(
        hostname="relay.example.com",
        version="1.2.3",
        server_key="nodekey:00",
        unix_time=unix_time,
        uptime_seconds=100.0,
        connections=Connections(current=len(clients)),
        traffic=Traffic.of(counters or Counters()),
        queue_delay=queue_delay(),
        rates=Rates(),
        tcp_rtt=dict.fromkeys(RTT_LABELS, 0),
        refusals={"tls": int(unix_time)},
        accepted_connections=0,
        rejected_connections=0,
        websocket_accepts=0,
        tls_handshakes={},
        tls_active={},
        resources=Resources(),
        clients=clients,
    )


def client(number: int, bytes_in: int, bytes_out: int = 0) -> ClientView:
    key = NodePublic(number.to_bytes(32, "big"))
    return ClientView(
        key=str(key),
        short=key.short(),
        address=f"192.0.2.{number}",
        port=1,
        connected_seconds=5.0,
        is_home=True,
        is_mesh=False,
        is_prober=False,
        is_duplicate=False,
        packets_in=bytes_in // 100,
        bytes_in=bytes_in,
        packets_out=bytes_out // 100,
        bytes_out=bytes_out,
        packets_dropped=0,
        waiting_packets=0,
        waiting_bytes=0,
        rate_limit_bytes_per_second=None,
        is_held_back=False,
    )


class TestFigures:
    def test_rates_are_differences(self) -> None:
        """The busiest of now first, not those who moved most ever; newcomers count from zero."""
        before = snapshot(10.0, client(1, 10**9), client(2, 1000, 500))
        after = snapshot(12.0, client(1, 10**9), client(2, 5000, 1500), client(3, 600))
        rates = client_rates(before, after)
        assert [each.client.address for each in rates] == ["192.0.2.2", "192.0.2.3", "192.0.2.1"]
        assert (rates[0].bytes_in, rates[0].bytes_out, rates[0].packets) == (2000, 500, 25)
        assert (rates[1].bytes_in, rates[2].bytes_in) == (300, 0)

    def test_a_client_that_has_connected_again(self) -> None:
        """Its counts began anew, and no rate is negative."""
        rates = client_rates(snapshot(10.0, client(1, 9000)), snapshot(11.0, client(1, 400)))
        assert rates[0].bytes_in == 400

    def test_equal_times(self) -> None:
        """Two looks at once divide by nothing."""
        assert client_rates(snapshot(1.0, client(1, 5)), snapshot(1.0, client(1, 5)))

    def test_delay_quantiles(self) -> None:
        """Of the packets between the two looks only."""
        before = queue_delay(5.0, 5.0, 5.0)
        after = queue_delay(5.0, 5.0, 5.0, 0.0005, 0.0005, 0.05)
        assert delay_quantile(before, after, 0.5) == 0.001
        assert delay_quantile(before, after, 0.99) == 0.1
        assert delay_quantile(before, before, 0.5) is None
        assert delay_quantile(queue_delay(), before, 0.5) == math.inf


class TestScreen:
    def test_shows_clients_and_losses(self) -> None:
        """Rates per second, by reason."""
        counters = Counters()
        counters.drop(DropReason.QUEUE_HEAD, Kind.OTHER, 100, packets=6)
        before = snapshot(10.0, client(1, 0))
        after = snapshot(12.0, client(1, 250_000), counters=counters)
        console = Console(width=140, file=io.StringIO(), record=True)
        console.print(render(before, after, rows=None, problem="it is gone"))
        text = console.export_text()
        for part in ("relay.example.com", "192.0.2.1", "1.00 Mbit/s", "queue_head 3/s", "tls 1/s"):
            assert part in text
        assert "it is gone" in text

    def test_shows_what_was_lost_before(self) -> None:
        """An operator who looks later sees what it was."""
        counters = Counters()
        counters.drop(DropReason.QUEUE_HEAD, Kind.OTHER, 100, packets=6)
        after = snapshot(12.0, counters=counters)
        console = Console(width=140, file=io.StringIO(), record=True)
        console.print(render(after, after, rows=None))
        assert "dropped: nothing; since the start queue_head 6" in console.export_text()

    def test_fits_the_terminal(self) -> None:
        """As many clients as there are rows."""
        after = snapshot(12.0, *(client(number, 0) for number in range(1, 40)))
        console = Console(width=140, file=io.StringIO(), record=True)
        console.print(render(after, after, rows=10))
        assert console.export_text().count("192.0.2.") == 10


@asynccontextmanager
async def admin(token: str = "") -> AsyncIterator[str]:
    """The URL of an admin listener on loopback."""

    async def collect(max_clients: int) -> Snapshot:
        return snapshot(1.0, *(client(number, number) for number in range(500)))

    async def revoke(key: NodePublic) -> int:
        return 0

    respond = admin_responder(collect=collect, revoke=revoke, token=lambda: token)

    async def handle(stream: trio.SocketStream) -> None:
        pipe = HandshakeStream(stream.socket)
        try:
            await serve_http(pipe, respond, source="127.0.0.1", over_tls=False)
        except StreamEndedError:
            pass
        finally:
            pipe.close()

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, handle, 0, host="127.0.0.1")
        listeners = await nursery.start(serve)
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


class TestSource:
    async def test_fetches_a_large_snapshot(self) -> None:
        """Much longer than what other HTTP clients of the relay accept."""
        async with admin() as url:
            fetched = await Source(url, "").fetch()
            assert len(fetched.clients) == 500
            assert len(msgspec.json.encode(fetched)) > 100_000

    async def test_token(self) -> None:
        """Its absence is explained."""
        async with admin(TOKEN) as url:
            assert (await Source(url, TOKEN).fetch()).hostname == "relay.example.com"
            with pytest.raises(TopError, match="--token-file"):
                await Source(url, "").fetch()

    async def test_nobody_there(self) -> None:
        """The error says what to check."""
        with trio.socket.socket() as sock:
            await sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
            with pytest.raises(TopError, match=r"is the relay running.*--url"):
                await Source(f"http://127.0.0.1:{port}", "").fetch()

    async def test_another_program(self) -> None:
        """Whatever it answers."""
        async with admin() as url:
            with pytest.raises(TopError, match="status 404"):
                await Source(f"{url}/elsewhere", "").fetch()


class TestCommand:
    @pytest.mark.parametrize(
        "url", ["relay", "ftp://relay", "http://", "http://a:99999", "http://["]
    )
    def test_wrong_urls(self, url: str) -> None:
        """They are usage errors."""
        result = CliRunner().invoke(top_command, ["--url", url, "--once"])
        assert result.exit_code == 2
        assert "is no http(s) URL" in result.output

    def test_wrong_token_file(self, tmp_path: Path) -> None:
        """Said before anything is asked."""
        missing = tmp_path / "token"
        result = CliRunner().invoke(top_command, ["--token-file", str(missing)])
        assert result.exit_code == 1
        assert "admin token" in result.output
