"""The meta certificate: carries the relay's key inside the TLS handshake (DERP specification 3.3).

A self-signed X.509 certificate that nobody verifies, sent last in the chain. Its subject's common
name is `derpkey` + 64 hex digits, 71 characters, above X.520's limit of 64: certificate builders
refuse that, so the DER is put together here by hand.

    SEQUENCE {                         Certificate
      SEQUENCE {                       TBSCertificate
        [0] { INTEGER 2 }              v3
        INTEGER 2                      serial number = DERP protocol version
        SEQUENCE { OID Ed25519 }
        Name                           issuer: SEQUENCE{SET{SEQUENCE{OID CN, PrintableString}}}
        SEQUENCE { UTCTime, UTCTime }
        Name                           subject, the same bytes
        SEQUENCE { SEQUENCE { OID Ed25519 }, BIT STRING }
        [3] { SEQUENCE { SEQUENCE { OID basicConstraints, BOOLEAN, OCTET STRING { 30 00 } } } }
      }
      SEQUENCE { OID Ed25519 }
      BIT STRING                       signature of the TBSCertificate
    }
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from traversal.keys import NodePublic

COMMON_NAME_PREFIX: Final = "derpkey"
PROTOCOL_VERSION: Final = 2

# The reference server's dates: 30 days to both sides of its start, in seconds.
VALIDITY_SECONDS: Final = 30 * 86400

_INTEGER, _BIT_STRING, _OCTET_STRING, _OID = 0x02, 0x03, 0x04, 0x06
_PRINTABLE_STRING, _UTC_TIME, _SEQUENCE, _SET = 0x13, 0x17, 0x30, 0x31
_BOOLEAN_TRUE: Final = bytes.fromhex("0101ff")
_OID_COMMON_NAME: Final = bytes.fromhex("550403")
_OID_BASIC_CONSTRAINTS: Final = bytes.fromhex("551d13")
_OID_ED25519: Final = bytes.fromhex("2b6570")


def build_meta_certificate(
    server_key: NodePublic, seed: bytes, *, not_before: int, not_after: int
) -> bytes:
    """The certificate in DER.

    `seed` is 32 random bytes for the throw-away Ed25519 key; the dates are Unix times before
    2050 (UTCTime). The same arguments give the same bytes.
    """
    signer = Ed25519PrivateKey.from_private_bytes(seed)
    algorithm = _der(_SEQUENCE, _der(_OID, _OID_ED25519))
    common_name = f"{COMMON_NAME_PREFIX}{server_key.raw.hex()}".encode()
    attribute = _der(_OID, _OID_COMMON_NAME) + _der(_PRINTABLE_STRING, common_name)
    name = _der(_SEQUENCE, _der(_SET, _der(_SEQUENCE, attribute)))
    public_key = signer.public_key().public_bytes_raw()
    basic_constraints = _der(
        _SEQUENCE,
        _der(_OID, _OID_BASIC_CONSTRAINTS)
        + _BOOLEAN_TRUE
        + _der(_OCTET_STRING, _der(_SEQUENCE, b"")),
    )
    certificate = _der(
        _SEQUENCE,
        _der(0xA0, _der(_INTEGER, b"\x02"))
        + _der(_INTEGER, bytes([PROTOCOL_VERSION]))
        + algorithm
        + name
        + _der(_SEQUENCE, _utc_time(not_before) + _utc_time(not_after))
        + name
        + _der(_SEQUENCE, algorithm + _der(_BIT_STRING, b"\x00" + public_key))
        + _der(0xA3, _der(_SEQUENCE, basic_constraints)),
    )
    signature = _der(_BIT_STRING, b"\x00" + signer.sign(certificate))
    return _der(_SEQUENCE, certificate + algorithm + signature)


def _der(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    size = (length.bit_length() + 7) // 8
    return bytes([tag, 0x80 | size]) + length.to_bytes(size, "big") + content


def _utc_time(unix_time: int) -> bytes:
    moment = datetime.fromtimestamp(unix_time, UTC)
    if not 1950 <= moment.year < 2050:
        raise ValueError(f"UTCTime holds the years 1950 to 2049, not {moment.year}")
    return _der(_UTC_TIME, moment.strftime("%y%m%d%H%M%SZ").encode())
