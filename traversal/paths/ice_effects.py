"""What an ICE agent says: its state, its errors, and what it wants done, in the order given."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from traversal.paths.effects import AddressForgotten, AddressLearned
from traversal.wire.address import Address
from traversal.wire.ice_description import IceCandidateType
from traversal.wire.stun import TransactionId


class IceState(Enum):
    """Where a session is in its life."""

    NEW = "new"
    CHECKING = "checking"
    CONNECTED = "connected"
    FAILED = "failed"
    CLOSED = "closed"


class IceError(Exception):
    """The session can't do what was asked, or has failed; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class SelectedPair:
    """Where datagrams go now, how that address was found, and how the peer sees us."""

    address: Address
    type: IceCandidateType
    latency_seconds: float | None
    mapped_address: Address | None


@dataclass(frozen=True, slots=True)
class SendStun:
    """Send these bytes by UDP."""

    datagram: bytes
    address: Address


@dataclass(frozen=True, slots=True)
class CheckStarted:
    """A STUN response with this transaction id is for this agent."""

    transaction_id: TransactionId


@dataclass(frozen=True, slots=True)
class CheckEnded:
    """No more responses with this transaction id are expected."""

    transaction_id: TransactionId


@dataclass(frozen=True, slots=True)
class IceStateChanged:
    """`reason` is a sentence for a person."""

    state: IceState
    reason: str


IceEffect = (
    SendStun | CheckStarted | CheckEnded | IceStateChanged | AddressLearned | AddressForgotten
)
