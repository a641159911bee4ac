"""The meta certificate, byte for byte."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from relay.meta_certificate import build_meta_certificate
from traversal.keys import NodePublic

SERVER_KEY = "8f40c5adb68f25624ae5b214ea767a6ec94d829d3d7b5e1ad1ba6f3e2138285f"
SEED = bytes(range(0xC0, 0xE0))


def unix(year: int, month: int, day: int) -> int:
    return int(datetime(year, month, day, tzinfo=UTC).timestamp())


def test_vector() -> None:
    """DERP specification 18.3."""
    der = build_meta_certificate(
        NodePublic.from_hex(SERVER_KEY),
        SEED,
        not_before=unix(2026, 1, 1),
        not_after=unix(2026, 3, 2),
    )
    assert len(der) == 359
    assert (
        hashlib.sha256(der).hexdigest()
        == "94868ca7904db522be0ef47b4ecd85dda53a40e679aa4f38afee112b4f9e59ab"
    )


@given(key=st.binary(min_size=32, max_size=32), seed=st.binary(min_size=32, max_size=32))
def test_an_independent_reader_finds_the_key(key: bytes, seed: bytes) -> None:
    """Version, serial number, name and extension are where X.509 has them; the signature holds."""
    der = build_meta_certificate(
        NodePublic(key), seed, not_before=unix(2026, 1, 1), not_after=unix(2026, 3, 2)
    )
    certificate = x509.load_der_x509_certificate(der)
    assert certificate.version is x509.Version.v3
    assert certificate.serial_number == 2
    assert f"derpkey{key.hex()}".encode() in der
    assert [extension.oid for extension in certificate.extensions] == [
        x509.ExtensionOID.BASIC_CONSTRAINTS
    ]
    certificate.verify_directly_issued_by(certificate)


def test_a_date_that_utctime_cannot_hold_is_refused() -> None:
    """Two digits of a year end in 2049."""
    with pytest.raises(ValueError, match="2050"):
        build_meta_certificate(
            NodePublic(bytes(32)), SEED, not_before=0, not_after=unix(2050, 1, 1)
        )
