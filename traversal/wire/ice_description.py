"""What two ICE agents tell each other by way of the application: candidates and credentials.

The text is that of SDP (RFC 8839), one attribute a line, as a WebRTC stack writes and reads it:

    a=ice-ufrag:8hhY
    a=ice-pwd:asd88fgpdd777uzjYhagZg
    a=candidate:1 1 UDP 2130706431 203.0.113.141 8998 typ host
    a=candidate:2 1 UDP 1694498815 192.0.2.3 45664 typ srflx raddr 203.0.113.141 rport 8998

The candidate model (text, priorities, foundations) is aioice's, behind this module's checks and
its one error type. Lines that mean something else are ignored, and so are candidates that UDP to an
IP address can't reach: TCP, names of multicast DNS, components other than the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_address
from typing import Final

from traversal.wire.address import Address

MAX_CANDIDATES: Final = 64
"""Candidates kept of one description. Browsers send fewer than 20; each is an address that its
sender can make us send checks to (RFC 8445 19.5.1)."""
MAX_TEXT_CHARACTERS: Final = 65536
"""A whole session description of a conference has 20 000 or so."""
COMPONENT: Final = 1
"""Datagrams need one component; a second one was for RTCP."""

PEER_REFLEXIVE_PRIORITY: Final = 110 << 24 | 65535 << 8 | 256 - COMPONENT
"""What each of our checks offers in PRIORITY: RFC 8445 5.1.2.1 with its type preference of 110."""

_UFRAG = re.compile(r"[A-Za-z0-9+/]{4,256}", re.ASCII)
_PASSWORD = re.compile(r"[A-Za-z0-9+/]{22,256}", re.ASCII)
_FOUNDATION = re.compile(r"[A-Za-z0-9+/]{1,32}", re.ASCII)


class IceDescriptionError(ValueError):
    """A text that is no ICE description or candidate; it says which part is wrong."""


class IceCandidateType(Enum):
    """How an address was found (RFC 8445 4)."""

    HOST = "host"
    SERVER_REFLEXIVE = "srflx"
    PEER_REFLEXIVE = "prflx"
    RELAYED = "relay"


@dataclass(frozen=True, slots=True)
class IceCandidate:
    """An address at which an agent may be reachable by UDP. `related` is the address behind it."""

    foundation: str
    priority: int
    address: Address
    type: IceCandidateType
    related: Address | None = None


@dataclass(frozen=True, slots=True)
class IceDescription:
    """An agent's user name fragment and password, and its candidates.

    `is_lite` says that the agent sends no checks of its own (RFC 8445 2.5). Whoever has the
    description can open the session in the agent's place: it belongs on an encrypted channel.
    """

    ufrag: str
    password: str = field(repr=False)
    candidates: tuple[IceCandidate, ...] = ()
    is_lite: bool = False

    def __post_init__(self) -> None:
        if not _UFRAG.fullmatch(self.ufrag):
            raise IceDescriptionError("ice-ufrag must be 4 to 256 letters, digits, + and /")
        if not _PASSWORD.fullmatch(self.password):
            raise IceDescriptionError("ice-pwd must be 22 to 256 letters, digits, + and /")

    def encode(self) -> str:
        """Attribute lines of SDP, each ended by a newline."""
        lines = ["a=ice-lite"] if self.is_lite else []
        lines += [f"a=ice-ufrag:{self.ufrag}", f"a=ice-pwd:{self.password}"]
        lines += [f"a=candidate:{encode_candidate(c)}" for c in self.candidates]
        return "".join(f"{line}\n" for line in lines)


def make_candidate(
    kind: IceCandidateType, address: Address, base: Address, local_preference: int
) -> IceCandidate:
    """A candidate of ours, with the priority and foundation of RFC 8445 5.1.

    `base` is the socket's own address; `local_preference` is 0 to 65535, more is better.
    """
    from aioice.candidate import candidate_foundation, candidate_priority

    return IceCandidate(
        foundation=candidate_foundation(kind.value, "udp", base.host),
        priority=candidate_priority(COMPONENT, kind.value, local_preference),
        address=address,
        type=kind,
        related=base if base != address else None,
    )


def encode_candidate(candidate: IceCandidate) -> str:
    """The value of SDP's `candidate` attribute, as WebRTC's and aioice's `from_sdp` take it."""
    from aioice.candidate import Candidate as SdpCandidate

    related = candidate.related
    text: str = SdpCandidate(
        foundation=candidate.foundation,
        component=COMPONENT,
        transport="udp",
        priority=candidate.priority,
        host=candidate.address.host,
        port=candidate.address.port,
        type=candidate.type.value,
        related_address=related.host if related is not None else None,
        related_port=related.port if related is not None else None,
    ).to_sdp()
    return text


def parse_candidate(text: str) -> IceCandidate:
    """Read a candidate, with or without `a=candidate:` in front. Raises IceDescriptionError.

    Also raised for one that we can't use; the text then says why.
    """
    from aioice.candidate import Candidate as SdpCandidate

    value = text.strip()[:1024].removeprefix("a=").removeprefix("candidate:")
    try:
        found = SdpCandidate.from_sdp(value)
        kind = IceCandidateType(found.type)
        address = Address(str(ip_address(found.host)), found.port)
    except (ValueError, ArithmeticError) as error:
        raise IceDescriptionError(f"no candidate that we can use: {error}") from None
    if found.transport.lower() != "udp" or found.component != COMPONENT:
        raise IceDescriptionError("a candidate must be for UDP and the first component")
    if not 0 < address.port <= 65535 or "%" in address.host:
        raise IceDescriptionError("a candidate must name a port and an address without zone")
    if not 0 < found.priority < 1 << 31 or not _FOUNDATION.fullmatch(found.foundation):
        raise IceDescriptionError("a candidate's priority or foundation is out of range")
    return IceCandidate(
        foundation=found.foundation,
        priority=found.priority,
        address=address,
        type=kind,
        related=_maybe_related(found.related_address, found.related_port),
    )


def parse_description(text: str) -> IceDescription:
    """Read SDP, a whole session description or just the attribute lines of ICE.

    The first user name fragment and the first password count. Candidates that can't be used are
    left out, and so is what exceeds 64. Raises IceDescriptionError.
    """
    if len(text) > MAX_TEXT_CHARACTERS:
        raise IceDescriptionError(f"a description has at most {MAX_TEXT_CHARACTERS} characters")
    lines = [line.strip().removeprefix("a=") for line in text.splitlines()]
    return IceDescription(
        ufrag=_first(lines, "ice-ufrag:"),
        password=_first(lines, "ice-pwd:"),
        candidates=_usable(line for line in lines if line.startswith("candidate:")),
        is_lite="ice-lite" in lines,
    )


def _first(lines: list[str], name: str) -> str:
    for line in lines:
        if line.startswith(name):
            return line.removeprefix(name)
    raise IceDescriptionError(f"the description has no line a={name}")


def _usable(lines: Iterable[str]) -> tuple[IceCandidate, ...]:
    usable: dict[Address, IceCandidate] = {}
    for line in lines:
        try:
            candidate = parse_candidate(line)
        except IceDescriptionError:
            continue
        usable.setdefault(candidate.address, candidate)
        if len(usable) == MAX_CANDIDATES:
            break
    return tuple(usable.values())


def _maybe_related(host: str | None, port: int | None) -> Address | None:
    try:
        return Address(str(ip_address(host or "")), port or 0)
    except ValueError:
        return None
