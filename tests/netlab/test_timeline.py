"""The timeline: bounded, written and read as JSON lines, and joined into explanations."""

from __future__ import annotations

import io
import random

import pytest
import trio
from trio.testing import MockClock

from netlab.drops import DropReason
from netlab.explain import explain
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.presets import class_behavior
from netlab.probe import ProbeServers, serve_probe
from netlab.punch import punch
from netlab.simulated import SimulatedInternet
from netlab.timeline import (
    Event,
    MappingBorn,
    NetworkChanged,
    Note,
    PacketDropped,
    Timeline,
    TimelineError,
    encode_event,
    read_jsonl,
    write_jsonl,
)

EVENTS: list[Event] = [
    MappingBorn(at=0.5, nat="n", protocol="udp", inside="a:1", external="b:2", remote="c:3"),
    PacketDropped(
        at=1.0,
        packet=3,
        where="n",
        reason=DropReason.FILTERED,
        text="filtered",
        protocol="udp",
        source="a:1",
        destination="b:1",
    ),
    NetworkChanged(at=2.0, what="reboot", target="n"),
    Note(at=3.0, text="done"),
]


def test_json_lines_round_trip() -> None:
    """What is written is read back as the same events; each line names its type."""
    file = io.BytesIO()
    write_jsonl(EVENTS, file)
    lines = file.getvalue().splitlines()
    assert lines[0].startswith(b'{"event":"mapping-born","at":0.5')
    assert list(read_jsonl(lines)) == EVENTS


def test_a_broken_line_is_named() -> None:
    """A line that is no event is reported by number."""
    with pytest.raises(TimelineError, match="line 2"):
        list(read_jsonl([encode_event(EVENTS[0]), b'{"event":"nonsense"}']))


def test_bounded() -> None:
    """The oldest events go first, and are counted; sinks see all."""
    timeline = Timeline(capacity=3)
    seen: list[Event] = []
    timeline.sinks.append(seen.append)
    for event in EVENTS:
        timeline.add(event)
    assert list(timeline) == EVENTS[1:]
    assert timeline.forgotten == 1
    assert seen == EVENTS


async def test_explain(autojump_clock: MockClock) -> None:
    """A failed punch is explained by the filters that were closed and whom they were open for."""
    topology = Topology(
        hosts=tuple(Host(name=n, uplinks=(Uplink(network=f"home-{n}"),)) for n in "ab"),
        servers=(Server(name="stun-1", addresses=3),),
        nats=(
            Nat(name="home-a", behavior=class_behavior("EIM+APDF")),
            Nat(name="home-b", behavior=class_behavior("APDM+APDF")),
        ),
    )
    async with SimulatedInternet(topology) as internet, trio.open_nursery() as nursery:
        one, two, three = map(str, internet.plan.servers["stun-1"].ipv4)
        async with internet.host("stun-1"):
            await nursery.start(serve_probe, ProbeServers(addresses=(one, two, three)))
        connected = await punch(
            internet.host("a"), internet.host("b"), (one, 3478), generator=random.Random(1)
        )
        nursery.cancel_scope.cancel()
    assert not connected
    explanation = explain(topology, internet.timeline, "a", "b")
    from_a, from_b = explanation.directions
    assert from_a.delivered == from_b.delivered == 0
    assert from_a.sent > 20 < from_b.sent
    assert [(loss.where, loss.reason) for loss in from_a.losses] == [
        ("home-b", DropReason.FILTERED)
    ]
    assert [(loss.where, loss.reason) for loss in from_b.losses] == [
        ("home-a", DropReason.FILTERED)
    ]
    assert {event.nat for event in explanation.mappings} == {"home-a", "home-b"}
    assert "dropped at home-a" in explanation.text
    assert "filtered, port-dependent" in explanation.text
    assert "had only contacted stun-1 (" in explanation.text
    assert "mapping expires in" in explanation.text
