"""From a visitor's request to a connector's response: route, bound, send, try again, pass back.

Both directions run at the same time for as long as either has something to say. What one side does
not take is not read from the other, so memory is bounded by the transports' windows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import trio

from relay.edge.connection import (
    ConnectionFailedError,
    Exchange,
    Headers,
    RequestHead,
    TunnelConnection,
)
from relay.edge.hygiene import (
    HygienePolicy,
    RequestRefusedError,
    ResponseRefusedError,
    clean_request,
    clean_response,
    clean_trailers,
    normal_host,
    websocket_response,
)
from relay.edge.limits import Meter, TooMuchError, TunnelTraffic, charge
from relay.edge.quick import QuickRefusedError, QuickTunnels
from relay.edge.registry import Registry
from relay.edge.retries import ReplayableBody, may_retry
from relay.edge.routes import RoutingTable
from relay.edge.visit import Visit, VisitorGoneError
from relay.edge.visitor_stages import VisitorStage
from relay.refusals import Refusals

CONNECTOR_WAIT_SECONDS: Final = 20.0
"""How long a request waits for a connector to come back: cloudflared took 17 s after an outage of
the edge (specification 11)."""
OUTAGE_SECONDS: Final = 60.0
"""A tunnel that had no connector for so long has none; its visitors learn so at once."""
STREAM_WAIT_SECONDS: Final = 20.0
"""How long a request waits for one of a connection's streams, when its connector has as many open
as it takes: over HTTP/2 a cloudflared may allow 250."""
STALL_SECONDS: Final = 120.0
"""A visitor that takes nothing for so long is cut off; nginx gives 60."""
WEBSOCKET_LINGER_SECONDS: Final = 10.0
"""How long the origin may go on sending when the visitor has closed its direction."""


TEXT: Final = b"text/plain; charset=utf-8"


class GatewayError(Exception):
    """The edge or a connector could not do it; `status` is what the visitor gets."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@contextmanager
def in_time_for_a_stream() -> Iterator[None]:
    """Raises GatewayError where opening a stream takes longer than `STREAM_WAIT_SECONDS`."""
    with trio.move_on_after(STREAM_WAIT_SECONDS) as waiting:
        yield
    if waiting.cancelled_caught:
        raise GatewayError(503, "the connector has as many requests under way as it takes")


@dataclass(frozen=True, slots=True)
class _Request:
    """A request on its way, and what is counted for it."""

    visit: Visit
    head: RequestHead
    body: ReplayableBody
    ray: str
    traffic: TunnelTraffic


class Finder:
    """Finds the connection that a request goes to, and waits for one after an outage.

    Attributes:
        is_leaving: the edge is about to stop, so that waiting is in vain.
    """

    def __init__(self, registry: Registry) -> None:
        self.is_leaving = False
        self._registry = registry
        self._started = trio.current_time()
        self._seen: dict[UUID, float] = {}

    def maybe_find(
        self, tunnel: UUID, tried: Collection[TunnelConnection] = ()
    ) -> TunnelConnection | None:
        """A usable connection, one that was not tried yet if there is one; None if there is
        none."""
        found = self._registry.pick(tunnel, tried) or self._registry.pick(tunnel)
        if found is not None:
            self._seen[tunnel] = trio.current_time()
        return found

    async def find(self, tunnel: UUID) -> TunnelConnection:
        """A usable connection; waits for one after an outage. Raises GatewayError."""
        found = self.maybe_find(tunnel)
        if found is None and self.is_leaving:
            raise GatewayError(503, "this edge is about to stop")
        left = self._seen.get(tunnel, self._started) + OUTAGE_SECONDS - trio.current_time()
        with trio.move_on_after(max(0.0, min(left, CONNECTOR_WAIT_SECONDS))):
            while found is None and self._registry.tunnel(tunnel) is not None:
                await self._registry.wait_usable(tunnel)
                found = self.maybe_find(tunnel)
        if found is None:
            raise GatewayError(503, "no connector of this tunnel is connected")
        return found

    def forget(self, tunnel: UUID) -> None:
        """A tunnel that is no longer known."""
        self._seen.pop(tunnel, None)


