"""UPnP calls against a gateway in a few lines: descriptions, faults, leases, silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address

import pytest
import trio

from traversal.io.upnp import delete_mapping, map_port
from traversal.paths.portmap import RunUpnp
from traversal.wire.address import Address
from traversal.wire.upnp import Service, SsdpReply, UpnpError

LOOPBACK = IPv4Address("127.0.0.1")
V1 = "urn:schemas-upnp-org:service:WANIPConnection:1"
V2 = "urn:schemas-upnp-org:service:WANIPConnection:2"


def envelope(action: str, **fields: str) -> str:
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    return f"<Envelope><Body><{action}Response>{inner}</{action}Response></Body></Envelope>"


def fault(code: int) -> str:
    return (
        "<Envelope><Body><Fault><detail><UPnPError>"
        f"<errorCode>{code}</errorCode><errorDescription>no</errorDescription>"
        "</UPnPError></detail></Fault></Body></Envelope>"
    )


@dataclass
class Gateway:
    """Serves a description and answers SOAP calls by `answer(action, body)`."""

    services: tuple[str, ...] = (V1,)
    answer: Callable[[str, str], str] = lambda action, body: envelope(action)
    calls: list[tuple[str, str]] = field(default_factory=list)
    port: int = 0

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._handle, listeners)
            task_status.started()

    async def _handle(self, stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                data += await stream.receive_some()
            head, _, body = data.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            while len(body) < length:
                body += await stream.receive_some()
            if head.startswith(b"GET"):
                text = self.description()
            else:
                header = head.decode().partition("SOAPAction: ")[2].split("\r\n")[0]
                action = header.strip('"').rpartition("#")[2]
                self.calls.append((action, body.decode()))
                text = self.answer(action, body.decode())
            status = "500 Fault" if "<Fault>" in text else "200 OK"
            answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n{text}"
            await stream.send_all(answer.encode())

    def description(self) -> str:
        services = "".join(
            f"<service><serviceType>{kind}</serviceType><controlURL>/{n}</controlURL></service>"
            for n, kind in enumerate(self.services)
        )
        return f"<root><device><serviceList>{services}</serviceList></device></root>"

    def wanted(self, service: Service | None = None) -> RunUpnp:
        # The advertised host is another one: only its port counts.
        reply = SsdpReply(f"http://192.0.2.99:{self.port}/root.xml", "test", "uuid")
        return RunUpnp(1, (reply,), service, Address("127.0.0.1", 41641), 41641, 7200)


@pytest.fixture
async def gateway(nursery: trio.Nursery) -> Gateway:
    gateway = Gateway()
    await nursery.start(gateway.serve)
    return gateway


def answers(**special: str) -> Callable[[str, str], str]:
    """Succeeds, with 203.0.113.5 outside, but for what is said."""

    def answer(action: str, _: str) -> str:
        if action in special:
            return special[action]
        if action == "GetExternalIPAddress":
            return envelope(action, NewExternalIPAddress="203.0.113.5")
        if action == "GetStatusInfo":
            return envelope(action, NewConnectionStatus="Connected")
        return envelope(action, NewReservedPort="50000")

    return answer


async def test_maps_and_gives_back(gateway: Gateway) -> None:
    """The port we asked for, the address the gateway tells, and the deletion in the end."""
    gateway.answer = answers()
    service, external, lease = await map_port(gateway.wanted(), LOOPBACK)
    assert (str(external), lease) == ("203.0.113.5:41641", 7200)
    assert service.control_url == f"http://127.0.0.1:{gateway.port}/0"
    assert "<NewProtocol>UDP</NewProtocol>" in gateway.calls[0][1]
    await delete_mapping(service, external.port)
    assert [action for action, _ in gateway.calls] == [
        "AddPortMapping",
        "GetExternalIPAddress",
        "GetSpecificPortMappingEntry",
        "DeletePortMapping",
    ]


@pytest.mark.parametrize(
    ("told", "expected"),
    [("600", 600), ("7199", 7199), ("86400", 7200), ("0", 7200), ("", 7200), ("-1", 7200)],
)
async def test_shorter_lease(gateway: Gateway, told: str, expected: int) -> None:
    """A gateway that grants less than it was asked for says so only when asked again; nonsense, or
    a gateway that can't say, changes nothing."""
    entry = envelope("GetSpecificPortMappingEntry", NewLeaseDuration=told)
    gateway.answer = answers(GetSpecificPortMappingEntry=entry if told else fault(714))
    _, _, lease = await map_port(gateway.wanted(), LOOPBACK)
    assert lease == expected


