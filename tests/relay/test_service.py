"""One data plane: reverse proxies, tokens, rates, live changes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio

from relay.config import Config
from relay.refusals import Stage
from relay.tokens import Claims, TokenSigner
from tests.relay.arena import Arena, arena, new_key
from traversal.io.dial import DialError
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import NodePrivate
from traversal.wire.derp import (
    ClientInfo,
    FrameType,
    encode_client_info,
    encode_send_packet,
)
from traversal.wire.derp_upgrade import encode_upgrade_request


async def upgrade_by_hand(stage: Arena, prefix: bytes, headers: str = "") -> HandshakeStream:
    """A client whose first bytes are `prefix` and whose request has more headers."""
    stream = HandshakeStream(await stage.tcp())
    request = encode_upgrade_request("relay", fast_start=True).removesuffix(b"\r\n")
    info = encode_client_info(ClientInfo(version=2), new_key(), stage.server_key, os.urandom(24))
    await stream.send_all(prefix + request + headers.encode() + b"\r\n" + info)
    return stream


async def sources(stage: Arena, count: int = 1) -> list[tuple[str, int]]:
    """Where the relay thinks that its clients come from."""
    deadline = trio.current_time() + 10
    while len(stage.service.pump.connections) < count:
        assert trio.current_time() < deadline, stage.service.refusals.counts
        await trio.sleep(0.01)
    return [(str(c.address), c.port) for c in stage.service.pump.connections.values()]


PLAIN = {"tls__mode": "off", "listen__derp": ["127.0.0.1:0"]}


class TestBehindAProxy:
    async def test_a_trusted_proxy_says_where_a_client_comes_from(self) -> None:
        """PROXY protocol, version 1 and 2, in front of everything else."""
        v1 = b"PROXY TCP4 203.0.113.9 192.0.2.1 50001 443\r\n"
        v2 = bytes.fromhex("0d0a0d0a000d0a515549540a2111000ccb0071 0ac0000201c35201bb")
        async with arena(
            **PLAIN, proxy__protocol="proxy-protocol", proxy__trusted=["127.0.0.0/8"]
        ) as stage:
            with_v1 = await upgrade_by_hand(stage, v1)
            assert await sources(stage) == [("203.0.113.9", 50001)]
            with_v2 = await upgrade_by_hand(stage, v2)
            assert ("203.0.113.10", 50002) in await sources(stage, 2)
            with_v1.close()
            with_v2.close()

    async def test_a_trusted_proxy_that_sends_no_header_is_refused(self) -> None:
        """Otherwise a client could pretend that there is no proxy."""
        async with arena(
            **PLAIN, proxy__protocol="proxy-protocol", proxy__trusted=["127.0.0.0/8"]
        ) as stage:
            stream = await upgrade_by_hand(stage, b"")
            await stage.until_refused(Stage.PROXY, 1)
            stream.close()

    async def test_limits_count_the_client_and_not_the_proxy(self) -> None:
        """Two clients of one proxy are two sources."""
        settings = {"proxy__protocol": "proxy-protocol", "proxy__trusted": ["127.0.0.0/8"]}
        async with arena(**PLAIN, **settings, limits__connections_per_ip=1) as stage:
            header = b"PROXY TCP4 203.0.113.%d 192.0.2.1 50001 443\r\n"
            streams = [await upgrade_by_hand(stage, header % number) for number in (1, 2)]
            await sources(stage, 2)
            streams.append(await upgrade_by_hand(stage, header % 2))
            await stage.until_refused(Stage.CONNECTIONS_PER_IP, 1)
            for stream in streams:
                stream.close()

    async def test_x_forwarded_for_counts_from_a_trusted_proxy_only(self) -> None:
        """The right-most address that no trusted proxy wrote of itself."""
        headers = "X-Forwarded-For: 198.51.100.1, 203.0.113.7\r\n"
        async with arena(
            **PLAIN, proxy__protocol="x-forwarded-for", proxy__trusted=["127.0.0.0/8"]
        ) as stage:
            stream = await upgrade_by_hand(stage, b"", headers)
            assert (await sources(stage))[0][0] == "203.0.113.7"
            stream.close()
        async with arena(
            **PLAIN, proxy__protocol="x-forwarded-for", proxy__trusted=["192.0.2.0/24"]
        ) as stage:
            stream = await upgrade_by_hand(stage, b"", headers)
            assert (await sources(stage))[0][0] == "127.0.0.1"
            stream.close()

    async def test_limits_hold_for_those_whom_an_http_proxy_names(self) -> None:
        """One client too many is refused, another one of the same proxy is not."""
        settings = {"proxy__protocol": "x-forwarded-for", "proxy__trusted": ["127.0.0.0/8"]}
        async with arena(
            **PLAIN, **settings, limits__connections=2, limits__connections_per_ip=1
        ) as stage:
            header = "X-Forwarded-For: 203.0.113.%d\r\n"
            streams = [await upgrade_by_hand(stage, b"", header % 1)]
            await sources(stage, 1)
            streams.append(await upgrade_by_hand(stage, b"", header % 1))
            await stage.until_refused(Stage.CONNECTIONS_PER_IP, 1)
            streams.append(await upgrade_by_hand(stage, b"", header % 2))
            await sources(stage, 2)
            streams.append(await upgrade_by_hand(stage, b"", header % 3))
            await stage.until_refused(Stage.CONNECTIONS, 1)
            for stream in streams:
                stream.close()

    async def test_trusted_addresses_are_counted_where_no_proxy_speaks_for_others(self) -> None:
        """A list of proxies without a protocol frees nobody from the limits."""
        async with arena(
            **PLAIN, proxy__trusted=["127.0.0.0/8"], limits__connections_per_ip=1
        ) as stage:
            first = await upgrade_by_hand(stage, b"")
            await sources(stage, 1)
            second = await upgrade_by_hand(stage, b"")
            await stage.until_refused(Stage.CONNECTIONS_PER_IP, 1)
            first.close()
            second.close()


@pytest.fixture
def signer(tmp_path: Path) -> TokenSigner:
    """The operator's signing key; its public half is in the file that `closed` names."""
    signer = TokenSigner.generate(os.urandom)
    (tmp_path / "token-keys").write_text(f"{signer.public()}\n")
    (tmp_path / "revoked").write_text("")
    return signer


