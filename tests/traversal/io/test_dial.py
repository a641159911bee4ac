"""Connecting to a DERP server: what is sent, which certificates pass, and what errors say."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from relay.meta_certificate import build_meta_certificate
from traversal.io.chain_check import check_chain
from traversal.io.dial import CLIENT_INFO, DialError, Target, dial, dial_path
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import MeshKey, NodePrivate
from traversal.relay_map import (
    CertificateName,
    CertificatePin,
    CertificatePolicy,
    CertificateUnchecked,
    Dial,
    RelayNode,
)
from traversal.wire.derp import (
    HEADER_LENGTH,
    KEEP_ALIVE,
    ClientInfo,
    FrameType,
    ServerInfo,
    encode_server_info,
    encode_server_key,
    parse_client_info,
)
from traversal.wire.derp_upgrade import encode_upgrade_response

SERVER = NodePrivate.generate(lambda n: bytes(range(n)))
CLIENT = NodePrivate.generate(lambda n: bytes(range(32, 32 + n)))
CA = trustme.CA()


def trusting_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


def der_of(leaf: trustme.LeafCert) -> bytes:
    certificate = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
    return certificate.public_bytes(Encoding.DER)


def meta_certificate() -> bytes:
    now = int(datetime.now(UTC).timestamp())
    return build_meta_certificate(
        SERVER.public(), bytes(32), not_before=now - 86400, not_after=now + 86400
    )


def server_context(leaf: trustme.LeafCert, directory: Path, *, meta: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    if meta:
        chain += ssl.DER_cert_to_PEM_cert(meta_certificate()).encode()
    path = directory / "chain.pem"
    path.write_bytes(leaf.private_key_pem.bytes() + chain)
    context.load_cert_chain(path)
    return context


@dataclass
class ScriptedServer:
    """A DERP server that does the handshake with one client and remembers what it was told."""

    context: ssl.SSLContext | None = None
    admit: bool = True
    answer: bytes | None = None
    after: bytes = b""
    requests: list[str] = field(default_factory=list)
    infos: list[ClientInfo] = field(default_factory=list)
    server_names: list[str | None] = field(default_factory=list)

    async def serve(self, sock: trio.socket.SocketType) -> None:
        stream = HandshakeStream(sock)
        try:
            await self._serve(stream)
        except StreamEndedError:
            pass
        finally:
            stream.close()

    async def _serve(self, stream: HandshakeStream) -> None:
        if self.context is not None:
            self.context.sni_callback = lambda _object, name, _context: self.server_names.append(
                name
            )
            await stream.start_tls(self.context, server_side=True)
        received = await self._receive(stream)
        if self.answer is not None:
            await stream.send_all(self.answer)
            return
        while b"\r\n\r\n" not in received:
            received += await self._receive(stream)
        head, _, received = received.partition(b"\r\n\r\n")
        self.requests.append(head.decode())
        if b"Derp-Fast-Start: 1" not in head:
            await stream.send_all(encode_upgrade_response(SERVER.public()))
        await stream.send_all(encode_server_key(SERVER.public()))
        while len(received) < HEADER_LENGTH or len(received) < HEADER_LENGTH + int.from_bytes(
            received[1:HEADER_LENGTH], "big"
        ):
            received += await self._receive(stream)
        assert received[0] == FrameType.CLIENT_INFO
        _, info, box = parse_client_info(received[HEADER_LENGTH:], SERVER)
        self.infos.append(info)
        if self.admit:
            # In one write, so that the client reads beyond its handshake.
            await stream.send_all(
                encode_server_info(ServerInfo(), box, os.urandom(24)) + self.after
            )
            await stream.receive()

    async def _receive(self, stream: HandshakeStream) -> bytes:
        data = await stream.receive()
        if not data:
            raise StreamEndedError("the client closed")
        return data


@asynccontextmanager
async def listening(server: ScriptedServer, address: str = "127.0.0.1") -> AsyncIterator[int]:
    """The port on which the server accepts."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = trio.socket.socket(family)
    await listener.bind((address, 0))
    listener.listen()

    async def accept() -> None:
        while True:
            sock, _ = await listener.accept()
            nursery.start_soon(server.serve, sock)

    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            yield listener.getsockname()[1]
            nursery.cancel_scope.cancel()


