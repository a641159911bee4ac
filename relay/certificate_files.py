"""Certificates as bytes: reading and checking a pair, making a self-signed one, pins.

A pair is a chain in PEM (leaf first) and its private key in PEM, unencrypted.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from relay.config_sources import ConfigError, read_text_file
from relay.derper_files import write_private_file

_SELF_SIGNED_LIFETIME: Final = timedelta(days=365)
# A client whose clock is a little behind would refuse a certificate made this second.
_CLOCK_SKEW: Final = timedelta(hours=1)
# X.520's upper bound for a common name; longer names are in the subjectAltName only.
_MAX_COMMON_NAME: Final = 64
_MAX_PEM_BYTES: Final = 256 << 10
_DNS_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


class CertificateError(ValueError):
    """A certificate can't be used or had. The text says which file, and what to do."""


@dataclass(frozen=True, slots=True)
class CertificatePair:
    """A checked chain and its key."""

    chain: tuple[x509.Certificate, ...]
    key_pem: bytes = field(repr=False)

    @property
    def leaf(self) -> x509.Certificate:
        """The relay's own certificate."""
        return self.chain[0]

    @property
    def not_after_unix(self) -> int:
        """When the leaf expires."""
        return int(self.leaf.not_valid_after_utc.timestamp())

    def pin(self) -> str:
        """What a relay map's `CertName` says to trust just this certificate
        (DERP specification 12)."""
        der = self.leaf.public_bytes(serialization.Encoding.DER)
        return f"sha256-raw:{hashlib.sha256(der).hexdigest()}"

    def chain_pem(self) -> bytes:
        """The whole chain, leaf first."""
        return b"".join(map(to_pem, self.chain))


def to_pem(certificate: x509.Certificate) -> bytes:
    """One certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def certificate_paths(directory: str, hostname: str) -> tuple[Path, Path]:
    """derper's names: `<hostname>.crt` and `.key`, without characters outside A-Za-z0-9-."""
    name = re.sub(r"[^A-Za-z0-9.-]", "", hostname)
    return Path(directory, f"{name}.crt"), Path(directory, f"{name}.key")


def load_pair(cert_path: Path, key_path: Path, hostname: str | None) -> CertificatePair:
    """Read a chain and its key, and check that they fit each other and the host name, if any.

    Both may stand in one file. Raises CertificateError.
    """
    try:
        cert_pem = read_text_file(cert_path, "certificate file", _MAX_PEM_BYTES).encode()
        key_pem = read_text_file(key_path, "certificate's key file", _MAX_PEM_BYTES).encode()
    except ConfigError as error:
        raise CertificateError(str(error)) from None
    try:
        chain = tuple(x509.load_pem_x509_certificates(cert_pem))
        covers_name = hostname is None or covers(chain[0], hostname)
        public_key = _public_bytes(chain[0].public_key())
    except (ValueError, x509.DuplicateExtension, UnsupportedAlgorithm):
        raise CertificateError(
            f"{cert_path}: no usable certificate in PEM; it must hold the relay's own first, then "
            "the intermediate ones"
        ) from None
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except TypeError:
        raise CertificateError(
            f"{key_path}: the key is encrypted; store it in the clear with mode 0600"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{key_path}: no usable private key in PEM") from None
    if _public_bytes(key.public_key()) != public_key:
        raise CertificateError(f"{key_path}: the key does not belong to {cert_path}")
    if not covers_name:
        raise CertificateError(f"{cert_path}: the certificate is not valid for {hostname}")
    return CertificatePair(chain, key_pem)


def covers(certificate: x509.Certificate, hostname: str) -> bool:
    """Whether the subjectAltName has the DNS name (wildcards too) or IP address."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    if is_ip_address(hostname):
        return ipaddress.ip_address(hostname) in names.get_values_for_type(x509.IPAddress)
    wanted = hostname.lower().rstrip(".")
    wildcard = f"*.{wanted.partition('.')[2]}"
    return any(
        name.lower() in (wanted, wildcard) for name in names.get_values_for_type(x509.DNSName)
    )


def is_ip_address(hostname: str) -> bool:
    """Whether a host name is an IP address literal."""
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return False
    return True


def is_hostname(text: str) -> bool:
    """Whether this is a DNS name or an IP address literal."""
    return is_ip_address(text) or bool(_DNS_NAME.fullmatch(text))


def make_self_signed(hostname: str, unix_time: float) -> CertificatePair:
    """A certificate for a DNS name or bare IP address as derper's manual mode makes it.

    ECDSA P-256, one subjectAltName, valid one year. Raises CertificateError for what is neither.
    """
    alternative_name = general_name(hostname)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.fromtimestamp(int(unix_time), UTC)
    common_name = [] if len(hostname) > _MAX_COMMON_NAME else [hostname]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text) for text in common_name])
    usage = dict.fromkeys(
        (
            "content_commitment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _SELF_SIGNED_LIFETIME)
        .add_extension(x509.SubjectAlternativeName([alternative_name]), critical=False)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_encipherment=True, **usage), critical=True
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return CertificatePair((certificate,), key_to_pem(key))


def load_or_create_self_signed(directory: str, hostname: str) -> CertificatePair:
    """The self-signed pair that is kept in a directory; made, with mode 0600, if absent.

    A pair that is there is kept even when it has expired, because a new one has another pin.
    Raises CertificateError.
    """
    cert_path, key_path = certificate_paths(directory, hostname)
    if not cert_path.exists() and not key_path.exists():
        pair = make_self_signed(hostname, time.time())
        try:
            cert_path.parent.mkdir(parents=True, exist_ok=True)
            write_private_file(key_path, pair.key_pem)
            write_private_file(cert_path, pair.chain_pem())
        except OSError as error:
            raise CertificateError(f"{cert_path}: can't be written: {error.strerror}") from None
    return load_pair(cert_path, key_path, hostname)


def general_name(hostname: str) -> x509.GeneralName:
    """A DNS name or IP address for a subjectAltName. Raises CertificateError."""
    if is_ip_address(hostname):
        return x509.IPAddress(ipaddress.ip_address(hostname))
    if not is_hostname(hostname.removeprefix("*.")):
        raise CertificateError(f'"{hostname}" is neither a DNS name nor an IP address')
    return x509.DNSName(hostname.rstrip("."))


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key in PEM, unencrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _public_bytes(key: object) -> bytes:
    public: bytes = key.public_bytes(  # type: ignore[attr-defined]  # a union of all key types
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return public