def closed(tmp_path: Path) -> dict[str, object]:
    return {
        "admission__mode": "closed",
        "admission__tokens__public_key_file": str(tmp_path / "token-keys"),
        "admission__tokens__revoked_file": str(tmp_path / "revoked"),
    }


class TestTokens:
    async def test_a_token_admits_its_holder_with_its_limits(
        self, signer: TokenSigner, tmp_path: Path
    ) -> None:
        """Rate and burst of the token are what SERVER_INFO announces; without it nobody gets in."""
        key = new_key()
        claims = Claims("t1", key.public(), int(time.time()) + 60, 200_000, 300_000)
        async with arena(**closed(tmp_path)) as stage:
            with pytest.raises(DialError):
                await stage.connect(key)
            with pytest.raises(DialError):
                await stage.connect(new_key(), token=signer.issue(claims))
            client = await stage.connect(key, token=signer.issue(claims))
            assert client.server_info.token_bucket_bytes_per_second == 200_000
            assert client.server_info.token_bucket_bytes_burst == 300_000
            assert stage.refused(Stage.ADMISSION) == 2

    async def test_a_token_with_peers_shuts_out_all_others(
        self, signer: TokenSigner, tmp_path: Path
    ) -> None:
        """Packets pass between the holder and the peers of its token, in both directions."""
        holder, peer, stranger = new_key(), new_key(), new_key()

        def token(key: NodePrivate, peers: frozenset[NodePrivate] | None = None) -> str:
            named = None if peers is None else frozenset(each.public() for each in peers)
            expires = int(time.time()) + 60
            claims = Claims(os.urandom(4).hex(), key.public(), expires, None, None, named)
            return signer.issue(claims)

        async with arena(**closed(tmp_path)) as stage:
            scoped = await stage.connect(holder, token=token(holder, frozenset({peer})))
            friend = await stage.connect(peer, token=token(peer))
            other = await stage.connect(stranger, token=token(stranger))
            await scoped.stream.send_all(encode_send_packet(stranger.public(), b"out"))
            await other.stream.send_all(encode_send_packet(holder.public(), b"in"))
            await friend.stream.send_all(encode_send_packet(holder.public(), b"welcome"))
            with trio.fail_after(10):
                frames = await scoped.receive_frames()
            assert frames == [(FrameType.RECV_PACKET, peer.public().raw + b"welcome")]
            dropped = stage.service.pump.switch.counters.packets_dropped
            assert sum(n for (reason, _), n in dropped.items() if reason == "not_permitted") == 2

    async def test_revoking_a_token_cuts_its_session(
        self, signer: TokenSigner, tmp_path: Path
    ) -> None:
        """Its id in the revocation file ends the live session; another token's goes on."""
        keys = [new_key(), new_key()]
        expires = int(time.time()) + 60
        tokens = [
            signer.issue(Claims(f"token-{i}", key.public(), expires)) for i, key in enumerate(keys)
        ]
        async with arena(**closed(tmp_path)) as stage:
            clients = [
                await stage.connect(key, token=token)
                for key, token in zip(keys, tokens, strict=True)
            ]
            (tmp_path / "revoked").write_text("token-0\n")
            with trio.fail_after(5), pytest.raises(StreamEndedError):
                await clients[0].receive_frames()
            await clients[1].stream.send_all(encode_send_packet(keys[1].public(), b"still here"))
            with trio.fail_after(10):
                await clients[1].receive_frames()


