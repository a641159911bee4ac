"""The STUN service: who is answered with what, from where, and never as an amplifier."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from relay.stun import (
    EXCESS_BURST_BYTES,
    EXCESS_BYTES_PER_SECOND,
    ExcessBudget,
    Reply,
    SocketAddress,
    Square,
    StunServer,
    StunServerError,
    StunStatistics,
    answer,
)
from traversal.wire import stun
from traversal.wire.stun import Address, StunError, TransactionId

ID = TransactionId(bytes(range(12)))
CLASSIC_REQUEST = b"\0\x01\0\0" + b"\x01" * 16
TAILNODE = stun.encode_binding_request(ID)
PLAIN = stun.encode_discovery_request(ID)
SQUARE: Square = (
    ("192.0.2.1", 3478),
    ("192.0.2.1", 3479),
    ("192.0.2.2", 3478),
    ("192.0.2.2", 3479),
)
SOURCE_4: SocketAddress = ("203.0.113.7", 41641)
SOURCE_6: SocketAddress = ("2001:db8::7", 41641, 0, 0)
MAPPED: SocketAddress = ("::ffff:203.0.113.7", 41641, 0, 0)


def new_budget() -> ExcessBudget:
    return ExcessBudget(b"secret")


def spent_budget(source: SocketAddress) -> ExcessBudget:
    budget = new_budget()
    assert budget.take(source[0], int(EXCESS_BURST_BYTES), 0.0)
    return budget


def answered(
    datagram: bytes,
    source: SocketAddress = SOURCE_4,
    budget: ExcessBudget | None = None,
    square: Square | None = None,
    place: int = 0,
) -> Reply:
    reply = answer(datagram, source, 0.0, budget or new_budget(), square, place)
    assert reply is not None
    return reply


class TestAnswer:
    def test_tailscale_client(self) -> None:
        """A stock client gets Tailscale's bytes, also from an RFC 5780 server."""
        expected = "0101000c2112a442000102030405060708090a0b00200008000183bbea12d545"
        for square in (None, SQUARE):
            reply = answered(TAILNODE, square=square)
            assert reply == Reply(bytes.fromhex(expected), SOURCE_4, 0)

    @pytest.mark.parametrize("datagram", [TAILNODE, PLAIN])
    def test_dual_stack_socket(self, datagram: bytes) -> None:
        """An IPv4 sender on a dual-stack socket is told its IPv4 address."""
        reply = answered(datagram, MAPPED)
        assert len(reply.datagram) == 32
        assert stun.parse_binding_response(reply.datagram).mapped_address == SOURCE_4
        assert reply.destination == MAPPED

    @pytest.mark.parametrize("source", [SOURCE_4, SOURCE_6])
    @pytest.mark.parametrize("datagram", [PLAIN, CLASSIC_REQUEST])
    def test_other_clients(self, datagram: bytes, source: SocketAddress) -> None:
        """Clients of RFC 8489 and of RFC 3489 learn their address without any attribute."""
        response = stun.parse_binding_response(answered(datagram, source).datagram)
        assert response.mapped_address == source[:2]

    @pytest.mark.parametrize(
        "datagram",
        [b"", bytes(20), TAILNODE[:-1], TAILNODE[:-1] + b"\0", answered(PLAIN).datagram],
    )
    def test_everything_else_is_refused(self, datagram: bytes) -> None:
        """A wrong FINGERPRINT, a response or noise gets no answer."""
        with pytest.raises(StunError):
            answer(datagram, SOURCE_4, 0.0, new_budget())

    def test_unknown_attribute(self) -> None:
        """An attribute that must be understood and is not gets error 420 with its type."""
        datagram = bytes.fromhex("000100042112a442") + ID + bytes.fromhex("77770000")
        error = stun.parse_error_response(answered(datagram).datagram)
        assert error == stun.ErrorResponse(ID, 420, "", (0x7777,))

    @pytest.mark.parametrize(
        ("datagram", "kind"),
        [
            (stun.encode_discovery_request(ID, change_port=True), 0x0003),
            (stun.encode_discovery_request(ID, response_port=9), 0x0027),
            (stun.encode_discovery_request(ID, padding_bytes=8), 0x0026),
        ],
    )
    def test_discovery_without_alternate(self, datagram: bytes, kind: int) -> None:
        """A server with one address says that it does no RFC 5780."""
        error = stun.parse_error_response(answered(datagram).datagram)
        assert (error.code, error.unknown_attributes) == (420, (kind,))


