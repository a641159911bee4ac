"""The public face under misuse and cancellation: nothing leaks, nothing hangs, errors are typed."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing

from traversal import (
    IceError,
    InterfaceFilter,
    Link,
    LinkClosedError,
    LinkError,
    Node,
    NodeError,
    NodePrivate,
    PathChange,
    PathKind,
    RelayMap,
    RelayOptions,
    UdpError,
    open_node,
)
from traversal.io.inbox import Inbox
from traversal.link import MAX_WAITING_CHANGES


def new_key() -> NodePrivate:
    return NodePrivate.generate(os.urandom)


@pytest.fixture
async def relay(nursery: trio.Nursery, tiny_relay: Callable[[], Any]) -> Any:
    """A tiny relay that serves."""
    relay = tiny_relay()
    await nursery.start(relay.serve)
    return relay


@pytest.fixture
def relay_map(relay: Any, map_of: Callable[..., RelayMap]) -> RelayMap:
    return map_of(relay)


@asynccontextmanager
async def node_on(relay_map: RelayMap, **options: Any) -> AsyncIterator[Node]:
    async with open_node(
        options.pop("key", None) or new_key(),
        relay_map,
        hosts={4: "127.0.0.1"},
        interfaces=InterfaceFilter(allowed_names=("lo",)),
        map_ports=False,
        relay_options=RelayOptions(plain=True),
        admit=lambda _: True,
        **options,
    ) as node:
        yield node


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  # nothing signals what is waited for
            await trio.sleep(0.005)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope when a task, or any task, is about to run for the n-th time."""

    def __init__(self, scope: trio.CancelScope, step: int, task: trio.lowlevel.Task | None) -> None:
        self.steps = 0
        self._scope = scope
        self._step = step
        self._task = task

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._task is None or task is self._task:
            self.steps += 1
            if self.steps == self._step:
                self._scope.cancel()


async def cancelled_at(
    step: int, run: Callable[[], Awaitable[None]], *, of_all: bool = False
) -> int:
    """Cancel `run` at a step of its own task or of all tasks: 0, or how many steps it took."""
    with trio.CancelScope() as scope:
        task = None if of_all else trio.lowlevel.current_task()
        instrument = CancelAtStep(scope, step, task)
        trio.lowlevel.add_instrument(instrument)
        try:
            await run()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return 0 if scope.cancelled_caught else instrument.steps


