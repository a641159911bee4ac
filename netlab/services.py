"""What the lab's own servers offer: STUN, a tiny relay, DNS for the lab's names, echo.

They run as Trio tasks inside their server on either back end. The relay is netlab's own, for the
example node; real relays run as programs. Its datagrams are text lines:

    HELLO name            -> WELCOME          the sender is called this from now on
    TO name\\npayload      -> FROM sender\\npayload, at the other name's last address
"""

from __future__ import annotations

from ipaddress import ip_address

import dns.exception
import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
import trio

from netlab.dns64 import IPV4_ONLY, IPV4_ONLY_NAME, synthesize
from netlab.drops import Address, address_text
from netlab.labs import Lab
from netlab.probe import ProbeServers, serve_probe
from netlab.scenario import Service, ServiceKind
from netlab.stun import Request, Response, StunError, parse

STUN_PORTS = (3478, 3479)
RELAY_PORT = 3480
ECHO_PORT = 7
DNS_PORT = 53

# Record type -> size of an address and the type's name.
_RECORDS = {dns.rdatatype.A: (4, "A"), dns.rdatatype.AAAA: (16, "AAAA")}

# A lab has at most some thousand nodes; a program gone wild shall not fill the memory.
_MAX_RELAY_NAMES = 10_000
_MAX_DATAGRAM_BYTES = 65_535


async def run_service(
    lab: Lab, service: Service, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Offer a service until cancelled."""
    host = lab.host(service.server)
    addresses = tuple(address for address in host.addresses if ":" not in address)
    async with host:
        match service.kind:
            case ServiceKind.STUN if len(addresses) >= 3:
                one, two, three = addresses[:3]
                servers = ProbeServers(addresses=(one, two, three), ports=STUN_PORTS)
                await serve_probe(servers, task_status=task_status)
            case ServiceKind.STUN:
                async with trio.open_nursery() as nursery:
                    for port in STUN_PORTS:
                        await nursery.start(_serve_stun, addresses[0], port)
                    task_status.started()
            case ServiceKind.RELAY:
                await _serve_relay(addresses[0], task_status=task_status)
            case ServiceKind.DNS:
                async with trio.open_nursery() as nursery:
                    for address in host.addresses:
                        await nursery.start(_serve_dns, lab, address)
                    task_status.started()
            case ServiceKind.ECHO:
                await _serve_echo(addresses[0], task_status=task_status)


async def _bind(address: str, port: int) -> trio.socket.SocketType:
    family = trio.socket.AF_INET6 if ":" in address else trio.socket.AF_INET
    sock = trio.socket.socket(family, trio.socket.SOCK_DGRAM)
    try:
        await sock.bind((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


async def _serve_stun(
    address: str, port: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with await _bind(address, port) as sock:
        task_status.started()
        while True:
            data, source = await sock.recvfrom(_MAX_DATAGRAM_BYTES)
            try:
                request = parse(data)
            except StunError:
                continue
            if isinstance(request, Request):
                answer = Response(
                    transaction=request.transaction, address=source[0], port=source[1]
                )
                await _send(sock, answer.encode(), source)


async def _serve_relay(address: str, *, task_status: trio.TaskStatus[None]) -> None:
    addresses: dict[bytes, tuple[str, int]] = {}
    names: dict[tuple[str, int], bytes] = {}
    with await _bind(address, RELAY_PORT) as sock:
        task_status.started()
        while True:
            data, source = await sock.recvfrom(_MAX_DATAGRAM_BYTES)
            head, _, payload = data.partition(b"\n")
            verb, _, name = head.partition(b" ")
            if verb == b"HELLO" and (name in addresses or len(addresses) < _MAX_RELAY_NAMES):
                names.pop(addresses.get(name, ("", 0)), None)
                addresses[name] = source
                names[source] = name
                await _send(sock, b"WELCOME", source)
            elif verb == b"TO" and source in names and name in addresses:
                await _send(sock, b"FROM %b\n%b" % (names[source], payload), addresses[name])


async def _serve_echo(address: str, *, task_status: trio.TaskStatus[None]) -> None:
    with await _bind(address, ECHO_PORT) as sock:
        task_status.started()
        while True:
            data, source = await sock.recvfrom(_MAX_DATAGRAM_BYTES)
            await _send(sock, data, source)


async def _serve_dns(lab: Lab, address: str, *, task_status: trio.TaskStatus[None]) -> None:
    """Answer A and AAAA questions about the lab's machines; everything else doesn't exist.

    Who asks from behind a NAT64 gets synthesized AAAA records (RFC 6147).
    """
    with await _bind(address, DNS_PORT) as sock:
        task_status.started()
        while True:
            data, source = await sock.recvfrom(_MAX_DATAGRAM_BYTES)
            try:
                query = dns.message.from_wire(data)
                response = dns.message.make_response(query)
            except dns.exception.DNSException:
                continue
            response.flags |= dns.flags.AA
            for question in query.question:
                name = question.name.to_text(omit_final_dot=True).lower()
                known = _addresses_of(lab, name)
                if known is None:
                    response.set_rcode(dns.rcode.NXDOMAIN)
                    continue
                size, kind = _RECORDS.get(question.rdtype, (0, ""))
                if size == 16 and _is_behind_nat64(lab, source[0]):
                    known = synthesize(known)
                found = [address_text(one) for one in known if len(one) == size]
                if found:
                    response.answer.append(
                        dns.rrset.from_text(question.name, 5, "IN", kind, *found)
                    )
            await _send(sock, response.to_wire(), source)


def _addresses_of(lab: Lab, name: str) -> tuple[Address, ...] | None:
    if name == IPV4_ONLY_NAME:
        return IPV4_ONLY
    for machine in (*lab.topology.host_by_name, *lab.topology.server_by_name):
        if machine.lower() == name:
            return tuple(ip_address(address).packed for address in lab.host(machine).addresses)
    return None


def _is_behind_nat64(lab: Lab, source: str) -> bool:
    """Whether a question came from a network with a NAT64, by IPv6 or through it."""
    address = ip_address(source)
    for nat in lab.topology.nats:
        if nat.behavior.nat64:
            inside = lab.addresses.nats[nat.name].inside_ipv6
            if address in lab.external(nat.name) or (inside is not None and address in inside):
                return True
    return False


async def _send(sock: trio.socket.SocketType, data: bytes, target: tuple[str, int]) -> None:
    try:
        await sock.sendto(data, target)
    except OSError:
        pass  # whoever asked has no way back any more, and UDP promises nothing
