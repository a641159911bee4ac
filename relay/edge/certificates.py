"""The certificate that connectors see.

Connectors verify three names that no public authority gives to an operator (edge tunnel
specification 3). So the edge has an authority of its own unless it is given a certificate: `ca.pem`
in its directory is what connectors are to trust (`--cacert`, which replaces their roots). The
authority may vouch for those names only, so that its key is worth little elsewhere. The
certificate itself lives in memory and is renewed in time.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NoReturn

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from relay.certificate_files import (
    CertificateError,
    CertificatePair,
    covers,
    key_to_pem,
    load_pair,
    to_pem,
)
from relay.certificates import build_context
from relay.config_schema import EdgeConfig
from relay.config_sources import ConfigError, read_text_file
from relay.derper_files import write_private_file
from relay.file_watch import FileWatch

logger = logging.getLogger("underpass.relay.edge")

HTTP2_NAME: Final = "h2.cftunnel.com"
QUIC_NAME: Final = "quic.cftunnel.com"
PROBE_NAME: Final = "probe.cftunnel.com"
NAMES: Final = (HTTP2_NAME, QUIC_NAME, PROBE_NAME)
_DOMAIN: Final = "cftunnel.com"

_AUTHORITY_LIFETIME: Final = timedelta(days=20 * 365)
_LIFETIME: Final = timedelta(days=90)
_RENEW_BEFORE_SECONDS: Final = 30 * 86400
_CLOCK_SKEW: Final = timedelta(hours=1)
LOOK_SECONDS: Final = 5.0


class EdgeCertificates:
    """The pair in use. Construction reads or makes it and raises CertificateError.

    Attributes:
        pair: for new connections; another one after a renewal.
        context: the same for TLS over TCP, where connectors negotiate no protocol.
    """

    def __init__(self, config: EdgeConfig, *, unix_clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._unix_clock = unix_clock
        self._watch = FileWatch([config.cert_file, config.key_file])
        self._use(self._make())

    def reload(self) -> None:
        """Read the files again, or renew what is in memory. Bad files leave the old in use."""
        try:
            self._use(self._make())
        except CertificateError as error:
            logger.error("the edge's old certificate stays in use: %s", error)

    async def run(self) -> NoReturn:
        """Watch the files, and renew before the certificate expires."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            is_old = self._unix_clock() > self.pair.not_after_unix - _RENEW_BEFORE_SECONDS
            if self._watch.poll() or (is_old and not self._config.cert_file):
                self.reload()

    def _use(self, pair: CertificatePair) -> None:
        self.pair = pair
        self.context: ssl.SSLContext = build_context(pair.chain_pem(), pair.key_pem, (), None)

    def _make(self) -> CertificatePair:
        config = self._config
        if not config.cert_file:
            return issue(load_or_create_authority(Path(config.directory)), self._unix_clock())
        pair = load_pair(Path(config.cert_file), Path(config.key_file), HTTP2_NAME)
        for name in NAMES:
            if not covers(pair.leaf, name):
                raise CertificateError(f"{config.cert_file}: not valid for {name}")
        return pair


def authority_path(directory: Path) -> Path:
    """The file that connectors are to trust."""
    return directory / "ca.pem"


def load_or_create_authority(directory: Path) -> CertificatePair:
    """The edge's own authority; made if absent. Raises CertificateError."""
    cert_path, key_path = authority_path(directory), directory / "ca.key"
    if not cert_path.exists() and not key_path.exists():
        pair = _make_authority(time.time())
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_private_file(key_path, pair.key_pem)
            cert_path.write_bytes(pair.chain_pem())
        except OSError as error:
            raise CertificateError(
                f"{cert_path}: the authority can't be written: {error.strerror}"
            ) from None
    try:
        cert_pem = read_text_file(cert_path, "edge's authority")
        key_pem = read_text_file(key_path, "key of the edge's authority").encode()
        chain = tuple(x509.load_pem_x509_certificates(cert_pem.encode()))
        serialization.load_pem_private_key(key_pem, password=None)
    except ConfigError as error:
        raise CertificateError(str(error)) from None
    except (ValueError, TypeError):
        raise CertificateError(f"{cert_path} or {key_path}: not usable PEM") from None
    return CertificatePair(chain, key_pem)


def _make_authority(unix_time: float) -> CertificatePair:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.fromtimestamp(int(unix_time), UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Underpass edge authority")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.NameConstraints([x509.DNSName(_DOMAIN)], None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return CertificatePair((certificate,), key_to_pem(key))


def issue(authority: CertificatePair, unix_time: float) -> CertificatePair:
    """A certificate for the three names. Raises CertificateError."""
    signing_key = serialization.load_pem_private_key(authority.key_pem, password=None)
    if not isinstance(signing_key, ec.EllipticCurvePrivateKey):
        raise CertificateError("the edge's authority must have an ECDSA key")
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.fromtimestamp(int(unix_time), UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HTTP2_NAME)]))
        .issuer_name(authority.leaf.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName(list(map(x509.DNSName, NAMES))), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()),
            critical=False,
        )
        .sign(signing_key, hashes.SHA256())
    )
    return CertificatePair((certificate,), key_to_pem(key))


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def authority_pem(directory: Path) -> bytes:
    """What connectors are to trust; made if absent. Raises CertificateError."""
    return to_pem(load_or_create_authority(directory).leaf)