class TestLiveChanges:
    async def test_a_rate_change_reaches_those_who_are_connected(self) -> None:
        """A new limit slows a connected client down; lifting it lets the client go again."""
        async with arena() as stage:
            key = new_key()
            client = await stage.connect(key)
            limits = msgspec.structs.replace(
                stage.service.config.limits, client_bytes_per_second=50_000
            )
            config: Config = msgspec.structs.replace(stage.service.config, limits=limits)
            await stage.service.reconfigure(config)
            counters = stage.service.pump.switch.counters
            packet = encode_send_packet(key.public(), bytes(60_000))

            async def flood() -> None:
                while True:
                    await client.stream.send_all(packet)

            async def drain() -> None:
                while True:
                    await client.receive_frames()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood)
                nursery.start_soon(drain)
                await until(lambda: counters.rate_limit_waits > 0)
                await stage.service.reconfigure(
                    msgspec.structs.replace(
                        config, limits=msgspec.structs.replace(limits, client_bytes_per_second=None)
                    )
                )
                before = counters.bytes_received
                await until(lambda: counters.bytes_received > before + 5_000_000)
                nursery.cancel_scope.cancel()

    async def test_revoke_ends_every_session_of_a_key(self) -> None:
        """And tells how many there were."""
        async with arena() as stage:
            key = new_key()
            first, second = await stage.connect(key), await stage.connect(key)
            assert await stage.service.revoke(key.public().raw, "a test says so") == 2
            for client in (first, second):
                with trio.fail_after(10), pytest.raises(StreamEndedError):
                    await frames_for_ever(client.receive_frames)


async def frames_for_ever(receive: Callable[[], Awaitable[object]]) -> None:
    while True:
        await receive()


async def until(condition: Callable[[], bool]) -> None:
    deadline = trio.current_time() + 15
    while not condition():
        assert trio.current_time() < deadline
        await trio.sleep(0.01)


async def test_plain_tcp_settings_of_an_accepted_connection() -> None:
    """TCP_NODELAY and a user timeout hold for what is accepted, or latency suffers."""
    async with arena() as stage:
        await stage.connect()
        (connection,) = stage.service.pump.connections.values()
        sock = connection.sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
