"""`underpass-relay demo`: a relay and two clients on loopback, with something to look at."""

from __future__ import annotations

import json
import os
import signal
import statistics
import struct
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import click
import trio

from traversal.io.dial import Dialed, Target, dial
from traversal.keys import NodePrivate, NodePublic
from traversal.wire.derp import FrameType, encode_send_packet

PACKET_BYTES: Final = 1300
WINDOW: Final = 8
"""Packets on their way at one time."""

_STAMP: Final = struct.Struct(">Qd")


@dataclass(slots=True)
class _Tally:
    """What happened so far. Times in seconds."""

    sent: int = 0
    returned: int = 0
    damaged: int = 0
    round_trips: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Summary:
    """The demo's result."""

    seconds: float
    packets_relayed: int
    packets_per_second: float
    damaged: int
    round_trip_p50_us: float
    round_trip_p99_us: float
    tls_version: str
    fast_start: bool
    status_page: str


@click.command("demo")
@click.option("--seconds", type=click.FloatRange(1, 600), default=6, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Only the summary, as JSON.")
def demo_command(seconds: float, as_json: bool) -> None:
    """Run a relay and two clients that send packets to each other through it.

    Everything happens on loopback, with TLS 1.3 and a self-signed certificate that the clients know
    by its pin. Each packet goes to the relay, to the other client, back to the relay, and home.
    """
    summary = trio.run(_run, seconds, not as_json)
    if summary is None:
        raise click.Abort
    if as_json:
        click.echo(json.dumps(asdict(summary), indent=2))
        return
    click.echo(
        f"\nIn {summary.seconds:.1f} s the relay passed on {summary.packets_relayed} packets of "
        f"{PACKET_BYTES} bytes ({summary.packets_per_second:.0f} a second), "
        f"{summary.damaged} of them damaged. A packet and its echo took "
        f"{summary.round_trip_p50_us:.0f} us (median) and {summary.round_trip_p99_us:.0f} us "
        f"(99th percentile) over {summary.tls_version}, with {WINDOW} packets on their way. "
        'To keep a relay running, type "underpass-relay serve --dev".'
    )


async def _run(seconds: float, show: bool) -> Summary | None:
    """Run the demo; None if a signal ended it."""
    from relay.config import Config
    from relay.map_entry import build_map
    from relay.server import Bound, serve

    config = Config.dev()
    is_complete = False
    async with trio.open_nursery() as nursery:
        bound: Bound = await nursery.start(serve, config, lambda: config)
        # The relay itself would take a signal as one to drain, with the clients still at work.
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            nursery.start_soon(_cancel_when_told, signals, nursery.cancel_scope)
            relay_map = build_map(
                config,
                derp_port=bound.derp[0][1],
                stun_port=bound.stun[0][1],
                can_port_80=False,
                pin=bound.pin,
            )
            target = Target.of_node(next(iter(relay_map.nodes())))
            status_page = f"http://{bound.admin[0][0]}:{bound.admin[0][1]}/"
            keys = [NodePrivate.generate(os.urandom) for _ in range(2)]
            caller, answerer = [await dial(target, key) for key in keys]
            tally = _Tally()
            started = trio.current_time()
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as clients:
                    clients.start_soon(_echo, answerer)
                    clients.start_soon(_call, caller, keys[1].public(), tally)
                    if show:
                        await _show(tally, status_page, bound.pin, seconds, started)
            elapsed = trio.current_time() - started
            is_complete = True
            nursery.cancel_scope.cancel()
    if not is_complete:
        return None
    times = sorted(tally.round_trips) or [0.0]
    return Summary(
        seconds=elapsed,
        packets_relayed=2 * tally.returned,
        packets_per_second=2 * tally.returned / elapsed,
        damaged=tally.damaged,
        round_trip_p50_us=1e6 * statistics.median(times),
        round_trip_p99_us=1e6 * times[int(0.99 * (len(times) - 1))],
        tls_version=caller.tls_version or "plain TCP",
        fast_start=caller.fast_start,
        status_page=status_page,
    )


async def _cancel_when_told(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


async def _call(client: Dialed, peer: NodePublic, tally: _Tally) -> None:
    """Send numbered packets and check what comes back."""

    def packet(number: int) -> bytes:
        stamp = _STAMP.pack(number, trio.current_time())
        return stamp + bytes([number % 256]) * (PACKET_BYTES - len(stamp))

    for number in range(WINDOW):
        await client.stream.send_all(encode_send_packet(peer, packet(number)))
    tally.sent = WINDOW
    while True:
        for frame_type, body in await client.receive_frames():
            if frame_type != FrameType.RECV_PACKET:
                continue
            number, sent_at = _STAMP.unpack_from(body, 32)
            filler = body[32 + _STAMP.size :]
            if filler != bytes([number % 256]) * len(filler):
                tally.damaged += 1
            tally.returned += 1
            tally.round_trips.append(trio.current_time() - sent_at)
            await client.stream.send_all(encode_send_packet(peer, packet(tally.sent)))
            tally.sent += 1


async def _echo(client: Dialed) -> None:
    """Send every packet back to where it came from."""
    while True:
        for frame_type, body in await client.receive_frames():
            if frame_type == FrameType.RECV_PACKET:
                source = NodePublic(body[:32])
                await client.stream.send_all(encode_send_packet(source, body[32:]))


async def _show(tally: _Tally, status_page: str, pin: str, seconds: float, started: float) -> None:
    from rich.live import Live
    from rich.table import Table

    history: list[int] = []

    def table(rate: float) -> Any:
        grid = Table(title="Underpass relay demo", show_header=False, min_width=64)
        grid.add_row("topology", "client A  ==TLS==>  relay  ==TLS==>  client B  (and back)")
        grid.add_row("packets relayed", f"{2 * tally.returned}  ({tally.damaged} damaged)")
        grid.add_row("packets a second", f"{rate:8.0f}  {_bars(history)}")
        recent = sorted(tally.round_trips[-2000:]) or [0.0]
        grid.add_row(
            "round trip",
            f"{1e6 * statistics.median(recent):.0f} us median, "
            f"{1e6 * recent[int(0.99 * (len(recent) - 1))]:.0f} us 99th percentile",
        )
        grid.add_row("status page", status_page)
        grid.add_row("pin", pin.removeprefix("sha256-raw:")[:32] + "…")
        grid.add_row("time left", f"{max(0.0, seconds - (trio.current_time() - started)):.0f} s")
        return grid

    with Live(table(0), refresh_per_second=5) as live:
        while True:
            before = tally.returned
            began = trio.current_time()
            await trio.sleep(0.2)
            rate = 2 * (tally.returned - before) / (trio.current_time() - began)
            history.append(int(rate))
            live.update(table(rate))


def _bars(history: list[int]) -> str:
    """The last rates as a line of blocks."""
    recent = history[-24:]
    top = max(recent, default=0) or 1
    return "".join("▁▂▃▄▅▆▇█"[min(7, 8 * value // (top + 1))] for value in recent)
