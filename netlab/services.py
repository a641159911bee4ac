"""What the lab's own servers offer: STUN, a tiny relay, DNS for the lab's names, echo.

They run as Trio tasks inside their server on either back end. The relay is netlab's own, for the
example node; real relays run as programs. Its datagrams are text lines:

    HELLO name            -> WELCOME          the sender is called this from now on
    TO name\\npayload      -> FROM sender\\npayload, at the other name's last address
"""

from __future__ import annotations

import dns.exception
import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
import trio

from netlab.labs import Lab
from netlab.probe import ProbeServers, serve_probe
from netlab.scenario import Service, ServiceKind
from netlab.stun import Request, Response, StunError, parse

STUN_PORTS = (3478, 3479)
RELAY_PORT = 3480
ECHO_PORT = 7
DNS_PORT = 53

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
                await _serve_dns(lab, addresses[0], task_status=task_status)
            case ServiceKind.ECHO:
                await _serve_echo(addresses[0], task_status=task_status)


async def _bind(address: str, port: int) -> trio.socket.SocketType:
    sock = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
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
    """Answer A and AAAA questions about the lab's machines; everything else doesn't exist."""
    names = {name.lower() for name in (*lab.topology.host_by_name, *lab.topology.server_by_name)}
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
                if name not in names:
                    response.set_rcode(dns.rcode.NXDOMAIN)
                    continue
                wants_ipv6 = question.rdtype == dns.rdatatype.AAAA
                kind = "AAAA" if wants_ipv6 else "A"
                found = [a for a in lab.host(name).addresses if (":" in a) == wants_ipv6]
                if found and question.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA):
                    response.answer.append(
                        dns.rrset.from_text(question.name, 5, "IN", kind, *found)
                    )
            await _send(sock, response.to_wire(), source)


async def _send(sock: trio.socket.SocketType, data: bytes, target: tuple[str, int]) -> None:
    try:
        await sock.sendto(data, target)
    except OSError:
        pass  # whoever asked has no way back any more, and UDP promises nothing