class TestCancelling:
    async def test_at_every_step(self, relay: Any, relay_map: RelayMap) -> None:
        """Two nodes meet, talk, ping, check, rebind and take leave. Cancelled at each step of the
        task that does it: tasks and sockets are gone, and the relay knows that the nodes are."""

        async def meet() -> None:
            async with node_on(relay_map) as a, node_on(relay_map) as b:
                link = await a.connect(b.public_key, relay=900)
                await link.send(b"one")
                other = await b.accept()
                assert await other.receive() == b"one"
                await other.send_many([b"two"] * 40)
                await link.receive_many()
                changes = link.path_changes()
                if link.path.kind is not PathKind.DIRECT:
                    await changes.__anext__()
                assert await link.ping() is not None
                async with a.open_ice(is_controlling=True) as session:
                    with trio.move_on_after(0.001):
                        await session.receive()
                await a.rebind()
                await b.refresh()
                link.close()

        async def check(step: int, *, of_all: bool = False) -> int:
            with trio.fail_after(10):
                took = await cancelled_at(step, meet, of_all=of_all)
            await until(lambda: not relay.clients)
            await until(lambda: trio.lowlevel.current_statistics().tasks_living == tasks)
            assert open_files() == files
            return took

        await meet()  # opens what stays open: the resolver's threads, the event loop's pipes
        await until(lambda: not relay.clients)
        files, tasks = open_files(), trio.lowlevel.current_statistics().tasks_living
        step = 1
        while not await check(step):
            step += 1
        assert step > 12
        everything = await check(-1, of_all=True)
        for step in range(1, everything, everything // 20):
            await check(step, of_all=True)

    @pytest.mark.parametrize("is_cancelled_first", [True, False])
    async def test_a_cancelled_reader_loses_nothing(self, is_cancelled_first: bool) -> None:
        """A datagram that comes as its reader is cancelled is returned, or there for the next."""
        inbox = Inbox(lambda: None)
        got: list[bytes] = []

        async def read() -> None:
            got.append(await inbox.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            if is_cancelled_first:
                nursery.cancel_scope.cancel()
            inbox.put([b"x"])
            nursery.cancel_scope.cancel()
        if is_cancelled_first:
            assert got == []
            got.append(await inbox.receive())
        assert got == [b"x"]

    async def test_a_cancelled_rebind_leaves_sockets(self, relay_map: RelayMap) -> None:
        """Whenever it is cancelled, the node can still be reached by UDP."""
        async with node_on(relay_map) as node:
            for step in range(1, 8):
                await cancelled_at(step, node.rebind)
                assert node.statistics().udp.ipv4_port is not None


class TestClosing:
    async def test_who_waits_on_a_link_is_told(self, relay_map: RelayMap) -> None:
        """Readers, pingers and watchers of a link that another task closes end at once."""
        async with node_on(relay_map) as node:
            link = await node.connect(new_key().public(), relay=900)
            ended: list[str] = []

            async def expect(what: str, wait: Callable[[], Awaitable[object]]) -> None:
                with pytest.raises(LinkClosedError):
                    await wait()
                ended.append(what)

            async def watch() -> None:
                async for _ in link.path_changes():
                    pass
                ended.append("watch")

            with trio.fail_after(1):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(expect, "receive", link.receive)
                    nursery.start_soon(expect, "receive", link.receive)
                    nursery.start_soon(expect, "many", link.receive_many)
                    nursery.start_soon(expect, "ping", link.ping)
                    nursery.start_soon(watch)
                    await trio.testing.wait_all_tasks_blocked()
                    link.close()
            assert sorted(ended) == ["many", "ping", "receive", "receive", "watch"]
            for call in (link.receive, link.ping, lambda: link.send(b"x")):
                with pytest.raises(LinkClosedError):
                    await call()
            assert [change async for change in link.path_changes()] == []

    async def test_who_waits_on_a_node_is_told(self, relay: Any, relay_map: RelayMap) -> None:
        """A closed node says that it is, also to those who waited when it was closed."""
        refused: list[str] = []

        async def expect(call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(NodeError, match="the node is closed") as caught:
                await call()
            refused.append(str(caught.value))

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery, node_on(relay_map) as node:
                link = await node.connect(new_key().public(), relay=900)
                relay.mutes_stun = True  # so that a check takes its time
                nursery.start_soon(expect, node.accept)
                nursery.start_soon(expect, node.refresh)
                await trio.testing.wait_all_tasks_blocked()
            assert len(refused) == 2
            files = open_files()
            for call in (node.accept, node.refresh, node.rebind):
                await expect(call)
            await expect(lambda: node.connect(new_key().public()))
            with pytest.raises(NodeError):
                node.open_ice(is_controlling=True)
            with pytest.raises(LinkClosedError):
                await link.send(b"x")
            assert open_files() == files

    async def test_a_peer_can_be_connected_to_again(self, relay_map: RelayMap) -> None:
        """Closing forgets; a new link to the same peer finds it anew."""
        async with node_on(relay_map) as a, node_on(relay_map) as b:
            first = await a.connect(b.public_key, relay=900)
            first.close()
            second = await a.connect(b.public_key, relay=900)
            assert second is not first
            await second.send(b"again")
            other = await b.accept()
            with trio.fail_after(5):
                assert await other.receive() == b"again"


class TestErrors:
    async def test_come_out_as_they_are(self, relay_map: RelayMap) -> None:
        """Neither what `open_node` raises nor what its block does is wrapped in a group."""
        async with node_on(relay_map) as node:
            port = node.statistics().udp.ipv4_port
            with pytest.raises(UdpError, match="choose another port"):
                async with node_on(relay_map, port=port):
                    pass
        mine = ValueError("mine")
        with pytest.raises(ValueError, match="mine") as caught:
            async with node_on(relay_map):
                raise mine
        assert caught.value is mine
        group = ExceptionGroup("mine", [ValueError("one"), KeyError("two")])
        with pytest.raises(ExceptionGroup) as grouped:
            async with node_on(relay_map):
                raise group
        assert (grouped.value.message, grouped.value.exceptions) == ("mine", group.exceptions)

    async def test_cancelling_is_no_error(self, relay_map: RelayMap) -> None:
        """A time limit around a node ends it without an exception."""
        with trio.move_on_after(0.2) as scope:
            async with node_on(relay_map) as node:
                await node.accept()
        assert scope.cancelled_caught

    def test_have_the_bases_that_are_documented(self) -> None:
        """One except clause is enough for a link, one for a node."""
        assert issubclass(LinkClosedError, LinkError)
        for error in (NodeError, LinkError, UdpError, IceError):
            assert issubclass(error, Exception)


class TestReaders:
    async def test_two_readers_share(self, relay_map: RelayMap) -> None:
        """Datagrams that come in one batch wake as many readers as there are datagrams."""
        async with node_on(relay_map) as a, node_on(relay_map) as b:
            link, other = await direct_pair(a, b)
            got: list[bytes] = []

            async def read() -> None:
                got.append(await other.receive())

            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    for _ in range(3):
                        nursery.start_soon(read)
                    await trio.testing.wait_all_tasks_blocked()
                    await link.send_many([b"1" * 100, b"2" * 100, b"3" * 100])
            assert sorted(got) == [b"1" * 100, b"2" * 100, b"3" * 100]

    async def test_slow_reader(self, relay_map: RelayMap) -> None:
        """What a reader does not take in time is dropped, oldest first, and counted."""
        async with node_on(relay_map) as a, node_on(relay_map) as b:
            link, other = await direct_pair(a, b)
            sent, before = 0, other.statistics().received
            while other.statistics().dropped_for_slow_reader < 100:
                await link.send_many(
                    [sent.to_bytes(4, "big") * 25 for sent in range(sent, sent + 50)]
                )
                sent += 50
                await trio.lowlevel.checkpoint()
            waiting = await other.receive_many()
            assert len(waiting) <= 4096
            assert int.from_bytes(waiting[-1][:4], "big") > 4096
            statistics = other.statistics()
            received = statistics.received - before
            assert received == statistics.dropped_for_slow_reader + len(waiting)

    async def test_slow_watcher(self, relay_map: RelayMap) -> None:
        """Changes that nobody reads are dropped, oldest first, and counted."""
        async with node_on(relay_map) as node:
            link = await node.connect(new_key().public(), relay=900)
            changes = link.path_changes()
            path = link.path
            for number in range(MAX_WAITING_CHANGES + 5):
                changes.push(PathChange(float(number), path, path, "test"))
            assert changes.missed == 5
            assert (await changes.__anext__()).at == 5.0

    async def test_watchers_share(self, relay_map: RelayMap) -> None:
        """Two tasks may iterate one watcher; both end when the link is closed."""
        async with node_on(relay_map) as node:
            link = await node.connect(new_key().public(), relay=900)
            changes = link.path_changes()
            seen: list[float] = []

            async def watch() -> None:
                seen.extend([change.at async for change in changes])

            with trio.fail_after(1):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(watch)
                    nursery.start_soon(watch)
                    await trio.testing.wait_all_tasks_blocked()
                    changes.push(PathChange(1.0, link.path, link.path, "test"))
                    changes.push(PathChange(2.0, link.path, link.path, "test"))
                    await trio.testing.wait_all_tasks_blocked()
                    link.close()
            assert sorted(seen) == [1.0, 2.0]

    async def test_a_watcher_that_is_dropped_costs_nothing(self, relay_map: RelayMap) -> None:
        """A program that asks again and again does not fill the memory."""
        async with node_on(relay_map) as node:
            link = await node.connect(new_key().public(), relay=900)
            for _ in range(100):
                link.path_changes()
            gc.collect()
            assert len(link._watchers) == 0


async def direct_pair(a: Node, b: Node) -> tuple[Link, Link]:
    link = await a.connect(b.public_key, relay=900)
    await link.send(b"hello")
    other = await b.accept()
    assert await other.receive() == b"hello"
    with trio.fail_after(5):
        for end in (link, other):
            changes = end.path_changes()
            await end.send(b"back")
            while end.path.kind is not PathKind.DIRECT:
                await changes.__anext__()
        await trio.sleep(0.05)
        await link.receive_many()
        await other.receive_many()
    return link, other


async def test_the_last_word_arrives(relay_map: RelayMap) -> None:
    """What is sent by a relay right before the block ends still leaves."""
    async with node_on(relay_map) as b:
        async with node_on(relay_map) as a:
            link = await a.connect(b.public_key, relay=900)
            await link.send(b"goodbye")
        with trio.fail_after(5):
            other = await b.accept()
            assert await other.receive() == b"goodbye"