def loopback(port: int, policy: CertificatePolicy | None, host: str = "localhost") -> Target:
    return Target(host, port, policy, (("127.0.0.1", socket.AF_INET),))


class TestHandshake:
    async def test_slow_start_without_tls(self) -> None:
        """A plain connection has neither TLS version nor chain, and never starts fast."""
        server = ScriptedServer()
        async with listening(server) as port:
            dialed = await dial(loopback(port, None), CLIENT)
            assert dialed.server_key == SERVER.public()
            assert (dialed.tls_version, dialed.chain, dialed.fast_start) == (None, (), False)
            dialed.close()
        assert server.requests[0].startswith("GET /derp HTTP/1.1\r\nHost: localhost:")
        assert server.infos == [CLIENT_INFO]

    @pytest.mark.parametrize(("meta", "wanted"), [(True, True), (True, False), (False, True)])
    async def test_fast_start_needs_a_meta_certificate(
        self, tmp_path: Path, meta: bool, wanted: bool
    ) -> None:
        """It is used where there is one and the caller wants it; the key is the same."""
        leaf = CA.issue_cert("localhost")
        server = ScriptedServer(server_context(leaf, tmp_path, meta=meta))
        async with listening(server) as port:
            dialed = await dial(
                loopback(port, CertificateName("localhost")),
                CLIENT,
                fast_start=wanted,
                make_context=trusting_context,
            )
            dialed.close()
        assert dialed.fast_start is (meta and wanted)
        assert ("Derp-Fast-Start: 1" in server.requests[0]) is (meta and wanted)
        assert dialed.server_key == SERVER.public()
        assert dialed.tls_version == "TLSv1.3"
        assert len(dialed.chain) == 1 + meta
        assert dialed.times.tls_seconds > 0

    async def test_tls_12_never_starts_fast(self, tmp_path: Path) -> None:
        """Before TLS 1.3 anybody on the path may have written the certificates."""
        context = server_context(CA.issue_cert("localhost"), tmp_path, meta=True)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with listening(ScriptedServer(context)) as port:
            dialed = await dial(loopback(port, CertificateUnchecked()), CLIENT)
            dialed.close()
        assert (dialed.tls_version, dialed.fast_start) == ("TLSv1.2", False)

    async def test_tells_the_server_what_the_caller_wants(self) -> None:
        """Mesh key, ideal node and token arrive."""
        server = ScriptedServer()
        info = ClientInfo(mesh_key=MeshKey(bytes(range(32))), version=2)
        async with listening(server) as port:
            dialed = await dial(
                loopback(port, None), CLIENT, info=info, ideal_node="900a", token="upt1.a.b"
            )
            dialed.close()
        assert server.infos == [info]
        assert "Ideal-Node: 900a\r\n" in server.requests[0]
        assert server.requests[0].endswith("Authorization: Bearer upt1.a.b")

    async def test_detach_gives_what_was_read_beyond_the_handshake(self) -> None:
        """Complete and incomplete frames behind SERVER_INFO are not lost."""
        server = ScriptedServer(after=KEEP_ALIVE + b"\x06\x00")
        async with listening(server) as port:
            dialed = await dial(loopback(port, None), CLIENT)
            sock, tls, received = dialed.detach()
            with sock:
                assert tls is None
                assert not sock.getblocking()
                assert received == KEEP_ALIVE + b"\x06\x00"

    async def test_frames_behind_the_handshake_are_received(self) -> None:
        """And the end of the connection is an error."""
        async with listening(ScriptedServer(after=KEEP_ALIVE)) as port:
            dialed = await dial(loopback(port, None), CLIENT)
            assert await dialed.receive_frames() == [(FrameType.KEEP_ALIVE, b"")]
        with pytest.raises(StreamEndedError, match="closed"):
            await dialed.receive_frames()
        dialed.close()

    async def test_unix_socket(self, tmp_path: Path) -> None:
        """Workers of one host reach each other without TLS."""
        path = str(tmp_path / "worker.sock")
        server = ScriptedServer()
        with trio.socket.socket(socket.AF_UNIX) as listener:
            await listener.bind(path)
            listener.listen()

            async def accept() -> None:
                sock, _ = await listener.accept()
                await server.serve(sock)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept)
                dialed = await dial_path(path, CLIENT, info=CLIENT_INFO)
                dialed.close()
        assert dialed.server_key == SERVER.public()