class TestBehaviorDiscovery:
    @pytest.mark.parametrize("place", range(4))
    @pytest.mark.parametrize("change_ip", [False, True])
    @pytest.mark.parametrize("change_port", [False, True])
    def test_change_request(self, place: int, change_ip: bool, change_port: bool) -> None:
        """The answer leaves from the address asked for and says so."""
        datagram = stun.encode_discovery_request(ID, change_ip=change_ip, change_port=change_port)
        reply = answered(datagram, square=SQUARE, place=place)
        host, port = SQUARE[place]
        other_host, other_port = SQUARE[3 - place]
        origin = (other_host if change_ip else host, other_port if change_port else port)
        assert SQUARE[reply.place] == origin
        response = stun.parse_binding_response(reply.datagram)
        assert response.response_origin == origin
        assert response.other_address == (other_host, other_port)

    def test_response_port(self) -> None:
        """RESPONSE-PORT sends the answer to another port of the same IP address."""
        datagram = stun.encode_discovery_request(ID, response_port=9)
        assert answered(datagram, SOURCE_6, square=SQUARE).destination == ("2001:db8::7", 9, 0, 0)

    def test_response_port_with_padding(self) -> None:
        """Padding to another port is refused with error 400."""
        datagram = stun.encode_discovery_request(ID, response_port=9, padding_bytes=100)
        error = stun.parse_error_response(answered(datagram, square=SQUARE).datagram)
        assert error.code == 400

    @pytest.mark.parametrize("padding_bytes", [0, 3, 40, 1500])
    def test_padding(self, padding_bytes: int) -> None:
        """PADDING is answered with as much as leaves the answer not longer than the request."""
        datagram = stun.encode_discovery_request(ID, padding_bytes=padding_bytes)
        reply = answered(datagram, square=SQUARE)
        assert stun.parse_binding_response(reply.datagram).other_address == SQUARE[3]
        if padding_bytes > 40:
            assert len(datagram) - 4 < len(reply.datagram) <= len(datagram)


requests = st.one_of(
    st.just(TAILNODE),
    st.just(CLASSIC_REQUEST),
    st.builds(
        stun.encode_discovery_request,
        st.just(ID),
        change_ip=st.booleans(),
        change_port=st.booleans(),
        response_port=st.none() | st.integers(1, 65535),
        padding_bytes=st.none() | st.integers(0, 200),
    ),
    st.lists(st.binary(min_size=2, max_size=2), max_size=20).map(
        lambda kinds: (
            b"\0\x01"
            + (4 * len(kinds)).to_bytes(2, "big")
            + TAILNODE[4:20]
            + b"".join(kind + b"\0\0" for kind in kinds)
        )
    ),
)
sources = st.sampled_from([SOURCE_4, SOURCE_6, MAPPED])
squares = st.sampled_from([None, SQUARE])


class TestNoAmplifier:
    @given(requests, sources, squares)
    def test_without_budget(
        self, datagram: bytes, source: SocketAddress, square: Square | None
    ) -> None:
        """Without budget no answer is longer than its request, but for Tailscale's on IPv6."""
        try:
            reply = answer(datagram, source, 0.0, spent_budget(source), square)
        except StunError:
            return
        if reply is not None:
            allowed = 44 if datagram == TAILNODE else len(datagram)
            assert len(reply.datagram) <= allowed

    def test_tailscale_clients_need_no_budget(self) -> None:
        """Nobody can spend the budget that a stock client would need: it needs none."""
        assert len(answered(TAILNODE, SOURCE_4, spent_budget(SOURCE_4)).datagram) == 32
        assert len(answered(TAILNODE, SOURCE_6, spent_budget(SOURCE_6)).datagram) == 44

    def test_long_requests_need_no_budget(self) -> None:
        """A client whose request is long enough is served whatever others do."""
        software = bytes.fromhex("80220040") + bytes(64)
        datagram = b"\0\x01\0\x44" + TAILNODE[4:20] + software
        for square in (None, SQUARE):
            reply = answered(datagram, SOURCE_4, spent_budget(SOURCE_4), square)
            response = stun.parse_binding_response(reply.datagram)
            assert response.other_address == (square and square[3])

    @given(
        st.lists(st.tuples(requests, st.floats(0, 5)), min_size=1, max_size=40), sources, squares
    )
    def test_excess_of_one_network_is_bounded(
        self,
        events: list[tuple[bytes, float]],
        source: SocketAddress,
        square: Square | None,
    ) -> None:
        """What a network gets beyond what it sent keeps to the burst and the rate."""
        budget = new_budget()
        now = 0.0
        excess_bytes = 0
        for datagram, pause in events * 20:
            now += pause / 20
            try:
                reply = answer(datagram, source, now, budget, square)
            except StunError:
                continue
            if reply is not None and datagram != TAILNODE:
                excess_bytes += max(0, len(reply.datagram) - len(datagram))
        assert excess_bytes <= EXCESS_BURST_BYTES + EXCESS_BYTES_PER_SECOND * now

    def test_bare_answer_when_the_full_one_costs_too_much(self) -> None:
        """Optional attributes are given up before the answer is."""
        budget = new_budget()
        budget.take(SOURCE_4[0], int(EXCESS_BURST_BYTES) - 20, 0.0)
        response = stun.parse_binding_response(answered(PLAIN, SOURCE_4, budget, SQUARE).datagram)
        assert response == stun.BindingResponse(ID, SOURCE_4[:2])
        assert answer(PLAIN, SOURCE_4, 0.0, budget, SQUARE) is None


