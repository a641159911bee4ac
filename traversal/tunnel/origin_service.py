"""What a connector does with a request: find the rule, then the origin. The same over both
transports."""

from __future__ import annotations

import logging
import ssl
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import trio

from traversal.tunnel.exchange import ExchangeEndedError, Headers, Incoming
from traversal.tunnel.ingress import Ingress, Rule, normalized_host
from traversal.tunnel.origin_http import (
    OriginAddress,
    OriginError,
    OriginLimits,
    OriginPool,
    OriginRequest,
    serve_http,
    serve_websocket,
)
from traversal.tunnel.origin_http2 import serve_http2
from traversal.tunnel.origin_options import OriginOptions
from traversal.tunnel.origin_tcp import serve_bastion, serve_socks, serve_tcp
from traversal.tunnel.services import (
    BastionService,
    HelloService,
    HttpService,
    SocksService,
    StatusService,
    TcpService,
    parse_place,
)
from traversal.tunnel.udp_flows import UdpFlows
from traversal.wire.tunnel.configuration import Configuration, parse_configuration
from traversal.wire.tunnel.errors import TunnelError

logger = logging.getLogger("underpass.tunnel.service")

LOCAL_VERSION: Final = -1
"""Of a configuration that no edge pushed."""
WARP_CONNECT_SECONDS: Final = 5.0
LOG_SECONDS: Final = 5.0
"""Least time between two lines about one origin that fails."""
_JUMP: Final = b"cf-access-jump-destination"
_HELLO: Final = b"""<!doctype html><title>Underpass</title>
<h1>It works</h1><p>This page comes from an Underpass connector.</p>
"""


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """Counters since the start."""

    requests: int
    active: int
    errors: int
    """Requests that the connector had to answer with 502 itself."""
    by_status: dict[int, int]
    tcp_sessions: int


class OriginService:
    """Serves the exchanges of all connections of a connector.

    Args:
        is_private_open: whether the edge may have us connect to any address that it names
            (private-network TCP); it may anyway once it has pushed a configuration, which could say
            the same.

    Raises TunnelError for a configuration that can't be used.
    """

    def __init__(
        self,
        configuration: Configuration,
        udp: UdpFlows | None = None,
        *,
        is_private_open: bool = True,
    ) -> None:
        self._is_private_open = is_private_open
        self.udp = udp
        self.configuration = configuration
        self.version = LOCAL_VERSION
        self._ingress = Ingress.of(configuration)
        self._pool = OriginPool()
        self._contexts: dict[tuple[str, bool, bool], Callable[[], ssl.SSLContext]] = {}
        self._requests = self._active = self._errors = self._tcp_sessions = 0
        self._by_status: Counter[int] = Counter()
        self._logged_at: dict[str, float] = {}

    def statistics(self) -> ServiceStatistics:
        """A snapshot."""
        return ServiceStatistics(
            self._requests, self._active, self._errors, dict(self._by_status), self._tcp_sessions
        )

    def close(self) -> None:
        """Close the connections to origins that wait for requests."""
        self._pool.close()

    def update_configuration(self, version: int, document: bytes) -> tuple[int, str]:
        """Use a pushed configuration (JSON), if it is newer: the version in use now, and what is
        wrong with this one, empty if nothing is. Requests under way go on with the old one."""
        if version <= self.version:
            return self.version, ""
        try:
            configuration = parse_configuration(document)
            ingress = Ingress.of(configuration)
        except TunnelError as error:
            logger.warning("The edge pushed a configuration that can't be used: %s", error)
            return self.version, str(error)
        self.configuration, self._ingress, self.version = configuration, ingress, version
        logger.info("The edge pushed version %d of the configuration.", version)
        return version, ""

    async def serve(self, incoming: Incoming) -> None:
        """Serve one exchange to its end; raises nothing but Cancelled."""
        self._requests += 1
        self._active += 1
        counted = _Counted(incoming, self._by_status)
        try:
            await self._serve(counted)
        except OriginError as error:
            self._errors += 1
            self._note_failure(str(error))
            await _refuse(counted)
        except ExchangeEndedError:
            pass
        except Exception:
            # One exchange must not end the connector, whatever a library did not foresee.
            self._errors += 1
            logger.exception("A request for %s failed.", incoming.head.authority)
            await _refuse(counted)
        finally:
            self._active -= 1

    async def _serve(self, incoming: _Counted) -> None:
        head = incoming.head
        if head.kind == "tcp":
            if not self._is_private_open and self.version == LOCAL_VERSION:
                raise OriginError(f"{head.authority}: this connector takes no private connections")
            self._tcp_sessions += 1
            seconds = self.configuration.warp_routing.connect_timeout or WARP_CONNECT_SECONDS
            await serve_tcp(incoming, _place(head.authority, 0), OriginLimits(connect=seconds))
            return
        rule = self._ingress.match(head.authority, head.path)
        options = rule.options
        limits = OriginLimits(
            options.connect_timeout,
            options.tls_timeout,
            options.keep_alive_timeout,
            options.keep_alive_connections,
            options.tcp_keep_alive,
        )
        match rule.service:
            case StatusService(status):
                await incoming.respond(status, is_from_connector=True)
                await incoming.send_end()
            case HelloService():
                headers = ((b"content-type", b"text/html; charset=utf-8"),)
                await incoming.respond(200, headers, is_from_connector=True)
                await incoming.send(_HELLO)
                await incoming.send_end()
            case TcpService(host, port):
                self._tcp_sessions += 1
                await serve_tcp(incoming, OriginAddress(host, port), limits)
            case SocksService():
                self._tcp_sessions += 1
                await serve_socks(incoming, options.allows, limits)
            case BastionService():
                self._tcp_sessions += 1
                wanted = next((v for n, v in head.headers if n == _JUMP), b"").decode("latin-1")
                place = _place(wanted.partition("://")[2] or wanted, 22)
                await serve_bastion(incoming, place.host, place.port, options.allows, limits)
            case HttpService() as service:
                address = self._address(service, rule, head.authority)
                request = _request(incoming, service, options)
                if head.kind == "websocket":
                    await serve_websocket(incoming, request, address, limits)
                elif options.is_http2 and service.is_tls:
                    await serve_http2(incoming, request, address, limits)
                else:
                    await serve_http(incoming, request, address, limits, self._pool)

    def _address(self, service: HttpService, rule: Rule, authority: str) -> OriginAddress:
        options = rule.options
        if not service.is_tls:
            return OriginAddress(service.host, service.port, service.path)
        name = options.server_name or service.host
        if options.is_sni_of_request:
            name = normalized_host(authority)
        key = options.ca_pool, options.is_verified, options.is_http2
        if key not in self._contexts:
            self._contexts[key] = _context_maker(*key)
        return OriginAddress(
            service.host, service.port, service.path, self._contexts[key], server_name=name
        )

    def _note_failure(self, text: str) -> None:
        now = trio.current_time()
        origin = text.partition(": ")[0]
        if now - self._logged_at.get(origin, -LOG_SECONDS) >= LOG_SECONDS:
            if len(self._logged_at) > 1000:
                self._logged_at.clear()
            self._logged_at[origin] = now
            logger.warning("A request failed: %s", text)


