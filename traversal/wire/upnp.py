"""UPnP IGD: the texts of SSDP discovery, device descriptions and SOAP calls.

Text in, text out; whoever fetches them does the I/O. Port mapping specification 6. XML comes from
whatever answers on the local network, so documents are bounded and read by defusedxml, and those
with a DOCTYPE are refused: no gateway needs one, and entities are how small documents become large.

No UPnP library is behind this, but libraries for its parts: defusedxml here, h11 in
`traversal.io.upnp`. Of whole ones, async-upnp-client is well kept, but needs asyncio and aiohttp
even where requests are injected (0.4 s and 28 MB to import: more than a node with a thousand peers
takes), and fetches the description of every service before the first call. miniupnpc blocks a
thread for seconds, on sockets of its own, which no virtual network and no limit on bytes reaches.
upnpclient and UPnPy have not been kept for years.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin, urlsplit, urlunsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from defusedxml import DTDForbidden
from defusedxml.ElementTree import fromstring

from traversal.wire.address import Address, is_private

SSDP_PORT: Final = 1900
SSDP_GROUP: Final = "239.255.255.250"
SEARCH_ALL: Final = "ssdp:all"
SEARCH_GATEWAY: Final = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"

MAX_DOCUMENT_BYTES: Final = 256 * 1024
"""Real descriptions have 2 to 20 KiB."""
MAX_REPLIES: Final = 10
"""SSDP replies worth keeping; a home network has one to three gateways."""
_MAX_SERVICES: Final = 32

SERVICE_TYPES: Final = (
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
    "urn:dslforum-org:service:WANPPPConnection:1",
    "urn:dslforum-org:service:WANIPConnection:1",
)
"""Services that map ports, best first."""

FAULT_INVALID_ARGUMENTS: Final = 402
FAULT_ONLY_PERMANENT_LEASES: Final = 725


class UpnpError(ValueError):
    """A gateway's text is not what UPnP demands, or says nothing that helps us."""


