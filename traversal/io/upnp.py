"""UPnP's HTTP: fetch a gateway's description, make SOAP calls. Port mapping specification 6.

Every exchange is one connection, one request, at most 256 KiB of answer, at most a second: what is
at the other end is whatever answers on the local network.
"""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

import h11
import trio

from traversal.io.marking import new_socket
from traversal.paths.portmap import RunUpnp
from traversal.wire.address import Address
from traversal.wire.upnp import (
    FAULT_INVALID_ARGUMENTS,
    FAULT_ONLY_PERMANENT_LEASES,
    MAX_DOCUMENT_BYTES,
    SERVICE_TYPES,
    Service,
    ServiceStatus,
    SsdpReply,
    UpnpError,
    UpnpFaultError,
    add_mapping_arguments,
    choose_service,
    description_url,
    encode_call,
    external_ip_of,
    granted_seconds,
    is_up,
    mapping_arguments,
    parse_call_response,
    parse_description,
    sort_replies,
)

REQUEST_SECONDS: Final = 1.0
MAP_SECONDS: Final = 5.0
DESCRIPTION: Final = "underpass"


async def map_port(wanted: RunUpnp, gateway: ipaddress.IPv4Address) -> tuple[Service, Address, int]:
    """Map a port: the service that did it, the external address, the lease in seconds.

    Raises UpnpError, after 5 s at the latest.
    """
    with trio.move_on_after(MAP_SECONDS):
        if wanted.service is not None:
            try:
                return await _map_by(wanted.service, wanted)
            except UpnpError:
                pass  # forgotten after a reboot, perhaps: look for it anew
        service = await _find_service(wanted.replies, gateway)
        return await _map_by(service, wanted)
    raise UpnpError("the gateway did not map a port within 5 s")


async def delete_mapping(service: Service, external_port: int) -> None:
    """Give a port back. Raises UpnpError."""
    await _call(service, "DeletePortMapping", mapping_arguments(external_port))


async def _find_service(replies: tuple[SsdpReply, ...], gateway: ipaddress.IPv4Address) -> Service:
    found: list[Service] = []
    for reply in sort_replies(list(replies)):
        try:
            url = description_url(reply.location, gateway)
            found += parse_description(await _exchange(url, "GET"), url)
        except UpnpError:
            continue
        if found:
            break
    if len(found) > 1:
        found = [service for service in [await _choose(found)] if service is not None]
    if not found:
        raise UpnpError("no gateway describes a service that maps ports")
    return found[0]


async def _choose(services: list[Service]) -> Service | None:
    candidates = []
    for service in services:
        status = ServiceStatus(False, None)
        try:
            if is_up(await _call(service, "GetStatusInfo", {})):
                status = ServiceStatus(True, None)
                status = ServiceStatus(True, await _external_ip(service))
        except UpnpError:
            pass
        candidates.append((service, status))
    return choose_service(candidates)


async def _map_by(service: Service, wanted: RunUpnp) -> tuple[Service, Address, int]:
    lease_seconds = wanted.lease_seconds
    try:
        port = await _add(service, wanted, lease_seconds)
    except UpnpFaultError as error:
        if error.code not in (FAULT_ONLY_PERMANENT_LEASES, FAULT_INVALID_ARGUMENTS):
            raise
        lease_seconds = 0
        port = await _add(service, wanted, lease_seconds)
    external = Address(str(await _external_ip(service)), port)
    return service, external, await _granted(service, port, lease_seconds)


async def _granted(service: Service, port: int, lease_seconds: int) -> int:
    """The lease that the gateway gave: it may be shorter than what was asked for (M7)."""
    try:
        entry = await _call(service, "GetSpecificPortMappingEntry", mapping_arguments(port))
    except UpnpError:
        return lease_seconds
    return granted_seconds(entry, lease_seconds)


async def _add(service: Service, wanted: RunUpnp, lease_seconds: int) -> int:
    arguments = add_mapping_arguments(
        wanted.internal, wanted.external_port, lease_seconds, DESCRIPTION
    )
    if service.type == SERVICE_TYPES[0]:
        fields = await _call(service, "AddAnyPortMapping", arguments)
        reserved = fields.get("NewReservedPort", "")
        is_number = reserved.isascii() and reserved.isdigit() and len(reserved) <= 5
        if is_number and 0 < int(reserved) <= 65535:
            return int(reserved)
        raise UpnpError(f"the gateway reserved port {reserved[:20]!r}, which is none")
    await _call(service, "AddPortMapping", arguments)
    return wanted.external_port


async def _external_ip(service: Service) -> ipaddress.IPv4Address:
    return external_ip_of(await _call(service, "GetExternalIPAddress", {}))


async def _call(service: Service, action: str, arguments: dict[str, str]) -> dict[str, str]:
    header, body = encode_call(service, action, arguments)
    headers = [("SOAPAction", header), ("Content-Type", 'text/xml; charset="utf-8"')]
    document = await _exchange(service.control_url, "POST", headers, body)
    return parse_call_response(document)


async def _exchange(
    url: str, method: str, headers: list[tuple[str, str]] | None = None, body: bytes = b""
) -> bytes:
    """The answer's body, whatever its status: faults come with status 500. Raises UpnpError."""
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    connection = h11.Connection(h11.CLIENT)
    try:
        request = h11.Request(
            method=method,
            target=target,
            headers=[
                ("Host", parts.netloc),
                ("Connection", "close"),
                ("Content-Length", str(len(body))),
                *(headers or []),
            ],
        )
    except (h11.LocalProtocolError, UnicodeEncodeError):
        # Path and query are what somebody on the network advertised.
        raise UpnpError(f"{url!r} is no URL that can be asked for") from None
    data = connection.send(request) or b""
    data += (connection.send(h11.Data(data=body)) or b"") if body else b""
    data += connection.send(h11.EndOfMessage()) or b""
    with trio.move_on_after(REQUEST_SECONDS):
        try:
            sock = new_socket()
            with sock:
                await sock.connect((parts.hostname or "", parts.port or 80))
                while data:
                    data = data[await sock.send(data) :]
                return await _receive_body(sock, connection)
        except (OSError, h11.RemoteProtocolError) as error:
            raise UpnpError(f"no answer from {parts.netloc}: {error}") from None
    raise UpnpError(f"no answer from {parts.netloc} within a second")


async def _receive_body(sock: trio.socket.SocketType, connection: h11.Connection) -> bytes:
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await sock.recv(1 << 16))
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_DOCUMENT_BYTES:
                raise UpnpError(f"the gateway's answer is longer than {MAX_DOCUMENT_BYTES} bytes")
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return body
