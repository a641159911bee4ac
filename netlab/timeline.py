"""One event stream for a whole lab: what happened to mappings, packets, paths and programs.

Events are frozen records with one clock: `at` is seconds since the lab started. As JSON lines
each is an object whose ``event`` names the type (``mapping-born``, ...), so that any tool reads
a timeline; `read_jsonl` gives the same events back. Nothing here does I/O beyond the text file
that the caller hands in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TypeAlias

import msgspec

from netlab.drops import DropReason


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    at: float


class MappingBorn(_Event, frozen=True, kw_only=True, tag="mapping-born"):
    """A NAT gave an inside socket an external endpoint."""

    nat: str
    protocol: str
    inside: str
    external: str
    remote: str
    """The destination that made the NAT do it."""


class MappingDied(_Event, frozen=True, kw_only=True, tag="mapping-died"):
    """An external endpoint is free again."""

    nat: str
    protocol: str
    inside: str
    external: str
    cause: str
    """``expired``, ``reboot``, ``renumbered`` or ``evicted``."""
    born_at: float


class PacketSent(_Event, frozen=True, kw_only=True, tag="packet-sent"):
    """A host put a packet on the wire."""

    packet: int
    """The packet's number, the same at every later event."""
    host: str
    protocol: str
    source: str
    destination: str
    size_bytes: int
    flags: str = ""
    """TCP flags such as ``SYN``."""
    data: bytes = b""
    """What follows the IP header, up to the run's snap length; empty where that is 0."""


class PacketDelivered(_Event, frozen=True, kw_only=True, tag="packet-delivered"):
    """A packet reached a machine; the addresses are those it arrived with."""

    packet: int
    host: str
    protocol: str
    source: str
    destination: str


class PacketDropped(_Event, frozen=True, kw_only=True, tag="packet-dropped"):
    """A packet ended early."""

    packet: int
    where: str
    """The NAT, link owner or host where it ended."""
    reason: DropReason
    text: str
    protocol: str
    source: str
    destination: str
    sender: str = ""
    """The host that sent it, where the dropping place knows."""
    inside: str = ""
    """The host it would have reached, where the dropping place knows."""


class PathChanged(_Event, frozen=True, kw_only=True, tag="path-changed"):
    """A program reports how it reaches a peer now."""

    host: str
    peer: str
    path: str


class LatencyMeasured(_Event, frozen=True, kw_only=True, tag="latency-measured"):
    """A program reports a round trip to a peer."""

    host: str
    peer: str
    seconds: float


class NetworkChanged(_Event, frozen=True, kw_only=True, tag="network-changed"):
    """The lab itself was changed: a reboot, a roam, a cut."""

    what: str
    target: str
    detail: str = ""


class ProgramOutput(_Event, frozen=True, kw_only=True, tag="program-output"):
    """A line that a program printed."""

    host: str
    program: str
    line: str


class ProgramEnded(_Event, frozen=True, kw_only=True, tag="program-ended"):
    """A program came to its end, or was ended."""

    host: str
    program: str
    status: int
    """The exit status; minus the number of the signal that killed it."""


class Note(_Event, frozen=True, kw_only=True, tag="note"):
    """Anything a test or a person wants to see between the other events."""

    text: str


Event: TypeAlias = (
    MappingBorn
    | MappingDied
    | PacketSent
    | PacketDelivered
    | PacketDropped
    | PathChanged
    | LatencyMeasured
    | NetworkChanged
    | ProgramOutput
    | ProgramEnded
    | Note
)

# A busy lab makes some 100 000 packet events a second; a million of them are about 300 MB, which
# is as much as a test process should spend on remembering.
DEFAULT_CAPACITY = 1_000_000

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


class TimelineError(ValueError):
    """A timeline file holds a line that is no event; the message gives its number."""


class Timeline:
    """A bounded stream of events; the oldest go first, and `forgotten` counts them.

    `sinks` are called with every event, in order, for live views and files.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._events: deque[Event] = deque(maxlen=capacity)
        self._total = 0
        self.sinks: list[Callable[[Event], None]] = []

    @property
    def forgotten(self) -> int:
        return self._total - len(self._events)

    def add(self, event: Event) -> None:
        self._events.append(event)
        self._total += 1
        for sink in self.sinks:
            sink(event)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)


def encode_event(event: Event) -> bytes:
    """Return one JSON line, without its newline."""
    return _encoder.encode(event)


def write_jsonl(events: Iterable[Event], file: IO[bytes]) -> None:
    """Write events as JSON lines."""
    for event in events:
        file.write(_encoder.encode(event) + b"\n")


def read_jsonl(file: Iterable[bytes]) -> Iterator[Event]:
    """Yield the events of a JSON-lines file.

    Raises:
        TimelineError: a line is no event.
    """
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield _decoder.decode(line)
        except msgspec.DecodeError as error:
            raise TimelineError(
                f"line {number} of the timeline is not an event: {error}; "
                "was it written by another version?"
            ) from error
