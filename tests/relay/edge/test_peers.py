"""The switch between nodes at an edge: delivery, replacement, notices, bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.edge import peers
from relay.edge.peers import Member, PeerSwitch
from traversal.keys import NodePublic
from traversal.wire.derp import (
    DerpError,
    FrameSplitter,
    FrameType,
    GoneReason,
    encode_peer_gone,
)


class Node(Member):
    """A member that notes what is done to it."""

    def __init__(self, switch: PeerSwitch, number: int) -> None:
        self.woken = 0
        self.is_closed = False
        super().__init__(NodePublic(bytes([number]) * 32), self._note_wake, self._note_close, 0.0)
        self.switch = switch
        switch.connect(self)

    def _note_wake(self) -> None:
        self.woken += 1

    def _note_close(self) -> None:
        self.is_closed = True

    def send(self, to: int, payload: bytes, now: float = 0.0) -> None:
        body = bytes([to]) * 32 + payload
        self.switch.handle_frame(self, FrameType.SEND_PACKET, body, now)

    def received(self) -> list[tuple[int, bytes]]:
        splitter = FrameSplitter()
        while frames := self.switch.take(self, 1 << 20):
            splitter.receive_data(b"".join(frames))
        return list(splitter.frames())


def test_delivery() -> None:
    """A packet goes to the node whose key it names, and says whose it is."""
    switch = PeerSwitch()
    one, two = Node(switch, 1), Node(switch, 2)
    one.send(2, b"hello")
    assert two.woken == 1
    assert two.received() == [(FrameType.RECV_PACKET, bytes([1]) * 32 + b"hello")]
    assert (one.received(), one.woken) == ([], 0)
    statistics = switch.statistics()
    assert (statistics.nodes, statistics.forwarded, statistics.forwarded_bytes) == (2, 1, 5)


def test_nobody_there() -> None:
    """A sender learns that a node is not here, but not as often as it asks."""
    switch = PeerSwitch()
    one = Node(switch, 1)
    for _ in range(100):
        one.send(9, b"hello")
    frame = (FrameType.PEER_GONE, bytes([9]) * 32 + bytes([GoneReason.NOT_HERE]))
    assert one.received() == [frame] * int(peers.NOT_HERE_BURST)
    one.send(9, b"hello", now=1.0)
    assert one.received() == [frame]
    assert switch.statistics().dropped_not_here == 101


def test_replacement() -> None:
    """A node's newer connection takes over; the older one is closed, and when it goes nothing more
    happens."""
    switch = PeerSwitch()
    one, old = Node(switch, 1), Node(switch, 2)
    one.send(2, b"lost")
    new = Node(switch, 2)
    assert old.is_closed
    switch.disconnect(old)
    one.send(2, b"arrives")
    assert new.received() == [(FrameType.RECV_PACKET, bytes([1]) * 32 + b"arrives")]
    assert one.received() == []


def test_leaving() -> None:
    """Nodes that heard from one are told when it leaves, once, and nobody else is."""
    switch = PeerSwitch()
    one, two, three = (Node(switch, number) for number in (1, 2, 3))
    one.send(2, b"hello")
    two.received()
    switch.disconnect(one)
    switch.disconnect(one)
    gone = encode_peer_gone(one.key, GoneReason.DISCONNECTED)
    assert [frame[5:] for frame in [gone]] == [body for _, body in two.received()]
    assert (two.received(), three.received()) == ([], [])
    assert not switch._delivered


def test_a_full_queue_is_fair() -> None:
    """One sender's flood pushes out its own packets, not the few of another."""
    switch = PeerSwitch()
    flooder, modest, reader = (Node(switch, number) for number in (1, 2, 3))
    modest.send(3, b"mine")
    for number in range(2 * peers.QUEUE_PACKETS):
        flooder.send(3, number.to_bytes(4, "big"))
    received = [body for _, body in reader.received()]
    assert len(received) == peers.QUEUE_PACKETS
    assert modest.key + b"mine" in received
    assert received[-1] == flooder.key + (2 * peers.QUEUE_PACKETS - 1).to_bytes(4, "big")


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for all nodes together has a bound, and room is given back."""
    monkeypatch.setattr(peers, "WAITING_BYTES", 100_000)
    switch = PeerSwitch()
    one, two, three = (Node(switch, number) for number in (1, 2, 3))
    for _ in range(60):
        one.send(2, bytes(1000))
        one.send(3, bytes(1000))
    assert switch.statistics().dropped_for_memory > 0
    assert len(two.received()) + len(three.received()) < 100
    one.send(2, bytes(1000))
    switch.disconnect(two)
    assert switch._waiting_bytes == 0


def test_notices_are_bounded() -> None:
    """A node that does not read what it is told costs no more than so many notices."""
    switch = PeerSwitch()
    one = Node(switch, 1)
    for _ in range(5000):
        switch.handle_frame(one, FrameType.PING, b"12345678", 0.0)
    assert len(one.received()) == peers.CONTROL_FRAMES


def test_pings_are_answered() -> None:
    """A ping comes back."""
    switch = PeerSwitch()
    one = Node(switch, 1)
    switch.handle_frame(one, FrameType.PING, b"12345678", 0.0)
    assert one.received() == [(FrameType.PONG, b"12345678")]


@pytest.mark.parametrize(
    ("frame_type", "body"),
    [(FrameType.SEND_PACKET, bytes(31)), (FrameType.PING, bytes(7)), (FrameType.PING, bytes(1001))],
)
def test_violations(frame_type: FrameType, body: bytes) -> None:
    """Frames that make no sense end the node's connection."""
    switch = PeerSwitch()
    with pytest.raises(DerpError):
        switch.handle_frame(Node(switch, 1), frame_type, body, 0.0)


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=80)), max_size=30))
def test_any_frames(frames: list[tuple[int, bytes]]) -> None:
    """Whatever a node sends, the switch goes on or says DerpError, and its sums stay right."""
    switch = PeerSwitch()
    nodes = [Node(switch, 0), Node(switch, 1)]
    for frame_type, body in frames:
        try:
            switch.handle_frame(nodes[0], frame_type, body, 0.0)
        except DerpError:
            pass
    for node in nodes:
        switch.disconnect(node)
    assert switch._waiting_bytes == 0