class TestRoutes:
    def test_of_node(self) -> None:
        """IPv6 first; an address replaces the name, and NEVER leaves a family out."""
        node = RelayNode("900a", 900, "relay.example.com", derp_port=8443)
        target = Target.of_node(node)
        assert target.routes == (
            ("relay.example.com", socket.AF_INET6),
            ("relay.example.com", socket.AF_INET),
        )
        assert target.policy == CertificateName("relay.example.com")
        assert target.host_header == "relay.example.com:8443"
        bare = RelayNode("900b", 900, "2001:db8::1", ipv4=Dial.NEVER)
        assert Target.of_node(bare).routes == (("2001:db8::1", socket.AF_INET6),)
        assert Target.of_node(bare).host_header == "[2001:db8::1]"
        assert Target.of_node(bare).server_name is None

    def test_of_node_without_relay(self) -> None:
        """A STUN server can't be dialed."""
        with pytest.raises(ValueError, match="only serves STUN"):
            Target.of_node(RelayNode("900a", 900, "relay.example.com", stun_only=True))

    async def test_the_next_address_is_tried(self) -> None:
        """A refused connection costs no time and no success."""
        async with listening(ScriptedServer()) as port:
            routes = (("127.0.0.2", socket.AF_INET), ("127.0.0.1", socket.AF_INET))
            dialed = await dial(Target("localhost", port, None, routes), CLIENT)
            dialed.close()

    async def test_all_problems_are_named(self) -> None:
        """When nobody listens the error says so for each address."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            routes = (("127.0.0.1", socket.AF_INET), ("127.0.0.2", socket.AF_INET))
            with pytest.raises(DialError) as caught:
                await dial(Target("relay.example.com", port, None, routes), CLIENT)
        assert caught.value.step == "connect"
        assert str(caught.value) == (
            f"relay.example.com:{port}: can't connect: 127.0.0.1: Connection refused; "
            "127.0.0.2: Connection refused"
        )


class TestErrors:
    async def test_not_a_derp_server(self) -> None:
        """The HTTP status is told."""
        server = ScriptedServer(answer=b"HTTP/1.1 404 Not Found\r\n\r\n")
        async with listening(server) as port:
            with pytest.raises(DialError, match=r"did not upgrade.*404 Not Found"):
                await dial(loopback(port, None), CLIENT)

    async def test_refused_client(self) -> None:
        """A DERP server refuses silently; the error says what that may mean."""
        async with listening(ScriptedServer(admit=False)) as port:
            with pytest.raises(DialError, match="does it admit this key") as caught:
                await dial(loopback(port, None), CLIENT)
        assert caught.value.step == "handshake"

    async def test_silent_server(self, autojump_clock: trio.testing.MockClock) -> None:
        """Everything together ends after 10 s."""
        with trio.socket.socket() as listener:
            await listener.bind(("127.0.0.1", 0))
            listener.listen()
            with pytest.raises(DialError, match="no answer within 10 s") as caught:
                await dial(loopback(listener.getsockname()[1], None), CLIENT)
        assert caught.value.step == "upgrade"
        assert trio.current_time() == pytest.approx(10)

    async def test_no_tls_there(self) -> None:
        """TLS to a plain server."""
        server = ScriptedServer(answer=b"HTTP/1.1 400 Bad Request\r\n\r\n")
        async with listening(server) as port:
            with pytest.raises(DialError) as caught:
                await dial(loopback(port, CertificateUnchecked()), CLIENT)
        assert caught.value.step == "tls"


class TestCertificates:
    async def dial_with(
        self,
        tmp_path: Path,
        policy: CertificatePolicy,
        *,
        host: str = "localhost",
        name: str = "localhost",
        make_context: Callable[[], ssl.SSLContext] = trusting_context,
    ) -> tuple[ScriptedServer, str]:
        """The server with a certificate for `name`, and the reason in words, empty for none."""
        server = ScriptedServer(server_context(CA.issue_cert(name), tmp_path, meta=True))
        async with listening(server) as port:
            target = loopback(port, policy, host)
            try:
                (await dial(target, CLIENT, make_context=make_context)).close()
            except DialError as error:
                return server, error.reason
        return server, ""

    async def test_unknown_authority(self, tmp_path: Path) -> None:
        """The step is the certificate, the reason OpenSSL's."""
        _, problem = await self.dial_with(
            tmp_path, CertificateName("localhost"), make_context=ssl.create_default_context
        )
        assert problem == "unable to get local issuer certificate"

    async def test_wrong_name(self, tmp_path: Path) -> None:
        """A trusted certificate for somebody else."""
        _, problem = await self.dial_with(
            tmp_path, CertificateName("localhost"), name="other.example"
        )
        assert "Hostname mismatch" in problem

    async def test_another_certificate_name(self, tmp_path: Path) -> None:
        """CertName: the SNI stays the host's name, the certificate is for the other."""
        policy = CertificateName("front.example")
        server, problem = await self.dial_with(tmp_path, policy, name="front.example")
        assert (server.server_names, problem) == (["localhost"], "")
        _, problem = await self.dial_with(tmp_path, policy, name="localhost")
        assert problem == "it is not valid for front.example"

    async def test_address_as_host(self, tmp_path: Path) -> None:
        """No SNI is sent, and the certificate must be for the address."""
        policy = CertificateName("127.0.0.1")
        server, problem = await self.dial_with(tmp_path, policy, host="127.0.0.1", name="127.0.0.1")
        assert (server.server_names, problem) == ([None], "")
        _, problem = await self.dial_with(tmp_path, policy, host="127.0.0.1", name="127.0.0.2")
        assert "IP address mismatch" in problem

    async def test_wrong_pin_tells_the_right_one(self, tmp_path: Path) -> None:
        """So that it can be compared with what the server prints."""
        _, problem = await self.dial_with(tmp_path, CertificatePin(bytes(32)))
        assert re.fullmatch(r"its pin is sha256-raw:[0-9a-f]{64}, not sha256-raw:0{64}", problem)

    async def test_pinned_certificate_of_somebody_else(self, tmp_path: Path) -> None:
        """Who sends the pinned certificate behind one of their own, whose key alone they hold, is
        not let pass, though the first one looks like a meta certificate."""
        pinned = der_of(CA.issue_cert("localhost"))
        own_key = Ed25519PrivateKey.from_private_bytes(bytes(32))  # of the meta certificate below
        pem = own_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        pem += "".join(map(ssl.DER_cert_to_PEM_cert, (meta_certificate(), pinned)))
        path = tmp_path / "impostor.pem"
        path.write_text(pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        server = ScriptedServer(context)
        pin = CertificatePin(hashlib.sha256(pinned).digest())
        async with listening(server) as port:
            with pytest.raises(DialError, match="no certificate of its own"):
                (await dial(loopback(port, pin), CLIENT)).close()
        assert not server.infos

    def test_pin_rules(self) -> None:
        """DERP specification 15.2: one certificate, digest, dates, name if SNI was sent."""
        leaf = CA.issue_cert("relay.example.com", "*.wild.example")
        der, meta = der_of(leaf), meta_certificate()
        pin = CertificatePin(hashlib.sha256(der).digest())
        now = datetime.now(UTC)
        name = "relay.example.com"
        assert check_chain([der, meta], pin, name, now) is None
        assert check_chain([der], pin, None, now) is None
        assert check_chain([der], pin, "RELAY.example.com.", now) is None
        assert check_chain([der], pin, "a.wild.example", now) is None
        assert check_chain([der], pin, "a.b.wild.example", now) is not None
        assert "not valid for" in str(check_chain([der], pin, "wild.example", now))
        assert "presented 2" in str(check_chain([der, der, meta], pin, name, now))
        assert "no certificate" in str(check_chain([meta], pin, name, now))
        assert "no certificate" in str(check_chain([meta, der], pin, name, now))
        assert "no certificate" in str(check_chain([], pin, name, now))
        assert "valid from" in str(check_chain([der], pin, name, datetime(1990, 1, 1, tzinfo=UTC)))
        assert "can't be read" in str(check_chain([b"junk"], pin, name, now))
        assert check_chain([b"junk"], CertificateUnchecked(), name, now) is None
