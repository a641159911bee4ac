"""The certificates that visitors get, chosen by the name asked for.

They come from a directory of the operator's: a pair is `<anything>.crt` (or `.pem`; the chain, leaf
first) and `<anything>.key`, and which names it is for stands in the certificate. Files are read
again when they change, so that whatever renews them needs to do nothing else. For published hosts
that no such pair is for, `relay.acme` orders certificates where that is wanted.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NoReturn

import trio
from cryptography import x509

from relay.acme_files import certificate_path
from relay.certificate_files import CertificateError, load_pair, make_self_signed
from relay.certificates import TlsChallenge, build_context
from relay.file_watch import POLL_SECONDS, FileWatch

logger = logging.getLogger("underpass.relay.edge")

PROTOCOLS: Final = ("h2", "http/1.1")
PLACEHOLDER: Final = "edge.invalid"
"""Named in the certificate that answers while there is no other: no visitor trusts it."""


class PublicCertificates:
    """TLS contexts by server name. Construction raises CertificateError where a pair is no good."""

    def __init__(
        self,
        directory: str,
        *,
        state_directory: str = "",
        published: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """
        Args:
            directory: the operator's pairs; empty if there are none.
            state_directory: where ordered certificates are; empty if none are ordered.
            published: the hosts of the routes, wildcards among them.
        """
        self._directory = directory
        self._state_directory = state_directory
        self._published = published
        self._challenge = TlsChallenge(state_directory)
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._watch = self._new_watch()
        self._contexts = self._read()
        self._ordered_watch = self._new_ordered_watch()
        self._ordered = self._read_ordered()
        pair = make_self_signed(PLACEHOLDER, time.time())
        self._placeholder = build_context(pair.chain_pem(), pair.key_pem, PROTOCOLS, None)

    def names_to_order(self) -> list[str]:
        """The published hosts that are to have certificates by ACME: not those that the operator
        gave one for, and no wildcards, which only DNS can prove."""
        if not self._state_directory:
            return []
        names = sorted(set(self._published()))
        return [name for name in names if "*" not in name and self._given(name) is None]

    def context_for(self, name: str, client_hello: bytes) -> ssl.SSLContext:
        """For a visitor that asks for this name (in lower case; empty if it asks for none)."""
        challenge = self._challenge.maybe_context_for(client_hello)
        found = challenge or self._given(name) or self._ordered.get(name)
        if found is None and not name and self._contexts:
            found = next(iter(self._contexts.values()))
        return found or self._placeholder

    def _given(self, name: str) -> ssl.SSLContext | None:
        wildcard = f"*.{name.partition('.')[2]}"
        return self._contexts.get(name) or self._contexts.get(wildcard)

    def reload(self) -> None:
        """Read the directory again; what is no good leaves everything as it was."""
        self._watch = self._new_watch()
        try:
            self._contexts = self._read()
        except CertificateError as error:
            logger.error("the old certificates for visitors stay in use: %s", error)
        self._ordered_watch = self._new_ordered_watch()
        self._ordered = self._read_ordered()

    async def run(self) -> NoReturn:
        """Watch the files, forever."""
        while True:
            await trio.sleep(POLL_SECONDS)
            self._challenge.poll()
            if self._watch.poll() or self._ordered_watch.poll():
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

    def _ordered_paths(self) -> dict[str, Path]:
        names = self.names_to_order()
        return {name: certificate_path(self._state_directory, name) for name in names}

    def _new_ordered_watch(self) -> FileWatch:
        return FileWatch(map(str, self._ordered_paths().values()))

    def _read_ordered(self) -> dict[str, ssl.SSLContext]:
        contexts = {}
        for name, path in self._ordered_paths().items():
            if not path.exists():
                continue  # not ordered yet
            try:
                pair = load_pair(path, path, name)
                contexts[name] = build_context(pair.chain_pem(), pair.key_pem, PROTOCOLS, None)
            except CertificateError as error:
                logger.error("the certificate for %s will be ordered anew: %s", name, error)
        return contexts
