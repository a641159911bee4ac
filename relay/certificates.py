"""The relay's TLS contexts: chain `leaf, intermediates, meta certificate`, renewed while it runs.

Modes (`tls.mode`):

* files        a chain and its key, read again when the files change
* self-signed  made once and kept, or made in memory; known to clients by its pin
* acme         written by `relay.acme`; until the first one is there, a placeholder that no
               client trusts answers, and `status().ready` is false

New contexts are for new connections; those under way keep theirs. A new file that is no good
leaves everything as it was. TLS rules are those of DERP specification 3.2.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import trio

from relay.acme_files import certificate_path, tls_challenge_path
from relay.certificate_files import (
    CertificateError,
    CertificatePair,
    certificate_paths,
    is_ip_address,
    load_or_create_self_signed,
    load_pair,
    make_self_signed,
)
from relay.config_schema import TlsConfig
from relay.file_watch import POLL_SECONDS, FileWatch
from relay.meta_certificate import VALIDITY_SECONDS, build_meta_certificate
from traversal.keys import Entropy, NodePublic

logger = logging.getLogger(__name__)

ACME_ALPN: Final = "acme-tls/1"
_ACME_ALPN_ON_THE_WIRE: Final = bytes([len(ACME_ALPN)]) + ACME_ALPN.encode()

_RECORD_HEADER_LENGTH: Final = 5
_HANDSHAKE_RECORD: Final = 0x16


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """A snapshot for metrics and status pages."""

    mode: str
    hostname: str
    ready: bool
    """False while ACME has not brought the first certificate."""
    not_after_unix: int
    pin: str | None
    """`sha256-raw:...`, in mode "self-signed" only."""
    loads: int
    load_failures: int


class Certificates:
    """Gives each new connection its TLS context.

    Construction reads or makes the certificate and raises CertificateError.
    """

    def __init__(
        self,
        config: TlsConfig,
        hostname: str,
        server_key: NodePublic,
        *,
        entropy: Entropy = os.urandom,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._hostname = hostname
        self._server_key = server_key
        self._entropy = entropy
        self._unix_clock = unix_clock
        self._loads = self._load_failures = 0
        self._watch = FileWatch(map(str, self._paths()))
        self._challenge = TlsChallenge(config.acme.state_directory if config.mode == "acme" else "")
        self._ready = True
        self._pair = self._first_pair()
        self._use(self._pair)

    def context_for(self, client_hello: bytes) -> ssl.SSLContext | None:
        """The context for a connection whose first bytes these are; None: more bytes are needed.

        More than nothing is needed only while a TLS-ALPN-01 challenge is under way, for the
        authority must be answered with another certificate than everybody else.
        """
        if self._challenge.context is None:
            return self._context
        if _is_incomplete(client_hello):
            return None
        return self._challenge.maybe_context_for(client_hello) or self._context

    def reload(self) -> None:
        """Read the files again (SIGHUP). Bad ones are logged, and the old certificate stays."""
        if not self._paths():
            return
        try:
            pair = self._read()
            self._use(pair)
        except CertificateError as error:
            self._load_failures += 1
            logger.error("the old certificate stays in use: %s", error)
            return
        if pair.chain != self._pair.chain:
            logger.info(
                "a new certificate is in use; it is valid until %s", pair.leaf.not_valid_after_utc
            )
        self._pair = pair
        self._ready = True

    async def run(self) -> NoReturn:
        """Watch the files and renew the meta certificate, forever."""
        while True:
            await trio.sleep(POLL_SECONDS)
            if self._watch.poll():
                self.reload()
            self._challenge.poll()
            if self._unix_clock() >= self._meta_renewal_unix:
                self._use(self._pair)

    def status(self) -> CertificateStatus:
        """A snapshot."""
        return CertificateStatus(
            mode=self._config.mode,
            hostname=self._hostname,
            ready=self._ready,
            not_after_unix=self._pair.not_after_unix,
            pin=self._pair.pin() if self._config.mode == "self-signed" else None,
            loads=self._loads,
            load_failures=self._load_failures,
        )

    def _paths(self) -> tuple[Path, ...]:
        """The chain's file and the key's; nothing if the certificate lives in memory."""
        config = self._config
        if config.mode == "acme":
            path = certificate_path(config.acme.state_directory, self._hostname)
            return path, path
        if config.cert_file and config.mode == "files":
            return Path(config.cert_file), Path(config.key_file)
        return certificate_paths(config.directory, self._hostname) if config.directory else ()

    def _first_pair(self) -> CertificatePair:
        config = self._config
        if config.mode == "files":
            return self._read()
        if config.mode == "self-signed" and config.directory:
            return load_or_create_self_signed(config.directory, self._hostname)
        if config.mode == "acme":
            try:
                return self._read()
            except CertificateError as error:
                self._ready = False
                logger.warning("there is no certificate yet (%s); waiting for ACME", error)
        return make_self_signed(self._hostname, self._unix_clock())

    def _read(self) -> CertificatePair:
        cert_path, key_path = self._paths()
        pair = load_pair(cert_path, key_path, self._hostname)
        if pair.not_after_unix <= self._unix_clock():
            logger.error("%s: the certificate has expired; clients refuse it", cert_path)
        return pair

    def _use(self, pair: CertificatePair) -> None:
        unix_time = int(self._unix_clock())
        meta = build_meta_certificate(
            self._server_key,
            self._entropy(32),
            not_before=unix_time - VALIDITY_SECONDS,
            not_after=unix_time + VALIDITY_SECONDS,
        )
        chain_pem = pair.chain_pem() + ssl.DER_cert_to_PEM_cert(meta).encode()
        name = None if is_ip_address(self._hostname) else self._hostname
        self._context = build_context(chain_pem, pair.key_pem, ("http/1.1",), name)
        # The reference server lets its meta certificate expire, and clients do not care. Whoever
        # watches certificates does, so ours is never older than half its life.
        self._meta_renewal_unix = unix_time + VALIDITY_SECONDS // 2
        self._loads += 1


class TlsChallenge:
    """What answers TLS-ALPN-01 while an order is under way (RFC 8737, `relay.acme_files`).

    Args:
        state_directory: of ACME; empty if none of its challenges is to be answered.

    Attributes:
        context: None while there is no order.
    """

    def __init__(self, state_directory: str) -> None:
        self._path = tls_challenge_path(state_directory) if state_directory else None
        self._watch = FileWatch([str(self._path)] if self._path else [])
        self.context: ssl.SSLContext | None = None
        self._load()

    def poll(self) -> None:
        """Look for a challenge; to be called every `POLL_SECONDS`."""
        if self._watch.poll():
            self._load()

    def maybe_context_for(self, client_hello: bytes) -> ssl.SSLContext | None:
        """The context for the authority, if it is who sent this complete ClientHello."""
        return self.context if _ACME_ALPN_ON_THE_WIRE in client_hello else None

    def _load(self) -> None:
        self.context = None
        try:
            if self._path is not None:
                self.context = build_context(self._path.read_bytes(), b"", (ACME_ALPN,), None)
        except FileNotFoundError:
            pass
        except (OSError, CertificateError) as error:
            logger.error("%s: not a usable challenge: %s", self._path, error)


def build_context(
    chain_pem: bytes, key_pem: bytes, alpn: tuple[str, ...], server_name: str | None
) -> ssl.SSLContext:
    """A server's context: TLS 1.2 and later, no compression, no renegotiation.

    `server_name` is the only name that is served, and clients must ask for it; None serves
    whoever asks for whatever. Raises CertificateError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # DERP clients never resume, so TLS 1.3 tickets would be sent for nothing. OP_NO_TICKET is not
    # the way: it makes OpenSSL remember TLS 1.2 sessions in memory instead.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    context.set_alpn_protocols(list(alpn))
    # OpenSSL reads chains from files only. This one is memory that no other process can open.
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(chain_pem + key_pem)
        file.flush()
        try:
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        except ssl.SSLError as error:
            raise CertificateError(f"OpenSSL refuses the certificate: {error}") from None
    if server_name is not None:
        wanted = server_name.lower().rstrip(".")

        def check_name(_: object, asked: str | None, __: ssl.SSLContext) -> int | None:
            if asked is not None and asked.lower().rstrip(".") == wanted:
                return None
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR

        context.sni_callback = check_name
    return context


def _is_incomplete(data: bytes) -> bool:
    """Whether the first TLS record is still on its way. What is no handshake needs no more."""
    if len(data) < _RECORD_HEADER_LENGTH:
        return not data or data[0] == _HANDSHAKE_RECORD
    length = int.from_bytes(data[3:5], "big")
    return data[0] == _HANDSHAKE_RECORD and len(data) < _RECORD_HEADER_LENGTH + length
