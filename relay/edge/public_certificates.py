"""The certificates that visitors get: every pair in a directory, chosen by the name asked for.

A pair is `<anything>.crt` (or `.pem`; the chain, leaf first) and `<anything>.key`; which names it
is for stands in the certificate. Files are read again when they change, so that whatever renews
them needs to do nothing else.
"""

from __future__ import annotations

import logging
import ssl
import time
from pathlib import Path
from typing import Final, NoReturn

import trio
from cryptography import x509

from relay.certificate_files import CertificateError, load_pair, make_self_signed
from relay.certificates import build_context
from relay.file_watch import POLL_SECONDS, FileWatch

logger = logging.getLogger("underpass.relay.edge")

PROTOCOLS: Final = ("h2", "http/1.1")
PLACEHOLDER: Final = "edge.invalid"
"""Named in the certificate that answers while there is no other: no visitor trusts it."""


class PublicCertificates:
    """TLS contexts by server name. Construction raises CertificateError where a pair is no good."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._watch = self._new_watch()
        self._contexts = self._read()
        pair = make_self_signed(PLACEHOLDER, time.time())
        self._placeholder = build_context(pair.chain_pem(), pair.key_pem, PROTOCOLS, None)

    def context_for(self, name: str) -> ssl.SSLContext:
        """For a visitor that asks for this name (in lower case; empty if it asks for none)."""
        wildcard = f"*.{name.partition('.')[2]}"
        found = self._contexts.get(name) or self._contexts.get(wildcard)
        if found is None and not name and self._contexts:
            found = next(iter(self._contexts.values()))
        return found or self._placeholder

    def reload(self) -> None:
        """Read the directory again; what is no good leaves everything as it was."""
        self._watch = self._new_watch()
        try:
            self._contexts = self._read()
        except CertificateError as error:
            logger.error("the old certificates for visitors stay in use: %s", error)

    async def run(self) -> NoReturn:
        """Watch the directory, forever."""
        while True:
            await trio.sleep(POLL_SECONDS)
            if self._watch.poll():
                self.reload()

    def _new_watch(self) -> FileWatch:
        return FileWatch([self._directory, *map(str, self._pairs().keys())])

    def _pairs(self) -> dict[Path, Path]:
        """Chains and their keys."""
        if not self._directory:
            return {}
        directory = Path(self._directory)
        chains = sorted([*directory.glob("*.crt"), *directory.glob("*.pem")])
        return {path: path.with_suffix(".key") for path in chains}

    def _read(self) -> dict[str, ssl.SSLContext]:
        contexts: dict[str, ssl.SSLContext] = {}
        for chain, key in self._pairs().items():
            pair = load_pair(chain, key, None)
            try:
                names = pair.leaf.extensions.get_extension_for_class(
                    x509.SubjectAlternativeName
                ).value.get_values_for_type(x509.DNSName)
            except x509.ExtensionNotFound:
                raise CertificateError(f"{chain}: the certificate names no host") from None
            context = build_context(pair.chain_pem(), pair.key_pem, PROTOCOLS, None)
            contexts.update(dict.fromkeys((name.lower() for name in names), context))
        return contexts
