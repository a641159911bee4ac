"""Every parser of network bytes, the errors it may raise, and samples to begin with; and the state
machine of a peer, driven by bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from netlab.scenario_file import parse_scenario
from netlab.toml_reading import ScenarioError
from relay.edge.client_hello import ClientHelloError, parse_client_hello
from relay.edge.control import ControlServer
from relay.edge.destinations import DestinationError, DestinationPolicy
from relay.edge.hygiene import (
    HygienePolicy,
    RawRequest,
    RequestRefusedError,
    ResponseRefusedError,
    Visitor,
    clean_request,
    clean_response,
)
from relay.proxy_protocol import ProxyProtocolError, parse_proxy_header
from tests.fuzz.edge import drive_connector, request_frame
from tests.fuzz.listener import serve_frames, serve_requests
from tests.fuzz.machine import drive_peer
from tests.fuzz.states import drive_peer_relay, drive_port_mapper, drive_switch, drive_visitor
from traversal.io.http2_engine import Http2Engine, Http2Error, Http2Limits
from traversal.io.quic_engine import parse_initial
from traversal.keys import Box, DiscoPrivate, KeyFormatError, NodePrivate
from traversal.relay_map import RelayMap, RelayMapError
from traversal.wire import derp, nat_pmp, pcp, socks, stun, upnp
from traversal.wire.address import Address
from traversal.wire.classify import classify
from traversal.wire.derp import DerpError
from traversal.wire.derp_upgrade import ClientHandshake, maybe_server_key_from_certificates
from traversal.wire.disco import DiscoError, open_envelope, parse_message
from traversal.wire.geneve import GeneveError, parse_header
from traversal.wire.ice_check import parse_check_request, parse_check_response
from traversal.wire.ice_description import IceDescriptionError, parse_description
from traversal.wire.introduction import IntroductionError, open_introduction, parse_introduction
from traversal.wire.punching import PunchMessageError, open_punch_message, parse_punch_message
from traversal.wire.tunnel import (
    capnp,
    configuration,
    connect,
    credentials,
    datagrams,
    headers,
    registration,
    rpc,
    sessions,
)
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.rpc_client import RpcClient

Reader = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Target:
    """`read` gets any bytes and may raise `errors`, nothing else."""

    read: Reader
    errors: tuple[type[Exception], ...] = ()
    samples: tuple[bytes, ...] = ()


def _derp_stream(data: bytes) -> None:
    splitter = derp.FrameSplitter(4096)
    for start in range(0, len(data), 37):
        splitter.receive_data(data[start : start + 37])
        for kind, body in splitter.frames():
            derp.maybe_parse_server_frame(kind, body)


def _derp_info(data: bytes) -> None:
    for parse in (derp.ClientInfo.parse_json, derp.ServerInfo.parse_json):
        try:
            parse(data)
        except DerpError:
            pass


def _derp_upgrade(data: bytes) -> None:
    key = NodePrivate.generate(lambda size: bytes(range(size)))
    upgrade = ClientHandshake(key, "relay.test", info=derp.ClientInfo(), nonce=bytes(24))
    upgrade.receive_data(data)


_KEY = NodePrivate.generate(lambda size: bytes(range(size)))
_BOX = Box(_KEY, NodePrivate.generate(lambda size: bytes(range(1, size + 1))).public())
_DISCO_BOX = Box(
    DiscoPrivate.generate(lambda size: bytes(range(size))),
    DiscoPrivate.generate(lambda size: bytes(range(1, size + 1))).public(),
)


def _envelopes(data: bytes) -> None:
    """Sealed messages: forged ones, and what an authenticated peer may have put into them."""
    sealed = _BOX.seal(data, bytes(24))
    for read, error in (
        (lambda: open_envelope(data, _DISCO_BOX), DiscoError),
        (lambda: open_introduction(data, _BOX), IntroductionError),
        (lambda: open_punch_message(data, _BOX), PunchMessageError),
        (lambda: derp.parse_server_info(sealed, _BOX), DerpError),
        (lambda: derp.parse_client_info(_KEY.public().raw + sealed, _KEY), DerpError),
        (lambda: derp.parse_client_info(data, _KEY), DerpError),
    ):
        try:
            read()
        except error:
            pass


def _stun(data: bytes) -> None:
    for parse in (
        stun.parse_binding_request,
        stun.parse_binding_response,
        stun.parse_error_response,
        stun.parse_message,
    ):
        try:
            parse(data)
        except stun.StunError:
            pass
    for check in (parse_check_request, parse_check_response):
        try:
            check(data, "password")
        except stun.StunError:
            pass


def _upnp(data: bytes) -> None:
    for read in (
        upnp.parse_ssdp_reply,
        lambda document: upnp.parse_description(document, "http://192.0.2.1:5000/"),
        upnp.parse_call_response,
    ):
        try:
            read(data)
        except upnp.UpnpError:
            pass


def _socks(data: bytes) -> None:
    for parse in (socks.parse_greeting, socks.parse_request):
        try:
            parse(data)
        except socks.SocksError:
            pass


def _rpc(data: bytes) -> None:
    message = rpc.parse_rpc(capnp.parse_message(data))
    if isinstance(message, rpc.Call):
        for read in (
            registration.RegisterConnection.from_struct,
            registration.UpdateLocalConfiguration.from_struct,
            sessions.RegisterUdpSession.from_struct,
            sessions.UnregisterUdpSession.from_struct,
            sessions.UpdateConfiguration.from_struct,
        ):
            try:
                read(message.params)
            except TunnelError:
                pass


def _rpc_client(data: bytes) -> None:
    client = RpcClient()
    client.call(1, 0, capnp.EMPTY)
    client.receive(data)


def _data_head(data: bytes) -> None:
    length = connect.data_head_length(data)
    if length is not None and length <= len(data):
        root = connect.parse_data_head(data[:length])
        connect.ConnectRequest.from_struct(root)
        connect.ConnectResponse.from_struct(root)


def _datagrams(data: bytes) -> None:
    datagrams.maybe_parse_datagram2(data)
    datagrams.parse_datagram3(data)


def _control(data: bytes) -> None:
    control = ControlServer(now=0.0)
    for start in range(0, len(data), 61):
        control.receive(data[start : start + 61])


def _http2(data: bytes) -> None:
    engine = Http2Engine(Http2Limits(streams=10), client_side=False, now=0)
    engine.start()
    engine.receive(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + data, 0)


def _hygiene(data: bytes) -> None:
    lines = data.split(b"\n")
    method, _, target = lines[0].partition(b" ")
    pairs = tuple((name, value) for name, _, value in (line.partition(b":") for line in lines[1:]))
    visitor = Visitor("192.0.2.1", "https")
    policy = HygienePolicy()
    for raw in (
        RawRequest(method, target, pairs),
        RawRequest(method, target, pairs, authority=b"app.example.com", version="2"),
    ):
        try:
            clean_request(raw, visitor, "ray", policy)
        except RequestRefusedError:
            pass
    clean_response(200, pairs)


def _destination(data: bytes) -> None:
    DestinationPolicy().authorize(data.decode("latin-1"))


def _text(read: Callable[[str], object]) -> Reader:
    return lambda data: read(data.decode("latin-1"))


TARGETS: dict[str, Target] = {
    "address": Target(_text(Address.parse), (ValueError,), (b"192.0.2.1:5", b"[2001:db8::1]:5")),
    "classify": Target(classify),
    "derp-stream": Target(_derp_stream, (DerpError,), (bytes.fromhex("0600000001aa"),)),
    "derp-info": Target(_derp_info, (), (b'{"version":2,"CanAckPings":true}',)),
    "derp-upgrade": Target(
        _derp_upgrade, (DerpError,), (b"HTTP/1.1 101 Switching Protocols\r\n\r\n",)
    ),
    "meta-certificate": Target(lambda data: maybe_server_key_from_certificates([data])),
    "envelopes": Target(_envelopes, (), (b'{"version":2}',)),
    "relay-http": Target(
        serve_requests,
        (),
        (
            b"GET /generate_204 HTTP/1.1\r\nHost: r\r\n\r\n",
            b"GET /derp HTTP/1.1\r\nHost: r\r\nUpgrade: DERP\r\nConnection: upgrade\r\n\r\n",
            (
                b"GET /derp HTTP/1.1\r\nHost: r\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dW5kZXJwYXNzIGVkZ2UuLg==\r\n"
                b"Sec-WebSocket-Protocol: derp\r\n\r\n\x82\x81abcd\x01"
            ),
            b"POST / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        ),
    ),
    "relay-websocket": Target(
        serve_frames, (), (b"\x82\x84abcd\1\2\3\4\x89\x80abcd\x88\x82abcd\x62\x8a",)
    ),
    "disco": Target(parse_message, (DiscoError,), (b"\1\0" + bytes(44), b"\3\0" + bytes(18))),
    "geneve": Target(parse_header, (GeneveError,), (bytes.fromhex("0080656500000100"),)),
    "introduction": Target(parse_introduction, (IntroductionError,)),
    "punching": Target(parse_punch_message, (PunchMessageError,)),
    "stun": Target(_stun, (), (bytes.fromhex("000100002112a442") + bytes(12),)),
    "nat-pmp": Target(nat_pmp.parse_response, (nat_pmp.NatPmpError,), (b"\0\x80" + bytes(10),)),
    "peer": Target(drive_peer),
    "peer-relay": Target(drive_peer_relay, (), (bytes(8) + bytes([0, 1, 1, 4]) + bytes(40),)),
    "port-mapper": Target(
        drive_port_mapper, (), (bytes([0, 0, 1, 6, 9, 1, 1, 1, 12]) + bytes(20),)
    ),
    "forwarding": Target(drive_switch, (), (bytes([0, 1, 0, 0, 2, 1, 6, 0, 2, 1, 3]) + bytes(9),)),
    "visitor": Target(
        drive_visitor,
        (),
        (
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
            b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab",
        ),
    ),
    "client-hello": Target(
        parse_client_hello,
        (ClientHelloError,),
        (
            bytes.fromhex("160301002d0100002903030000")
            + bytes(31)
            + bytes.fromhex("0002130101000000"),
        ),
    ),
    "scenario": Target(
        _text(parse_scenario), (ScenarioError,), (b'[[hosts]]\nname = "a"\n[[nats]]\nname = "n"\n',)
    ),
    "pcp": Target(pcp.parse_response, (pcp.PcpError,), (b"\2\x81" + bytes(58),)),
    "upnp": Target(_upnp, (), (b"HTTP/1.1 200 OK\r\nLOCATION: http://192.0.2.1/\r\n\r\n", b"<a/>")),
    "ice": Target(_text(parse_description), (IceDescriptionError,), (b"a=ice-ufrag:x\r\n",)),
    "relay-map": Target(RelayMap.parse, (RelayMapError,), (b'{"Regions":{}}',)),
    "node-key": Target(_text(NodePrivate.parse), (KeyFormatError,), (b"privkey:00",)),
    "proxy-protocol": Target(
        parse_proxy_header,
        (ProxyProtocolError,),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"),
    ),
    "socks": Target(_socks, (), (b"\5\1\0\1\x7f\0\0\1\0\x50",)),
    "tunnel-rpc": Target(
        _rpc, (TunnelError,), (bytes.fromhex("00000000050000000000000001000100") + bytes(32),)
    ),
    "tunnel-rpc-client": Target(_rpc_client, (TunnelError,)),
    "tunnel-data": Target(
        _data_head, (TunnelError,), (bytes.fromhex("0a36cd12a13e3031000000000400000000000000"),)
    ),
    "tunnel-datagrams": Target(_datagrams, (TunnelError,), (b"\3" + bytes(19),)),
    "tunnel-headers": Target(
        headers.parse_serialized_headers, (TunnelError,), (b"eC15:MQ;eC15:Mg",)
    ),
    "tunnel-meta": Target(headers.parse_response_meta, (TunnelError,), (b'{"src":"origin"}',)),
    "tunnel-configuration": Target(
        configuration.parse_configuration,
        (TunnelError,),
        (b'{"ingress":[{"service":"http_status:404"}]}',),
    ),
    "tunnel-credentials": Target(credentials.parse_credentials_file, (TunnelError,), (b"{}",)),
    "tunnel-token": Target(_text(credentials.parse_token), (TunnelError,), (b"eyJhIjoiYSJ9",)),
    "tunnel-control": Target(_control),
    "connector": Target(
        drive_connector,
        (),
        (
            request_frame(3, is_end=True, method=b"GET"),
            request_frame(3, (b"content-length", b"3")) + bytes.fromhex("000003000100000003616263"),
            request_frame(3, (b"cf-cloudflared-proxy-connection-upgrade", b"update-configuration"))
            + b"\0\0\x02\0\1\0\0\0\3{}",
            request_frame(3, (b"cf-cloudflared-proxy-src", b"x")) + request_frame(5, is_end=True),
            bytes.fromhex("0000040300000000030000000800000807000000000000000300000000"),
        ),
    ),
    "http2": Target(_http2, (Http2Error,), (bytes.fromhex("000000040000000000"),)),
    "quic-initial": Target(parse_initial, (), (b"\xc0\0\0\0\1\x08" + bytes(1300),)),
    "hygiene": Target(
        _hygiene, (ResponseRefusedError,), (b"GET /\nhost:a\nte:trailers\ncookie:b",)
    ),
    "destination": Target(_destination, (DestinationError,), (b"192.0.2.1:80", b"[fe80::1]:80")),
}
