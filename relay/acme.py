"""Certificates from an ACME authority (RFC 8555), ordered and renewed while the relay runs.

The protocol is the `acme` library's, which blocks and therefore works in a thread; this module
decides when, proves control of the names, and writes the results where `relay.certificates` and
`relay.edge.public_certificates` find them (`relay.acme_files`). Exactly one process of a relay runs
it, and one order at a time is under way.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from relay.acme_files import (
    account_key_path,
    certificate_path,
    http_challenge_path,
    tls_challenge_path,
)
from relay.certificate_files import (
    CertificateError,
    general_name,
    is_ip_address,
    key_to_pem,
    load_pair,
    to_pem,
)
from relay.config_schema import AcmeConfig
from relay.derper_files import write_private_file
from relay.file_watch import POLL_SECONDS

if TYPE_CHECKING:
    from acme import messages
    from acme.client import ClientV2
    from josepy.jwk import JWKEC

logger = logging.getLogger(__name__)

# DERP specification 12: an hourly check, renewal when a third of the lifetime is left, three
# minutes for an order, failures 1 to 30 minutes apart. Let's Encrypt allows five failed
# validations an hour for one name; the doubling stays below it from the third on.
_CHECK_SECONDS: Final = 3600.0
LOOK_SECONDS: Final = 10.0
"""How soon a new name, or a failed one whose pause is over, is noticed."""
_ORDER_SECONDS: Final = 180
_FIRST_BACKOFF_SECONDS: Final = 60.0
_MAX_BACKOFF_SECONDS: Final = 1800.0

_REQUEST_TIMEOUT_SECONDS: Final = 20

# Every worker looks for a new TLS-ALPN-01 certificate, and takes it at the second look.
_PUBLISHED_AFTER_SECONDS: Final = 4 * POLL_SECONDS

# RFC 8737, section 3: id-pe-acmeIdentifier.
_ACME_IDENTIFIER: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")


class AcmeRenewer:
    """Orders a certificate where there is none, and again when a third of its life is left.

    Construction raises CertificateError if the `acme` library is not installed.

    Args:
        names: the host names that are to have certificates now; asked again at every look.
    """

    def __init__(
        self,
        config: AcmeConfig,
        names: Callable[[], Iterable[str]],
        *,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        try:
            import acme.client  # noqa: F401  # only asked whether it is there
        except ImportError:
            raise CertificateError(
                "certificates by ACME need a library that is not installed: "
                "pip install 'underpass[acme]'"
            ) from None
        self._config = config
        self._names = names
        self._unix_clock = unix_clock

    async def run(self) -> NoReturn:
        """Renew forever, one name after the other. Failures are logged and tried again.

        When this is cancelled in the middle of an order, its thread may go on for a while; all it
        still does is ask the authority and remove its challenge, and no certificate is written.
        """
        plans: dict[str, _Plan] = {}
        while True:
            # A name that is gone and comes back begins anew.
            plans = {name: plans.get(name, _Plan()) for name in self._names()}
            for name, plan in plans.items():
                if plan.look_at <= trio.current_time():
                    await self._look(name, plan)
            await trio.sleep(LOOK_SECONDS)

    async def _look(self, name: str, plan: _Plan) -> None:
        try:
            if self.is_due(name):
                await self.renew(name)
        except CertificateError as error:
            plan.failures += 1
            pause = backoff_seconds(plan.failures)
            logger.error("%s; trying again in %.0f minutes", error, pause / 60)
            plan.look_at = trio.current_time() + pause
        else:
            plan.failures = 0
            plan.look_at = trio.current_time() + _CHECK_SECONDS

    def is_due(self, name: str) -> bool:
        """Whether there is no usable certificate, or less than a third of its life is left."""
        path = certificate_path(self._config.state_directory, name)
        try:
            leaf = load_pair(path, path, name).leaf
        except CertificateError:
            return True
        return self._unix_clock() >= renewal_unix(leaf)

    async def renew(self, name: str) -> None:
        """Order a certificate now. Raises CertificateError."""
        key_pem = key_to_pem(ec.generate_private_key(ec.SECP256R1()))
        chain_pem = await trio.to_thread.run_sync(
            order_certificate, self._config, name, key_pem, abandon_on_cancel=True
        )
        path = certificate_path(self._config.state_directory, name)
        try:
            write_private_file(path, key_pem + chain_pem)
        except OSError as error:
            raise CertificateError(f"{path}: can't be written: {error.strerror}") from None
        logger.info("got a certificate for %s", name)


@dataclass(slots=True)
class _Plan:
    """When to look at a name again (monotonic seconds), and how often its order failed."""

    look_at: float = -math.inf
    failures: int = 0


def renewal_unix(leaf: x509.Certificate) -> float:
    """When a third of a certificate's life is left."""
    start, end = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    return end - (end - start) / 3


def backoff_seconds(failures: int) -> float:
    """How long to wait after the n-th failure in a row: 1 minute, doubling up to 30."""
    return min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 10), _MAX_BACKOFF_SECONDS)