async def test_any_port_of_version_2(gateway: Gateway) -> None:
    """IGD 2 may choose another port; of two services the one that is up is taken."""
    gateway.services = (V1, V2)
    gateway.answer = answers()
    service, external, _ = await map_port(gateway.wanted(), LOOPBACK)
    assert service.type == V2
    assert external.port == 50000


async def test_only_permanent_leases(gateway: Gateway) -> None:
    """Refused with 725, we ask once more for a lease without end."""

    def answer(action: str, body: str) -> str:
        if action == "AddPortMapping" and "<NewLeaseDuration>0<" not in body:
            return fault(725)
        return answers()(action, body)

    gateway.answer = answer
    assert (await map_port(gateway.wanted(), LOOPBACK))[2] == 0


async def test_known_service_is_tried_first(gateway: Gateway) -> None:
    """A renewal needs no description; a service that has gone is looked for anew."""
    gateway.answer = answers()
    gone = Service(V1, "http://127.0.0.1:1/gone")
    service, _, _ = await map_port(gateway.wanted(gone), LOOPBACK)
    assert service.control_url == f"http://127.0.0.1:{gateway.port}/0"


@pytest.mark.parametrize(
    "answer",
    [
        answers(AddPortMapping=fault(718)),
        answers(GetExternalIPAddress=envelope("x", NewExternalIPAddress="0.0.0.0")),
        answers(AddPortMapping="<!DOCTYPE x>"),
        answers(AddPortMapping="no XML"),
        answers(AddPortMapping="x" * 300_000),
    ],
)
async def test_refusals_and_nonsense(gateway: Gateway, answer: Callable[[str, str], str]) -> None:
    """Whatever a gateway says, there is one error."""
    gateway.answer = answer
    with pytest.raises(UpnpError):
        await map_port(gateway.wanted(), LOOPBACK)


async def test_nobody_there() -> None:
    """A gateway that does not answer is an error too."""
    gateway = Gateway(port=1)
    with pytest.raises(UpnpError, match="no gateway describes"):
        await map_port(gateway.wanted(), LOOPBACK)


@pytest.mark.parametrize("path", ["/a b", "/\xff", "/a\x1b", "/\x00"])
async def test_url_that_no_request_can_carry(gateway: Gateway, path: str) -> None:
    """Anybody on the network may advertise a description; a bad one is passed over, and so is a
    gateway that describes such a control URL."""
    gateway.answer = answers()
    wanted = gateway.wanted()
    bad = SsdpReply(f"http://192.0.2.99:{gateway.port}{path}", "test", "zzz: sorted first")
    both = replace(wanted, replies=(bad, *wanted.replies))
    assert (await map_port(both, LOOPBACK))[1].port == 41641
    with pytest.raises(UpnpError):
        await map_port(replace(wanted, replies=(bad,)), LOOPBACK)
    with pytest.raises(UpnpError, match="no URL"):
        await delete_mapping(Service(V1, f"http://127.0.0.1:{gateway.port}{path}"), 41641)


@pytest.mark.parametrize("port", ["0", "65536", "9" * 5000, "-1"])
async def test_reserved_port_that_is_none(gateway: Gateway, port: str) -> None:
    """IGD 2 says which port it chose."""
    gateway.services = (V2,)
    gateway.answer = answers(AddAnyPortMapping=envelope("x", NewReservedPort=port))
    with pytest.raises(UpnpError, match="reserved port"):
        await map_port(gateway.wanted(), LOOPBACK)