class Proxy:
    """Answers visitors' requests.

    Args:
        table: gives the routes as they are now.
        policy: gives the rules for headers as they are now.
        quick: the tunnels without an account.
    """

    def __init__(
        self,
        finder: Finder,
        meter: Meter,
        refusals: Refusals[VisitorStage],
        *,
        table: Callable[[], RoutingTable],
        policy: Callable[[], HygienePolicy],
        quick: QuickTunnels,
        randomness: random.Random,
    ) -> None:
        self._quick = quick
        self._finder = finder
        self._meter = meter
        self._refusals = refusals
        self._table = table
        self._policy = policy
        self._randomness = randomness

    async def serve(self, visit: Visit) -> None:
        """Answer one request. Raises nothing but Cancelled."""
        ray = f"{self._randomness.getrandbits(64):016x}"
        try:
            try:
                await self._serve(visit, ray)
            except (RequestRefusedError, TooMuchError, GatewayError, QuickRefusedError) as error:
                stage = VisitorStage.REQUEST if error.status < 500 else VisitorStage.TUNNEL
                self._refusals.note(stage, visit.visitor.address, str(error), trio.current_time())
                await self._answer(visit, ray, error.status, f"{error}\n".encode())
        except VisitorGoneError:
            visit.abort()

    async def _serve(self, visit: Visit, ray: str) -> None:
        head = clean_request(visit.raw, visit.visitor, ray, self._policy(), has_body=visit.has_body)
        host = normal_host(head.authority) or ""
        if self._quick.is_api(head.method, host, head.path):
            answer = self._quick.create(visit.visitor.address, trio.current_time())
            await self._answer(visit, ray, 200, answer, b"application/json")
            return
        route = self._table().find_http(host, head.path)
        tunnel = self._quick.find(host) if route is None else route.tunnel
        if tunnel is None:
            raise RequestRefusedError(404, "nothing is published under this host and path")
        source = visit.visitor.address
        traffic = self._meter.enter(tunnel, source, trio.current_time())
        try:
            body = ReplayableBody(visit.receive)
            await self._pass_on(_Request(visit, head, body, ray, traffic), tunnel)
        except GatewayError as error:
            traffic.errors += 1
            traffic.by_status[error.status] += 1
            raise
        finally:
            self._meter.leave(traffic, source)

    async def _pass_on(self, request: _Request, tunnel: UUID) -> None:
        """Until a connection has answered. Raises GatewayError and VisitorGoneError."""
        head = request.head
        tried: list[TunnelConnection] = []
        while True:
            connection = await self._find(request, tunnel, tried)
            tried.append(connection)
            failure = await self._attempt(request, connection)
            if failure is None:
                return
            if request.visit.has_responded:
                request.traffic.errors += 1
                request.visit.abort()
                return
            if not may_retry(
                head.method,
                attempts=len(tried),
                is_unprocessed=failure.is_unprocessed,
                has_whole_body=request.body.is_whole,
                is_websocket=head.kind == "websocket",
            ):
                raise GatewayError(502, f"the connection to the connector failed: {failure}")
            request.traffic.retries += 1
            request.body.rewind()

    async def _find(
        self, request: _Request, tunnel: UUID, tried: list[TunnelConnection]
    ) -> TunnelConnection:
        """A connection; raises GatewayError, and VisitorGoneError where waiting is in vain."""
        found = self._finder.maybe_find(tunnel, tried)
        if found is not None:
            return found
        problem: Exception = VisitorGoneError("it left while no connector was connected")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_leave_when_gone, request.visit, nursery.cancel_scope)
            try:
                found = await self._finder.find(tunnel)
            except GatewayError as error:
                problem = error
            nursery.cancel_scope.cancel()
        if found is None:
            raise problem
        return found

    async def _attempt(
        self, request: _Request, connection: TunnelConnection
    ) -> ConnectionFailedError | None:
        """Send the request over this connection. Returns its failure; then, as long as nothing was
        responded, another one may be tried."""
        is_done = False
        problem: ConnectionFailedError | GatewayError | None = None
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope
            if request.head.kind == "http":
                nursery.start_soon(_leave_when_gone, request.visit, scope)
            try:
                with in_time_for_a_stream():
                    exchange = await connection.request(request.head)
                async with exchange:
                    if request.head.kind == "http":
                        if request.head.has_body:
                            nursery.start_soon(self._upload, request, exchange, scope)
                        await self._download(request, exchange)
                    else:
                        await self._websocket(request, exchange, nursery)
                is_done = True
            except VisitorGoneError:
                pass
            except (ConnectionFailedError, GatewayError) as error:
                problem = error
            except ResponseRefusedError as error:
                problem = GatewayError(502, f"the origin's response is malformed: {error}")
            scope.cancel()
        if isinstance(problem, GatewayError):
            raise problem
        if not is_done and problem is None:
            raise VisitorGoneError("it left before the response was complete")
        return problem

    async def _download(self, request: _Request, exchange: Exchange) -> None:
        response = await exchange.response()
        request.body.stop_keeping()
        if response.status < 200:
            raise ResponseRefusedError(f"its status is {response.status}")
        await self._respond(
            request, response.status, clean_response(response.status, response.headers)
        )
        if response.is_from_connector:
            request.traffic.errors += 1
        await self._pass_back(request, exchange)

    async def _websocket(
        self, request: _Request, exchange: Exchange, nursery: trio.Nursery
    ) -> None:
        visit = request.visit
        response = await exchange.response()
        if response.status != 101:
            await self._download(request, exchange)
            return
        headers = clean_response(200, response.headers)
        version = visit.raw.version
        await self._respond(
            request, 200 if version == "2" else 101, websocket_response(headers, version)
        )
        request.body.stop_keeping()
        nursery.start_soon(self._upload, request, exchange, nursery.cancel_scope)
        await self._pass_back(request, exchange)

    async def _respond(self, request: _Request, status: int, headers: Headers) -> None:
        request.traffic.by_status[status] += 1
        with _in_time():
            await request.visit.respond(status, (*headers, (b"cf-ray", request.ray.encode())))

    async def _pass_back(self, request: _Request, exchange: Exchange) -> None:
        visit = request.visit
        with _in_time() as patience:
            patience.deadline = math.inf
            while data := await exchange.receive():
                patience.deadline = trio.current_time() + STALL_SECONDS
                await visit.send(data)
                patience.deadline = math.inf
                delay = charge(request.traffic, len(data), trio.current_time(), inward=False)
                if delay:
                    await trio.sleep(delay)
            patience.deadline = trio.current_time() + STALL_SECONDS
            await visit.send_end(clean_trailers(exchange.trailers))

    async def _upload(self, request: _Request, exchange: Exchange, scope: trio.CancelScope) -> None:
        """The visitor's body to the origin. A visitor that leaves ends the whole exchange."""
        try:
            while data := await request.body.receive():
                await exchange.send(data)
                delay = charge(request.traffic, len(data), trio.current_time(), inward=True)
                if delay:
                    await trio.sleep(delay)
            await exchange.send_end(clean_trailers(request.visit.trailers))
        except ConnectionFailedError:
            return  # an origin may answer without reading; else `response` says what happened
        except VisitorGoneError:
            scope.cancel()
            return
        if request.head.kind == "websocket":
            await trio.sleep(WEBSOCKET_LINGER_SECONDS)
            scope.cancel()

    async def _answer(
        self, visit: Visit, ray: str, status: int, body: bytes, kind: bytes = TEXT
    ) -> None:
        """An answer of the edge's own. Raises VisitorGoneError."""
        if visit.has_responded:
            visit.abort()
            return
        headers = [
            (b"content-type", kind),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"cf-ray", ray.encode()),
        ]
        if status in (429, 503):
            headers.append((b"retry-after", b"5"))
        with _in_time():
            await visit.respond(status, tuple(headers))
            if visit.raw.method != b"HEAD":
                await visit.send(body)
            await visit.send_end()


@contextmanager
def _in_time() -> Iterator[trio.CancelScope]:
    """Raises VisitorGoneError where a send takes longer than `STALL_SECONDS`; for the next one move
    the deadline."""
    with trio.move_on_after(STALL_SECONDS) as timeout:
        yield timeout
    if timeout.cancelled_caught:
        raise VisitorGoneError("it read nothing for too long")


async def _leave_when_gone(visit: Visit, scope: trio.CancelScope) -> None:
    await visit.gone()
    scope.cancel()
