"""Judge the certificates that a DERP server presented (DERP specification 15.2).

Name checks are done by the TLS library where the name to check is the name that is sent (SNI);
here is what that library can't know: another certificate name, and pins.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from datetime import datetime

from cryptography import x509

from traversal.relay_map import CertificatePin, CertificatePolicy, CertificateUnchecked
from traversal.wire.derp_upgrade import maybe_server_key_from_certificates


def check_chain(
    chain: Sequence[bytes], policy: CertificatePolicy | None, server_name: str | None, now: datetime
) -> str | None:
    """What is wrong with a presented chain beyond what the TLS library has checked; None if good.

    `chain` is in DER and in its order on the wire, meta certificate included; `now` has a time
    zone; `server_name` is the SNI that was sent.
    """
    if policy is None or isinstance(policy, CertificateUnchecked):
        return None
    if not chain or maybe_server_key_from_certificates(chain[:1]) is not None:
        # TLS proved possession of the first certificate's key and of no other: passing over the
        # first one would accept whoever sends somebody else's certificate behind their own.
        return "the server presented no certificate of its own"
    certificates = [der for der in chain if maybe_server_key_from_certificates([der]) is None]
    try:
        leaf = x509.load_der_x509_certificate(certificates[0])
        if isinstance(policy, CertificatePin):
            return _check_pin(certificates, leaf, policy, server_name, now)
        return None if _is_valid_for(leaf, policy.name) else f"it is not valid for {policy.name}"
    except (ValueError, x509.DuplicateExtension) as error:
        return f"it can't be read: {error}"


def _check_pin(
    certificates: Sequence[bytes],
    leaf: x509.Certificate,
    pin: CertificatePin,
    server_name: str | None,
    now: datetime,
) -> str | None:
    if len(certificates) != 1:
        return (
            f"with a sha256-raw pin the server must present one certificate, "
            f"it presented {len(certificates)}"
        )
    digest = hashlib.sha256(certificates[0]).digest()
    if digest != pin.sha256:
        return f"its pin is sha256-raw:{digest.hex()}, not sha256-raw:{pin.sha256.hex()}"
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        return (
            f"it is valid from {leaf.not_valid_before_utc:%Y-%m-%d} "
            f"to {leaf.not_valid_after_utc:%Y-%m-%d} only"
        )
    if server_name is not None and not _is_valid_for(leaf, server_name):
        return f"it is not valid for {server_name}"
    return None


def _is_valid_for(certificate: x509.Certificate, name: str) -> bool:
    """Whether a certificate names a host (RFC 6125: whole names, or `*` as the first label)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    if is_address(name):
        return ipaddress.ip_address(name) in names.get_values_for_type(x509.IPAddress)
    wanted = name.lower().rstrip(".")
    parent = wanted.partition(".")[2]
    patterns = {pattern.lower() for pattern in names.get_values_for_type(x509.DNSName)}
    return wanted in patterns or ("." in parent and f"*.{parent}" in patterns)


def is_address(text: str) -> bool:
    """Whether a host is an IP address and no name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