class TestExcessBudget:
    def test_one_network_shares_a_budget(self) -> None:
        """A /24 of IPv4, in both spellings, or a /48 of IPv6 has one budget."""
        budget = new_budget()
        assert budget.take("192.0.2.1", int(EXCESS_BURST_BYTES), 0.0)
        assert not budget.take("192.0.2.200", 1, 0.0)
        assert not budget.take("::ffff:192.0.2.200", 1, 0.0)
        assert budget.take("192.0.3.1", 1, 0.0)
        assert budget.take("2001:db8:1::1", int(EXCESS_BURST_BYTES), 0.0)
        assert not budget.take("2001:db8:1:ffff::1", 1, 0.0)
        assert budget.take("fe80::1%lo", 1, 0.0)

    def test_refill(self) -> None:
        """The budget comes back at its rate, up to the burst."""
        budget = new_budget()
        assert budget.take("192.0.2.1", int(EXCESS_BURST_BYTES), 100.0)
        assert not budget.take("192.0.2.1", int(EXCESS_BYTES_PER_SECOND) + 1, 101.0)
        assert budget.take("192.0.2.1", int(EXCESS_BYTES_PER_SECOND), 101.0)
        assert not budget.take("192.0.2.1", int(EXCESS_BURST_BYTES) + 1, 10_000.0)
        assert budget.take("192.0.2.1", int(EXCESS_BURST_BYTES), 10_000.0)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("addresses", "alternates", "text"),
        [
            ([("relay.example.com", 3478)], [], "no IP address"),
            ([("127.0.0.1", 70000)], [], "no port"),
            ([("127.0.0.1", 3478)], [("::1", 3479)], "exactly one address"),
            ([("127.0.0.1", 1), ("127.0.0.2", 2)], [("127.0.0.3", 3)], "there are 2"),
            ([("127.0.0.1", 3478)], [("127.0.0.1", 3479)], "both IP address and port"),
            ([("127.0.0.1", 3478)], [("127.0.0.2", 3478)], "both IP address and port"),
            ([("0.0.0.0", 3478)], [("127.0.0.2", 3479)], "write IP addresses"),
            ([("127.0.0.1", 0)], [("127.0.0.2", 3479)], "write IP addresses"),
        ],
    )
    def test_mistakes(self, addresses: list[Address], alternates: list[Address], text: str) -> None:
        """A server that cannot work says what is wrong before it opens anything."""
        with pytest.raises(StunServerError, match=text):
            StunServer(addresses, alternates=alternates)

    async def test_port_in_use(self) -> None:
        """A port that somebody holds is named in the error."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
            holder.bind(("127.0.0.1", 0))
            with pytest.raises(StunServerError, match=f"127.0.0.1:{holder.getsockname()[1]}"):
                await StunServer([holder.getsockname()]).serve()


@asynccontextmanager
async def running(server: StunServer) -> AsyncIterator[list[Address]]:
    async with trio.open_nursery() as nursery:
        yield await nursery.start(server.serve)
        nursery.cancel_scope.cancel()


@pytest.fixture
def client() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield sock


@pytest.fixture
def client_6() -> Iterator[socket.socket]:
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with sock:
        try:
            sock.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 on loopback: {error}")
        sock.setblocking(False)
        yield sock


async def receive(sock: socket.socket) -> tuple[bytes, Address]:
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(sock)
    datagram, source = sock.recvfrom(2048)
    return datagram, source


class TestServer:
    async def test_counts(self, client: socket.socket) -> None:
        """Answers and refusals are counted by disposition and family."""
        server = StunServer([("127.0.0.1", 0)])
        async with running(server) as [address]:
            client.sendto(b"noise", address)
            client.sendto(TAILNODE, address)
            client.sendto(PLAIN, address)
            for _ in range(2):
                datagram, source = await receive(client)
                assert source == address
                response = stun.parse_binding_response(datagram)
                assert response.mapped_address == client.getsockname()
            assert server.statistics() == StunStatistics(success=2, not_stun=1, ipv4=2)

    async def test_more_than_a_batch(self, client: socket.socket) -> None:
        """A burst longer than one batch is answered to the last request."""
        server = StunServer([("127.0.0.1", 0)])
        async with running(server) as [address]:
            for _ in range(150):
                client.sendto(TAILNODE, address)
            for _ in range(150):
                await receive(client)
            assert server.statistics().success == 150

    async def test_dual_stack(self, client: socket.socket, client_6: socket.socket) -> None:
        """On :: an IPv4 client is told its IPv4 address, and an IPv6 client is served too."""
        server = StunServer([("::", 0)])
        async with running(server) as [(_, port)]:
            client.sendto(TAILNODE, ("127.0.0.1", port))
            datagram, _ = await receive(client)
            assert len(datagram) == 32
            client_6.sendto(TAILNODE, ("::1", port))
            datagram, _ = await receive(client_6)
            response = stun.parse_binding_response(datagram)
            assert response.mapped_address == client_6.getsockname()[:2]
        assert server.statistics() == StunStatistics(success=2, ipv4=1, ipv6=1)

    async def test_both_wildcards(self, client: socket.socket, client_6: socket.socket) -> None:
        """0.0.0.0 and :: can be served side by side on one port."""
        port = free_port()
        server = StunServer([("0.0.0.0", port), ("::", port)])
        async with running(server) as addresses:
            assert addresses == [("0.0.0.0", port), ("::", port)]
            for sock, host in ((client, "127.0.0.1"), (client_6, "::1")):
                sock.sendto(TAILNODE, (host, port))
                datagram, _ = await receive(sock)
                response = stun.parse_binding_response(datagram)
                assert response.mapped_address == sock.getsockname()[:2]

    async def test_square(self, client: socket.socket) -> None:
        """With an alternate address all four sockets answer for each other."""
        primary, alternate = ("127.0.0.1", free_port()), ("127.0.0.2", free_port())
        server = StunServer([primary], alternates=[alternate])
        async with running(server) as addresses:
            assert addresses == [primary]
            for change_ip in (False, True):
                for change_port in (False, True):
                    request = stun.encode_discovery_request(
                        ID, change_ip=change_ip, change_port=change_port
                    )
                    client.sendto(request, primary)
                    datagram, source = await receive(client)
                    assert source == (
                        (alternate if change_ip else primary)[0],
                        (alternate if change_port else primary)[1],
                    )
                    response = stun.parse_binding_response(datagram)
                    assert response.response_origin == source
                    assert response.other_address == alternate

    async def test_read_error(
        self, client: socket.socket, autojump_clock: trio.testing.MockClock
    ) -> None:
        """After a socket error the server pauses for a second and goes on."""
        server = StunServer([("127.0.0.1", 0)])
        failures = [OSError("the network is away")]
        drain = StunServer._drain

        def failing_drain(*arguments: object) -> None:
            if failures:
                raise failures.pop()
            drain(*arguments)  # type: ignore[arg-type]  # handed through as they came

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StunServer, "_drain", failing_drain)
            async with running(server) as [address]:
                client.sendto(TAILNODE, address)
                await trio.sleep(0.9)
                assert server.statistics() == StunStatistics(read_error=1)
                await trio.sleep(0.2)
                assert server.statistics() == StunStatistics(success=1, read_error=1, ipv4=1)

    async def test_write_error(self, client: socket.socket) -> None:
        """An answer that cannot be sent is counted and costs nothing else."""
        server = StunServer([("127.0.0.1", 0)])
        async with running(server) as [address]:
            with pytest.MonkeyPatch.context() as patch:
                unreachable = Reply(b"", ("255.255.255.255", 9), 0)
                patch.setattr("relay.stun.answer", lambda *_: unreachable)
                client.sendto(TAILNODE, address)
                with trio.fail_after(5):
                    while not server.statistics().write_error:
                        await trio.lowlevel.checkpoint()
            client.sendto(TAILNODE, address)
            await receive(client)
            assert server.statistics() == StunStatistics(success=1, write_error=1, ipv4=2)


def free_port() -> int:
    """A UDP port that nobody held a moment ago, on either address of a square."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 0))
        port: int = sock.getsockname()[1]
        return port
