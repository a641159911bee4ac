"""A lab in the kernel: `async with KernelLab(topology) as lab`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import msgspec
import trio

from netlab.addresses import AddressPlan
from netlab.behavior import ModelError, Translation, suggest
from netlab.kernel.builder import Built
from netlab.kernel.fabric_client import FabricError, FabricProcess
from netlab.kernel.fidelity import Engine
from netlab.kernel.jail import JailError, in_jail
from netlab.kernel.machines import KernelHost, KernelMachine, KernelNat
from netlab.kernel.namespaces import NetworkNamespace
from netlab.kernel.nft import Router
from netlab.kernel.observe import NatObserver
from netlab.kernel.sockets import LabResolver, install_hooks
from netlab.kernel.wiring import Wiring, plan_wiring
from netlab.model import INTERNET, Topology
from netlab.timeline import Event, NetworkChanged, Note, Timeline

_MAX_EVENT_BYTES = 65536


class KernelLab:
    """A topology as Linux namespaces, alive within an ``async with`` block.

    Inside the block, ``async with lab.host("a"):`` puts a task tree into a host: every socket
    that Trio makes there belongs to it, and the lab's machine names resolve.

    Args:
        topology: the lab.
        seed: replaces the topology's.
        timeline: where events go; a new one if absent.
        names: extra names for the resolver, with their addresses. Servers, and hosts that are
            on the internet itself, have their own names anyway.
        engines: NATs that must use this engine, whatever the fidelity table says.
        adjustable: owners of links that `set_link` may change later.
        observe: whether mappings and drops of NATs in the kernel go on the timeline, as those of
            the user engine always do. It costs two sockets for each.
        nat_time_scale: how many seconds of NAT lifetime pass in one real second on the user
            engine. The kernel's own timers can't be scaled.

    Raises (on entering):
        JailError: this process isn't in a jail.
        BuildError, NamespaceError, NetlinkError, NftError: the kernel refused something.
        FabricError: the fabric process failed.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        seed: int | None = None,
        timeline: Timeline | None = None,
        names: Mapping[str, Iterable[str]] | None = None,
        engines: Mapping[str, Engine] | None = None,
        adjustable: Collection[str] = (),
        observe: bool = True,
        nat_time_scale: float = 1.0,
    ) -> None:
        self.topology = topology if seed is None else replace(topology, seed=seed)
        self.wiring: Wiring = plan_wiring(
            self.topology, engines=engines, pumped=adjustable, log_drops=observe
        )
        self.routers: dict[str, Router] = {
            name: machine.router
            for name, machine in self.wiring.machines.items()
            if machine.router is not None
        }
        self.timeline = Timeline() if timeline is None else timeline
        self._extra_names = {name.lower(): tuple(found) for name, found in (names or {}).items()}
        self._observe = observe
        self.observers: dict[str, NatObserver] = {}
        self._nat_time_scale = nat_time_scale
        self._built = Built(self.wiring)
        self._fabric: FabricProcess | None = None
        self._machines: dict[str, KernelMachine] = {}
        self._started = 0.0
        self.programs: list[trio.Process] = []
        """What was started in hosts; whatever of it is left when the lab ends is killed."""
        self.has_run_programs = False
        """Whether any command line was made for a host, so that some program may be left."""
        self._stack = AsyncExitStack()

    # --- looking -------------------------------------------------------------------------

    @property
    def plan(self) -> AddressPlan:
        """Every address as planned; `KernelNat.external` follows renumbering."""
        return self.wiring.addresses

    @property
    def namespaces(self) -> Mapping[str, NetworkNamespace]:
        """The namespaces by machine name; `INTERNET` is the core."""
        return self._built.namespaces

    @property
    def fabric(self) -> FabricProcess:
        """The process that carries impaired links and user-space NATs.

        Raises:
            FabricError: this lab has none.
        """
        if self._fabric is None:
            raise FabricError("this lab has no impaired link and no user-space NAT")
        return self._fabric

    def now(self) -> float:
        """Return the seconds since the lab was built."""
        return time.monotonic() - self._started

    def host(self, name: str) -> KernelHost:
        """Return a host or server.

        Raises:
            ModelError: there is none of this name.
        """
        machine = self._machines.get(name)
        if isinstance(machine, KernelHost):
            return machine
        known = [name for name, m in self._machines.items() if isinstance(m, KernelHost)]
        raise ModelError(f'host "{name}"', f"no such host or server; {suggest(name, known)}")

    def nat(self, name: str) -> KernelNat:
        """Return a NAT.

        Raises:
            ModelError: there is none of this name.
        """
        machine = self._machines.get(name)
        if isinstance(machine, KernelNat):
            return machine
        known = [name for name, m in self._machines.items() if isinstance(m, KernelNat)]
        raise ModelError(f'nat "{name}"', f"no such NAT; {suggest(name, known)}")

    def note(self, text: str) -> None:
        """Put a remark on the timeline."""
        self.timeline.add(Note(at=self.now(), text=text))

    # --- changing ------------------------------------------------------------------------

    def advance_nats(self, seconds: float) -> None:
        """Let the clocks of all NATs jump ahead, on either engine (see `KernelNat.advance`)."""
        for name in self.routers:
            self.nat(name).advance(seconds)

    def record_change(self, what: str, target: str, detail: str) -> None:
        """Put a change of the network on the timeline."""
        self.timeline.add(NetworkChanged(at=self.now(), what=what, target=target, detail=detail))

    # --- life ----------------------------------------------------------------------------

    async def __aenter__(self) -> KernelLab:
        if not in_jail():
            raise JailError(
                "a lab is only built in a jail, where nothing can leak: run the program with "
                "`python -m netlab.kernel.jail -- COMMAND`"
            )
        try:
            await self._stack.enter_async_context(self._running())
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        wiring = self.wiring
        needs_fabric = any(cable.pumped for cable in wiring.cables)
        try:
            if needs_fabric:
                self._fabric = FabricProcess()
            self._built.build()
            self._started = time.monotonic()
            self._make_machines()
            if self._observe:
                self._start_observing()
            if self._fabric is not None:
                self._connect_fabric(self._fabric)
            names = self._public_names() | self._extra_names
            restore = install_hooks(LabResolver(names, self._is_behind_nat64))
            try:
                async with trio.open_nursery() as nursery:
                    if self._fabric is not None:
                        nursery.start_soon(self._follow_events, self._fabric)
                    for observer in self.observers.values():
                        nursery.start_soon(observer.run)
                    yield
                    nursery.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                # This nursery is ours: the body's own error should look as if it weren't there.
                if len(group.exceptions) == 1:
                    raise group.exceptions[0] from None
                raise
            finally:
                restore()
        finally:
            self._close()

    def _make_machines(self) -> None:
        plans, namespaces = self.plan, self.namespaces
        for host in self.topology.hosts:
            self._machines[host.name] = KernelHost(
                self, host.name, namespaces[host.name], plans.hosts[host.name]
            )
        for server in self.topology.servers:
            self._machines[server.name] = KernelHost(
                self, server.name, namespaces[server.name], [plans.servers[server.name]]
            )
        for nat in self.topology.nats:
            self._machines[nat.name] = KernelNat(self, nat.name, namespaces[nat.name])

    def _start_observing(self) -> None:
        for name, router in self.routers.items():
            if self.wiring.machines[name].rules:
                namespace = self.namespaces[name]
                observer = NatObserver(router, namespace, self.now, self.timeline.add)
                self.observers[name] = observer

    def _is_behind_nat64(self, namespace: NetworkNamespace) -> bool:
        hosts = (m for m in self._machines.values() if isinstance(m, KernelHost))
        return any(host.is_behind_nat64 for host in hosts if host.namespace is namespace)

    def _public_names(self) -> dict[str, tuple[str, ...]]:
        interfaces = dict(self.plan.servers)
        for name, plans in self.plan.hosts.items():
            for plan in plans:
                if plan.network == INTERNET:
                    interfaces[name] = plan
        return {
            name.lower(): tuple(map(str, (*plan.ipv4, *plan.ipv6)))
            for name, plan in interfaces.items()
        }

    def _connect_fabric(self, fabric: FabricProcess) -> None:
        seed, tuns = self.topology.seed, self._built.tuns
        fabric.post("set_clock", self._started, self._nat_time_scale)
        for cable in self.wiring.cables:
            if cable.pumped:
                ends = tuple(tuns[e.machine, e.name] for e in (cable.inner, cable.outer))
                link_seed = f"link {cable.key} {seed}"
                fabric.post(
                    "add_pump",
                    cable.key,
                    cable.upload,
                    cable.download,
                    link_seed,
                    descriptors=ends,
                )
        for nat in self.wiring.user_nats:
            router = nat.router
            translates = router.behavior.translation is not Translation.NONE
            external = router.plan.outside.ipv4 if translates else ()
            fabric.post(
                "add_nat",
                router.name,
                nat.uplink.key,
                router.behavior,
                [address.packed for address in external],
                [address.packed for address in router.inside],
                f"nat {router.name} {seed}",
                descriptors=(tuns[nat.inside.machine, nat.inside.name],),
            )
        fabric.call("statistics")
        self._built.close_tuns()

    async def _follow_events(self, fabric: FabricProcess) -> None:
        """Put what the fabric tells on the timeline."""
        decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
        events = fabric.events
        events.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(events)
            for _ in range(256):
                try:
                    data = events.recv(_MAX_EVENT_BYTES)
                except BlockingIOError:
                    break
                if not data:
                    raise FabricError("the fabric process died; its error is on standard error")
                self.timeline.add(decoder.decode(data))

    def _close(self) -> None:
        """Kill what still runs in the lab and let go of it."""
        try:
            if self.has_run_programs:
                self._kill_leftovers()
            if self._fabric is not None:
                self._fabric.close()
        finally:
            self._fabric = None
            for observer in self.observers.values():
                observer.close()
            self.observers.clear()
            self._machines.clear()
            self._built.close()

    def _kill_leftovers(self) -> None:
        # A program that was only just started may not have entered its host yet.
        for program in self.programs:
            program.kill()
        ours = {os.fstat(ns.descriptor).st_ino for ns in self.namespaces.values()}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if (entry / "ns/net").stat().st_ino in ours:
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue  # it ended by itself, or belongs to somebody else
