"""Connectivity checks: STUN Binding requests that prove who sends them (RFC 8445 7).

A request carries, by way of aioice's attribute table behind `traversal.wire.stun`:

    USERNAME            the receiver's user name fragment, a colon, the sender's
    PRIORITY            what the sender's address would be worth as a peer-reflexive candidate
    ICE-CONTROLLING or ICE-CONTROLLED, with the 8 bytes that decide a conflict of roles
    USE-CANDIDATE       from the controlling agent, when it nominates
    MESSAGE-INTEGRITY   made with the receiver's password
    FINGERPRINT

and its answer XOR-MAPPED-ADDRESS or ERROR-CODE, with MESSAGE-INTEGRITY by the same password. A
request is at least as long as any answer to it that this module writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from traversal.wire.address import Address
from traversal.wire.stun import (
    HEADER_LENGTH,
    MAGIC_COOKIE,
    Message,
    StunError,
    TransactionId,
    encode_message,
    parse_message,
)

ROLE_CONFLICT: Final = 487

MAX_CHECK_BYTES: Final = 1280
"""An honest check has 100 to 200 bytes; what is longer is not worth a digest."""

_BINDING: Final = 1
_REQUEST, _SUCCESS, _ERROR = 0x000, 0x100, 0x110
_COOKIE: Final = MAGIC_COOKIE.to_bytes(4, "big")
_USERNAME: Final = b"\0\x06"
_MAX_SKIPPED_ATTRIBUTES: Final = 8


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """A connectivity check. `tie_breaker` is 0 to 2**64 - 1."""

    transaction_id: TransactionId
    username: str
    priority: int
    is_controlling: bool
    tie_breaker: int
    use_candidate: bool = False


@dataclass(frozen=True, slots=True)
class CheckResponse:
    """An answer: `mapped_address` says where our check came from, None with an `error_code`."""

    transaction_id: TransactionId
    mapped_address: Address | None
    error_code: int | None = None


def is_any_stun(datagram: bytes) -> bool:
    """Whether a datagram from an ICE peer is STUN of any class rather than data (RFC 7983 7)."""
    return len(datagram) >= HEADER_LENGTH and datagram[0] & 0xC0 == 0 and datagram[4:8] == _COOKIE


def is_request(datagram: bytes) -> bool:
    """Whether a datagram for which `is_any_stun` holds is a Binding request."""
    return datagram[:2] == b"\0\x01"


def maybe_receiver_ufrag(datagram: bytes) -> str | None:
    """Whom a Binding request is for, before anything is verified; None if it does not say."""
    if not (is_any_stun(datagram) and is_request(datagram)):
        return None
    position = HEADER_LENGTH
    for _ in range(_MAX_SKIPPED_ATTRIBUTES):
        length = int.from_bytes(datagram[position + 2 : position + 4], "big")
        value = datagram[position + 4 : position + 4 + length]
        if datagram[position : position + 2] == _USERNAME:
            ufrag, colon, _rest = value.partition(b":")
            return ufrag.decode("ascii", "replace") if colon else None
        position += 4 + length + (-length % 4)
        if position >= len(datagram):
            return None
    return None


def encode_check_request(request: CheckRequest, password: str) -> bytes:
    """The bytes of a check; `password` is the receiver's. Raises ValueError."""
    role = "ICE-CONTROLLING" if request.is_controlling else "ICE-CONTROLLED"
    attributes: dict[str, object] = {
        "USERNAME": request.username,
        "PRIORITY": request.priority,
        role: request.tie_breaker,
    }
    if request.use_candidate:
        attributes["USE-CANDIDATE"] = None
    message = Message(_BINDING, _REQUEST, request.transaction_id, attributes)
    return encode_message(message, integrity_key=password.encode())


def parse_check_request(datagram: bytes, password: str) -> CheckRequest:
    """Read a check for us, made with our `password`. Raises StunError for anything else."""
    attributes, transaction_id = _parse(datagram, password, (_REQUEST,))
    controlling, controlled = attributes.get("ICE-CONTROLLING"), attributes.get("ICE-CONTROLLED")
    tie_breaker = controlling if controlling is not None else controlled
    username, priority = attributes.get("USERNAME"), attributes.get("PRIORITY")
    if (
        not isinstance(tie_breaker, int)
        or not isinstance(username, str)
        or not isinstance(priority, int)
    ):
        raise StunError("a connectivity check without USERNAME, PRIORITY or role")
    return CheckRequest(
        transaction_id=transaction_id,
        username=username,
        priority=min(max(priority, 1), (1 << 31) - 1),
        is_controlling=controlling is not None,
        tie_breaker=tie_breaker,
        use_candidate="USE-CANDIDATE" in attributes,
    )


def encode_check_response(
    transaction_id: TransactionId, mapped_address: Address, password: str
) -> bytes:
    """The answer to a check that came from `mapped_address`; `password` is our own."""
    attributes = {"XOR-MAPPED-ADDRESS": tuple(mapped_address)}
    message = Message(_BINDING, _SUCCESS, transaction_id, attributes)
    return encode_message(message, integrity_key=password.encode())


def encode_role_conflict(transaction_id: TransactionId, password: str) -> bytes:
    """The answer to a check whose sender must change its role; `password` is our own."""
    attributes = {"ERROR-CODE": (ROLE_CONFLICT, "Role Conflict")}
    message = Message(_BINDING, _ERROR, transaction_id, attributes)
    return encode_message(message, integrity_key=password.encode())


def parse_check_response(datagram: bytes, password: str) -> CheckResponse:
    """Read the answer to a check of ours, made with the peer's `password`. Raises StunError."""
    attributes, transaction_id = _parse(datagram, password, (_SUCCESS, _ERROR))
    error = attributes.get("ERROR-CODE")
    if isinstance(error, tuple):
        return CheckResponse(transaction_id, None, int(error[0]))
    mapped = attributes.get("XOR-MAPPED-ADDRESS")
    if not isinstance(mapped, tuple):
        raise StunError("an answer to a check without XOR-MAPPED-ADDRESS and ERROR-CODE")
    return CheckResponse(transaction_id, Address(*mapped))


def _parse(
    datagram: bytes, password: str, classes: tuple[int, ...]
) -> tuple[dict[str, object], TransactionId]:
    if len(datagram) > MAX_CHECK_BYTES:
        raise StunError(f"a connectivity check of {len(datagram)} bytes")
    message = parse_message(datagram, integrity_key=password.encode())
    if message.method != _BINDING or message.message_class not in classes:
        raise StunError("STUN, but no message of a connectivity check")
    if message.unknown_required or "FINGERPRINT" not in message.attributes:
        raise StunError("a connectivity check without FINGERPRINT, or with unknown attributes")
    return dict(message.attributes), message.transaction_id