class _Counted(Incoming):
    """An exchange whose answer is noted."""

    def __init__(self, inner: Incoming, by_status: Counter[int]) -> None:
        self.head = inner.head
        self.has_answered = False
        self._inner = inner
        self._by_status = by_status

    @property
    def trailers(self) -> Headers:  # type: ignore[override] # read only here
        """Of the request."""
        return self._inner.trailers

    def cancel_when_unwanted(self, scope: trio.CancelScope) -> None:
        self._inner.cancel_when_unwanted(scope)

    async def receive(self) -> bytes:
        return await self._inner.receive()

    async def respond(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        is_from_connector: bool = False,
    ) -> None:
        self.has_answered = True
        self._by_status[status] += 1
        await self._inner.respond(status, headers, is_from_connector=is_from_connector)

    async def send(self, data: bytes) -> None:
        await self._inner.send(data)

    async def send_end(self, trailers: Headers = ()) -> None:
        await self._inner.send_end(trailers)

    def reset(self) -> None:
        self._inner.reset()


async def _refuse(incoming: _Counted) -> None:
    """Answer for an origin that can't. What it is called is nothing for visitors."""
    if incoming.has_answered:
        incoming.reset()
        return
    try:
        headers = ((b"content-type", b"text/plain; charset=utf-8"),)
        await incoming.respond(502, headers, is_from_connector=True)
        await incoming.send(b"The connector could not reach the origin.\n")
        await incoming.send_end()
    except ExchangeEndedError:
        pass


def _request(incoming: Incoming, service: HttpService, options: OriginOptions) -> OriginRequest:
    head = incoming.head
    headers = head.headers
    host = head.authority
    if options.host_header:
        headers = (*headers, (b"x-forwarded-host", host.encode("latin-1")))
        host = options.host_header
    return OriginRequest(
        head.method, head.path, host, headers, is_chunked_allowed=options.is_chunked_allowed
    )


def _place(text: str, default_port: int) -> OriginAddress:
    """Raises OriginError."""
    try:
        host, port = parse_place(text.partition("/")[0])
    except TunnelError as error:
        raise OriginError(str(error).removeprefix("service: ")) from None
    if not port and not default_port:
        raise OriginError(f"{text!r} has no port")
    return OriginAddress(host, port or default_port)


def _context_maker(
    ca_pool: str, is_verified: bool, offers_http2: bool
) -> Callable[[], ssl.SSLContext]:
    made: ssl.SSLContext | None = None

    def make() -> ssl.SSLContext:
        nonlocal made
        if made is None:
            context = ssl.create_default_context()
            if ca_pool:
                try:
                    context.load_verify_locations(ca_pool)
                except (OSError, ssl.SSLError) as error:
                    raise OriginError(f"caPool {ca_pool}: {error}") from None
            if offers_http2:
                context.set_alpn_protocols(["h2", "http/1.1"])
            if not is_verified:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            made = context
        return made

    return make
