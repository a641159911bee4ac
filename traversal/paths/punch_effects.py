"""What a search for ports wants done, for the shell to carry out in the order given.

Extra sockets are numbered by the search, from 0 on, anew for each attempt; None stands for the
node's ordinary socket. Order matters: a NAT gives out ports in the order of packets, so nothing
may be sent later than what follows it in the list.
"""

from __future__ import annotations

from dataclasses import dataclass

from traversal.paths.effects import SendCallMeMaybe
from traversal.wire.address import Address
from traversal.wire.punching import PunchMessage


@dataclass(frozen=True, slots=True)
class OpenSockets:
    """Open `count` UDP sockets for IPv4 on any port, numbered from 0, and call
    `Puncher.handle_opened` with `batch` and their local ports: fewer if the system has no more.
    If that takes time and another batch was asked for meanwhile, close the former."""

    count: int
    batch: int = 0


@dataclass(frozen=True, slots=True)
class CloseSockets:
    """Close these sockets; what arrives on them later is lost on purpose."""

    sockets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendProbe:
    """Send a disco Ping with our node key from a socket."""

    socket: int | None
    address: Address
    transaction_id: bytes


@dataclass(frozen=True, slots=True)
class SendProbePong:
    """Send a disco Pong that says `address`, to `address`, from an extra socket."""

    socket: int
    address: Address
    transaction_id: bytes


@dataclass(frozen=True, slots=True)
class MeasureMapping:
    """Send one STUN request from an extra socket, at once, to a server that is near, always the
    same one in an attempt; call `Puncher.handle_mapping` with the answer, if one comes."""

    socket: int


@dataclass(frozen=True, slots=True)
class SendPunchMessage:
    """Seal this with the box of the node keys and send it by the peer's home relay."""

    message: PunchMessage


@dataclass(frozen=True, slots=True)
class MapPort:
    """Ask the router for a port mapping now; tell by `Puncher.set_own_side` if it gave one."""


@dataclass(frozen=True, slots=True)
class AdoptSocket:
    """A path was found. From now on whatever goes to `remote` for this peer leaves by `socket`, and
    what comes on it is the peer's, as if by the ordinary socket, which None stands for.

    Then call `Peer.handle_found(remote, latency_seconds, now)`. `own_address` is how the peer sees
    an extra socket: list it in every CallMeMaybe as long as the socket lives, as
    `Puncher.own_extra` says (path selection specification S3).
    """

    socket: int | None
    remote: Address
    own_address: Address
    latency_seconds: float


@dataclass(frozen=True, slots=True)
class SearchEnded:
    """An attempt ended; `sentence` says how, for a log."""

    has_succeeded: bool
    sentence: str


PunchEffect = (
    OpenSockets
    | CloseSockets
    | SendProbe
    | SendProbePong
    | MeasureMapping
    | SendPunchMessage
    | SendCallMeMaybe
    | MapPort
    | AdoptSocket
    | SearchEnded
)
