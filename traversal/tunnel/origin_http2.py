"""HTTP/2 towards origins that want it (`http2Origin`): for gRPC above all, which needs trailers.

A connection serves one request: an origin is near, and its TLS handshake costs less than what a
pool of shared connections could get wrong.
"""

from __future__ import annotations

from typing import Final

import trio

from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Error, Http2Limits
from traversal.io.http2_stream import Headers, Http2Stream, header
from traversal.io.stream import HandshakeStream
from traversal.tunnel.exchange import ExchangeEndedError, Incoming
from traversal.tunnel.origin_http import (
    OriginAddress,
    OriginError,
    OriginLimits,
    OriginRequest,
    connect_origin,
    serve_http_on,
)

_LIMITS: Final = Http2Limits(streams=0, header_bytes=128 << 10)
_NOT_IN_HTTP2: Final = frozenset(
    b"connection keep-alive proxy-connection transfer-encoding upgrade host expect".split()
)
"""RFC 9113 8.2.2."""


async def serve_http2(
    incoming: Incoming, request: OriginRequest, address: OriginAddress, limits: OriginLimits
) -> None:
    """Carry a request to the origin and its response back, by HTTP/1.1 if the origin does not
    choose HTTP/2 in its TLS handshake.

    Raises OriginError, and ExchangeEndedError when the edge gave up.
    """
    stream = await connect_origin(address, limits)
    try:
        if stream.selected_protocol == "h2":
            await _serve(incoming, request, stream)
        else:
            await serve_http_on(incoming, request, stream)
    finally:
        stream.close()


async def _serve(incoming: Incoming, request: OriginRequest, below: HandshakeStream) -> None:
    failure: OriginError | ExchangeEndedError | None = None
    http2 = Http2Connection(below, client_side=True, limits=_LIMITS)
    async with trio.open_nursery() as nursery:
        await nursery.start(http2.run)
        try:
            headers = _request_headers(request)
            async with await http2.open(headers, end_stream=not incoming.head.has_body) as stream:
                if incoming.head.has_body:
                    nursery.start_soon(_send_body, incoming, stream)
                await _receive_response(incoming, stream)
        except Http2Error as error:
            failure = OriginError(f"the origin's HTTP/2: {error}")
        except (OriginError, ExchangeEndedError) as error:
            failure = error
        http2.close()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _send_body(incoming: Incoming, stream: Http2Stream) -> None:
    try:
        while data := await incoming.receive():
            await stream.send(data)
        await stream.send_end(list(incoming.trailers) or None)
    except Http2Error:
        return  # it may have answered before it stopped reading; who receives knows
    except ExchangeEndedError:
        stream.reset()  # which the one who receives notices, too


async def _receive_response(incoming: Incoming, stream: Http2Stream) -> None:
    response = await stream.response()
    status = header(response, b":status") or b""
    if len(status) != 3 or not status.isdigit():
        raise OriginError(f"the origin answered with status {status!r}")
    await incoming.respond(int(status), [h for h in response if not h[0].startswith(b":")])
    while data := await stream.receive():
        await incoming.send(data)
    await incoming.send_end(tuple(stream.trailers or ()))


def _request_headers(request: OriginRequest) -> Headers:
    return [
        (b":method", request.method.encode("ascii", "replace")),
        (b":scheme", b"https"),
        (b":authority", request.host.encode("ascii", "replace")),
        (b":path", request.path.encode("latin-1", "replace")),
        *(h for h in request.headers if h[0] not in _NOT_IN_HTTP2),
    ]