def order_certificate(config: AcmeConfig, hostname: str, key_pem: bytes) -> bytes:
    """The chain in PEM for a host name and key. Blocks for up to some minutes.

    Raises CertificateError.
    """
    import requests
    from acme import client, crypto_util, errors
    from josepy.errors import Error as JoseError
    from josepy.jwa import ES256

    try:
        Path(config.state_directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        account_key = _account_key(account_key_path(config.state_directory))
        network = client.ClientNetwork(
            account_key,
            alg=ES256,
            user_agent="underpass-relay",
            timeout=_REQUEST_TIMEOUT_SECONDS,
        )
        directory = client.ClientV2.get_directory(config.directory_url, network)
        authority = client.ClientV2(directory, network)
        _register(authority, config.email)
        is_ip = is_ip_address(hostname)
        csr_pem = crypto_util.make_csr(
            key_pem,
            domains=[] if is_ip else [hostname],
            ipaddrs=[ipaddress.ip_address(hostname)] if is_ip else [],
        )
        order = authority.new_order(csr_pem, profile=config.profile or None)
        # The library compares with naive local time.
        deadline = datetime.now() + timedelta(seconds=_ORDER_SECONDS)
        with _proven(authority, order.authorizations, config, hostname, account_key):
            order = authority.poll_and_finalize(order, deadline)
        return order.fullchain_pem.encode()
    except errors.ValidationError as error:
        reason = _validation_failures(error.failed_authzrs)
    except errors.TimeoutError:
        reason = f"the order took longer than {_ORDER_SECONDS} s"
    except (errors.Error, JoseError, requests.RequestException, OSError, ValueError) as error:
        reason = str(error) or type(error).__name__
    raise CertificateError(
        f"no certificate for {hostname} from {config.directory_url}: {reason}"
    ) from None


def _account_key(path: Path) -> JWKEC:
    from josepy.jwk import JWKEC

    if not path.exists():
        write_private_file(path, key_to_pem(ec.generate_private_key(ec.SECP256R1())))
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path}: the account's key must be an elliptic curve key")
    return JWKEC(key=key)


def _register(authority: ClientV2, email: str) -> None:
    """Make the account, or find the one that the key already has."""
    from acme import errors, messages

    registration = messages.NewRegistration.from_data(
        email=email or None, terms_of_service_agreed=True
    )
    try:
        authority.new_account(registration)
    except errors.ConflictError as error:
        authority.net.account = messages.RegistrationResource(body=registration, uri=error.location)


@contextmanager
def _proven(
    authority: ClientV2,
    authorizations: list[messages.AuthorizationResource],
    config: AcmeConfig,
    hostname: str,
    account_key: JWKEC,
) -> Iterator[None]:
    """Publish and answer the challenges of all pending authorizations; clean up at the end."""
    from acme import challenges, messages

    published: list[Path] = []
    try:
        for authorization in authorizations:
            if authorization.body.status == messages.STATUS_VALID:
                continue
            challenge = _challenge(authorization, config.challenge)
            token = str(challenge.chall.to_json()["token"])
            proof = challenges.HTTP01.from_json({"type": "http-01", "token": token})
            answer = proof.response(account_key)
            if config.challenge == "http-01":
                path = _publish_for_http(config, token, answer.key_authorization)
            else:
                path = _publish_for_tls(config, hostname, answer.key_authorization)
            published.append(path)
            # The answer is the same empty object for every type of challenge.
            authority.answer_challenge(challenge, answer)
        yield
    finally:
        for path in published:
            path.unlink(missing_ok=True)


def _challenge(
    authorization: messages.AuthorizationResource, wanted: str
) -> messages.ChallengeBody:
    offered = {
        str(challenge.chall.to_json()["type"]): challenge
        for challenge in authorization.body.challenges
    }
    if wanted not in offered:
        raise ValueError(
            f"the authority offers {', '.join(sorted(offered))} and not {wanted}; "
            "change tls.acme.challenge"
        )
    return offered[wanted]


def _publish_for_http(config: AcmeConfig, token: str, key_authorization: str) -> Path:
    path = http_challenge_path(config.state_directory, token)
    if path is None:
        raise ValueError("the authority's challenge has a malformed token")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_private_file(path, key_authorization.encode())
    return path


def _publish_for_tls(config: AcmeConfig, hostname: str, key_authorization: str) -> Path:
    path = tls_challenge_path(config.state_directory)
    write_private_file(path, _tls_challenge_pem(hostname, key_authorization))
    time.sleep(_PUBLISHED_AFTER_SECONDS)
    return path


def _tls_challenge_pem(hostname: str, key_authorization: str) -> bytes:
    """RFC 8737, section 3: one name, and the digest in a critical extension."""
    digest = hashlib.sha256(key_authorization.encode()).digest()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([general_name(hostname)]), critical=False)
        .add_extension(
            # An OCTET STRING of 32 bytes.
            x509.UnrecognizedExtension(_ACME_IDENTIFIER, b"\x04\x20" + digest),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    return key_to_pem(key) + to_pem(certificate)


def _validation_failures(authorizations: list[messages.AuthorizationResource]) -> str:
    return "; ".join(
        f"{authorization.body.identifier.value}: {challenge.error.detail}"
        for authorization in authorizations
        for challenge in authorization.body.challenges
        if challenge.error is not None
    )
