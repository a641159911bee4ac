"""A node and an agent that nobody here wrote: aioice's own, in a thread with its own event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aioice
import pytest
import trio

from traversal import IceSession, InterfaceFilter, Node, NodePrivate, RelayMap, open_node

pytestmark = pytest.mark.interop

HOST = "127.0.0.1"


@asynccontextmanager
async def loopback_node() -> AsyncIterator[Node]:
    key = NodePrivate.generate(os.urandom)
    async with open_node(
        key,
        RelayMap({}),
        hosts={4: HOST},
        interfaces=InterfaceFilter(allowed_names=("lo",)),
        map_ports=False,
    ) as node:
        yield node


class Foreigner:
    """aioice's agent, whose methods are called from Trio's thread."""

    def __init__(self, *, is_controlling: bool) -> None:
        self._is_controlling = is_controlling
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self.connection: aioice.Connection = None

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        token = trio.lowlevel.current_trio_token()

        async def serve() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self.connection = aioice.Connection(ice_controlling=self._is_controlling)
            await self._gather()
            token.run_sync_soon(task_status.started)
            await self._stop.wait()
            await self.connection.close()

        await trio.to_thread.run_sync(asyncio.run, serve())

    async def _gather(self) -> None:
        # aioice leaves loopback out; and tests must not talk on any other interface.
        connection = self.connection
        connection._local_candidates_start = True
        connection._local_candidates += await connection.get_component_candidates(1, [HOST])
        connection._local_candidates_end = True

    async def call(self, function: Callable[[aioice.Connection], Awaitable[Any]]) -> Any:
        """Await something in the agent's loop."""
        loop = self._loop
        assert loop is not None
        future = asyncio.run_coroutine_threadsafe(_run(function, self.connection), loop)
        return await trio.to_thread.run_sync(future.result, 20)

    async def stop(self) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)

    @property
    def description(self) -> str:
        """As a WebRTC stack would put it into SDP."""
        lines = [
            f"a=ice-ufrag:{self.connection.local_username}",
            f"a=ice-pwd:{self.connection.local_password}",
            *(f"a=candidate:{c.to_sdp()}" for c in self.connection.local_candidates),
        ]
        return "\r\n".join(lines)

    async def connect(self, sdp: str) -> None:
        """Read our description by aioice's own parser and connect."""

        async def connect(connection: aioice.Connection) -> None:
            for line in sdp.splitlines():
                name, _, value = line.removeprefix("a=").partition(":")
                if name == "ice-ufrag":
                    connection.remote_username = value
                elif name == "ice-pwd":
                    connection.remote_password = value
                elif name == "candidate":
                    await connection.add_remote_candidate(aioice.Candidate.from_sdp(value))
            await connection.add_remote_candidate(None)
            await connection.connect()

        await self.call(connect)


async def _run(
    function: Callable[[aioice.Connection], Awaitable[Any]], connection: aioice.Connection
) -> Any:
    return await function(connection)


@asynccontextmanager
async def foreigner(*, is_controlling: bool) -> AsyncIterator[Foreigner]:
    async with trio.open_nursery() as nursery:
        agent = Foreigner(is_controlling=is_controlling)
        await nursery.start(agent.run)
        try:
            yield agent
        finally:
            await agent.stop()


async def connect(ours: IceSession, theirs: Foreigner) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.connect, ours.local_description.encode())
        nursery.start_soon(ours.connect, theirs.description)


async def assert_conversation(ours: IceSession, theirs: Foreigner) -> None:
    for number in range(50):
        await theirs.call(lambda c, n=number: c.send(b"question %d" % n))
        assert await ours.receive() == b"question %d" % number
        await ours.send(b"answer %d" % number)
        assert await theirs.call(lambda c: c.recv()) == b"answer %d" % number


@pytest.mark.parametrize("is_controlling", [True, False])
async def test_datagrams_both_ways(is_controlling: bool) -> None:
    """In either role the two agree on a path, and datagrams pass both ways."""
    with trio.fail_after(20):
        async with (
            loopback_node() as node,
            foreigner(is_controlling=not is_controlling) as theirs,
            node.open_ice(is_controlling=is_controlling) as ours,
        ):
            await connect(ours, theirs)
            assert ours.is_controlling is is_controlling
            assert ours.selected is not None
            assert ours.selected.address.host == HOST
            await assert_conversation(ours, theirs)


@pytest.mark.parametrize("is_controlling", [True, False])
async def test_role_conflict(is_controlling: bool) -> None:
    """Two agents of the same role settle it."""
    with trio.fail_after(20):
        async with (
            loopback_node() as node,
            foreigner(is_controlling=is_controlling) as theirs,
            node.open_ice(is_controlling=is_controlling) as ours,
        ):
            await connect(ours, theirs)
            assert ours.is_controlling is not theirs.connection.ice_controlling
            await assert_conversation(ours, theirs)


async def test_the_peer_starts_early() -> None:
    """Checks that come before the peer's description are remembered until it comes."""
    with trio.fail_after(20):
        async with (
            loopback_node() as node,
            foreigner(is_controlling=True) as theirs,
            node.open_ice(is_controlling=False) as ours,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(theirs.connect, ours.local_description.encode())
            await trio.sleep(0.1)
            bare = "\n".join(line for line in theirs.description.splitlines() if "pwd" in line)
            ufrag = f"a=ice-ufrag:{theirs.connection.local_username}\n"
            await ours.connect(ufrag + bare)
            assert ours.selected is not None
            assert ours.selected.type.value == "prflx"


async def test_a_rebind_goes_unnoticed() -> None:
    """The node's sockets are replaced, and the conversation goes on."""
    with trio.fail_after(20):
        async with (
            loopback_node() as node,
            foreigner(is_controlling=False) as theirs,
            node.open_ice(is_controlling=True) as ours,
        ):
            await connect(ours, theirs)
            await node.rebind()
            await assert_conversation(ours, theirs)


async def test_two_peers_share_the_socket() -> None:
    """Sessions are told apart by user name, transaction and address."""
    with trio.fail_after(20):
        async with (
            loopback_node() as node,
            foreigner(is_controlling=True) as first,
            foreigner(is_controlling=False) as second,
            node.open_ice(is_controlling=False) as with_first,
            node.open_ice(is_controlling=True) as with_second,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect, with_first, first)
                nursery.start_soon(connect, with_second, second)
            await assert_conversation(with_first, first)
            await assert_conversation(with_second, second)