class UpnpFaultError(UpnpError):
    """A SOAP call was refused; `code` is the UPnP error code."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"the gateway refused with UPnP error {code} ({description})")
        self.code = code


@dataclass(frozen=True, slots=True)
class SsdpReply:
    """A gateway that answered the search."""

    location: str
    server: str
    usn: str


@dataclass(frozen=True, slots=True)
class Service:
    """A port-mapping service of a gateway, with the URL to call it at."""

    type: str
    control_url: str


def encode_search(search_target: str) -> bytes:
    """An M-SEARCH datagram, for the group and for the gateway itself."""
    return (
        "M-SEARCH * HTTP/1.1\r\n"
        f"HOST: {SSDP_GROUP}:{SSDP_PORT}\r\n"
        f"ST: {search_target}\r\n"
        'MAN: "ssdp:discover"\r\n'
        "MX: 2\r\n\r\n"
    ).encode()


def parse_ssdp_reply(datagram: bytes) -> SsdpReply:
    """Read one answer to the search, from whatever port it came. Raises UpnpError."""
    text = datagram.decode("latin-1")
    status, _, rest = text.partition("\r\n")
    if not (status.startswith("HTTP/1.") and status.split(" ")[1:2] == ["200"]):
        raise UpnpError("an SSDP reply begins with HTTP/1.1 200")
    if ":InternetGatewayDevice:" not in text:
        raise UpnpError("the SSDP reply is not from an Internet gateway")
    headers: dict[str, str] = {}
    for line in rest.split("\r\n"):
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    if not headers.get("location"):
        raise UpnpError("the SSDP reply has no LOCATION")
    return SsdpReply(headers["location"], headers.get("server", ""), headers.get("usn", ""))


def sort_replies(replies: list[SsdpReply]) -> list[SsdpReply]:
    """By USN, descending (IGD:2 before IGD:1), then location and server; duplicates removed."""
    ordered = sorted(replies, key=lambda reply: (reply.location, reply.server))
    ordered.sort(key=lambda reply: reply.usn, reverse=True)
    unique: dict[tuple[str, str], SsdpReply] = {}
    for reply in ordered:
        unique.setdefault((reply.location, reply.server), reply)
    return list(unique.values())[:MAX_REPLIES]


def description_url(location: str, gateway: ipaddress.IPv4Address) -> str:
    """Where to fetch the description: LOCATION with the gateway's IP for its host.

    Gateways advertise addresses that cannot be reached, and strangers on the network advertise
    addresses that should not be. Raises UpnpError when the host is no literal address.
    """
    try:
        parts = urlsplit(location)
        ipaddress.ip_address(parts.hostname or "")
        port = parts.port or 80
    except ValueError:
        raise UpnpError(f"LOCATION {location!r} names no literal address") from None
    if parts.scheme != "http":
        raise UpnpError(f"LOCATION {location!r} is not an http URL")
    return urlunsplit(("http", f"{gateway}:{port}", parts.path or "/", parts.query, ""))


def _parse_xml(document: bytes) -> ElementTree.Element:
    if len(document) > MAX_DOCUMENT_BYTES:
        raise UpnpError(f"the gateway's document is longer than {MAX_DOCUMENT_BYTES} bytes")
    try:
        root: ElementTree.Element = fromstring(document, forbid_dtd=True)
    except DTDForbidden:
        raise UpnpError("the gateway's document has a DOCTYPE") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UpnpError(f"the gateway's document is not XML: {error}") from None
    return root


def _local_name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text_of(parent: ElementTree.Element, name: str) -> str:
    for child in parent:
        if _local_name(child) == name:
            return (child.text or "").strip()
    return ""


def parse_description(document: bytes, url: str) -> list[Service]:
    """The port-mapping services of a device description fetched from `url`, best type first.

    Control URLs stay on the host of `url`, whatever URLBase says. Raises UpnpError.
    """
    services: list[Service] = []
    for element in _parse_xml(document).iter():
        if _local_name(element) != "service":
            continue
        service_type = _text_of(element, "serviceType")
        if service_type not in SERVICE_TYPES:
            continue
        try:
            target = urlsplit(urljoin(url, _text_of(element, "controlURL")))
            base = urlsplit(url)
        except ValueError:
            continue
        control = urlunsplit((base.scheme, base.netloc, target.path, target.query, ""))
        services.append(Service(service_type, control))
        if len(services) == _MAX_SERVICES:
            break
    return sorted(services, key=lambda service: SERVICE_TYPES.index(service.type))


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """What GetStatusInfo and GetExternalIPAddress said about a service."""

    is_up: bool
    external_ip: ipaddress.IPv4Address | None


def choose_service(candidates: list[tuple[Service, ServiceStatus]]) -> Service | None:
    """The first that is up with a public address, else up with a private one, else up, else the
    first of all (port mapping specification 6.3); None when there is none."""

    def rank(candidate: tuple[Service, ServiceStatus]) -> int:
        status = candidate[1]
        if not status.is_up:
            return 3
        if status.external_ip is None:
            return 2
        return 1 if is_private(status.external_ip) else 0

    return min(candidates, key=rank)[0] if candidates else None


def encode_call(service: Service, action: str, arguments: dict[str, str]) -> tuple[str, bytes]:
    """The SOAPAction header and the body of a POST to `service.control_url`."""
    fields = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in arguments.items())
    body = (
        '<?xml version="1.0"?>\r\n'
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service.type}">{fields}</u:{action}>'
        "</s:Body></s:Envelope>\r\n"
    )
    return f'"{service.type}#{action}"', body.encode()


def parse_call_response(document: bytes) -> dict[str, str]:
    """The result fields. Raises UpnpFaultError when the call was refused, else UpnpError."""
    fields: dict[str, str] = {}
    is_fault = False
    for element in _parse_xml(document).iter():
        name = _local_name(element)
        is_fault = is_fault or name == "Fault"
        fields.setdefault(name, (element.text or "").strip())
    if is_fault:
        code = fields.get("errorCode", "")
        number = int(code) if code.isascii() and code.isdigit() and len(code) < 6 else 0
        raise UpnpFaultError(number, fields.get("errorDescription", "") or "no description")
    return fields


def add_mapping_arguments(
    internal: Address, external_port: int, lease_seconds: int, description: str
) -> dict[str, str]:
    """Arguments of AddPortMapping and AddAnyPortMapping for UDP.

    Raises UpnpError for external port 0, which would forward every port to us.
    """
    if not 1024 <= external_port <= 65535:
        raise UpnpError(f"external port {external_port} is not between 1024 and 65535")
    return {
        "NewRemoteHost": "",
        "NewExternalPort": str(external_port),
        "NewProtocol": "UDP",  # some gateways refuse lower case
        "NewInternalPort": str(internal.port),
        "NewInternalClient": internal.host,
        "NewEnabled": "1",
        "NewPortMappingDescription": description,
        "NewLeaseDuration": str(lease_seconds),
    }


def mapping_arguments(external_port: int) -> dict[str, str]:
    """Arguments of DeletePortMapping and GetSpecificPortMappingEntry: which mapping is meant."""
    return {
        "NewRemoteHost": "",
        "NewExternalPort": str(external_port),
        "NewProtocol": "UDP",
    }


def granted_seconds(fields: dict[str, str], wanted_seconds: int) -> int:
    """The lease that GetSpecificPortMappingEntry tells, `wanted_seconds` where it tells none or a
    longer one; 0 is for ever."""
    text = fields.get("NewLeaseDuration", "")
    told = int(text) if text.isascii() and text.isdigit() else 0
    return min(told, wanted_seconds or told) or wanted_seconds


def external_ip_of(fields: dict[str, str]) -> ipaddress.IPv4Address:
    """The address in GetExternalIPAddress's result. Raises UpnpError when it is unusable."""
    text = fields.get("NewExternalIPAddress", "")
    try:
        ip = ipaddress.IPv4Address(text)
    except ValueError:
        raise UpnpError(f"the gateway's external address {text!r} is no IPv4 address") from None
    if ip.is_unspecified or ip.is_loopback:
        raise UpnpError(f"the gateway has no external address yet (it says {ip})")
    return ip


def is_up(fields: dict[str, str]) -> bool:
    """Whether GetStatusInfo's result says that the connection is up."""
    return fields.get("NewConnectionStatus", "") in ("Connected", "Up")
