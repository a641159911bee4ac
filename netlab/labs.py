"""One small interface to both back ends, so that a scenario runs on either unchanged.

async with open_lab(topology, BackEnd.SIMULATED) as lab:
    async with lab.host("a"):
        ...
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractContextManager, asynccontextmanager
from enum import StrEnum
from importlib import import_module
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, cast

import trio

import netlab
from netlab.addresses import AddressPlan
from netlab.behavior import Link, ModelError
from netlab.host_names import names_for_programs
from netlab.model import INTERNET, Topology
from netlab.timeline import NetworkChanged, Timeline

if TYPE_CHECKING:
    from netlab.kernel.lab import KernelLab
    from netlab.simulated import SimulatedInternet

Say = Callable[[str], None]
Entry = Callable[..., Awaitable[None]]

# A line longer than this is no message for people; the rest of it is shown as more lines.
_MAX_LINE_BYTES = 16_384


class BackEnd(StrEnum):
    """What makes the network."""

    SIMULATED = "simulated"
    KERNEL = "kernel"


class RunningHost(Protocol):
    """A host or server of a running lab; ``async with host:`` puts the task into it."""

    name: str

    async def __aenter__(self) -> object: ...
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...
    @property
    def addresses(self) -> tuple[str, ...]: ...
    def roam(self, network: str, *, keep_old: bool = False) -> None: ...
    def disconnect(self) -> None: ...
    def cut(self, network: str | None = None) -> None: ...
    def heal(self, network: str | None = None) -> None: ...


class RunningNat(Protocol):
    """A NAT of a running lab."""

    name: str

    def reboot(self) -> None: ...
    def renumber(self, external: tuple[bytes, ...]) -> None: ...
    def cut(self) -> None: ...
    def heal(self) -> None: ...


class ProgramError(Exception):
    """A program of a scenario cannot be started; the message says what to do."""


def load_entry(name: str) -> Entry:
    """Return the Trio function ``module:function``.

    Raises:
        ProgramError: there is no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(import_module(module_name), function_name)
    except ImportError as error:
        raise ProgramError(f'cannot import "{module_name}" of "{name}": {error}') from error
    except AttributeError:
        raise ProgramError(f'"{module_name}" has no function "{function_name}"') from None
    return cast(Entry, function)


class Lab:
    """A running lab. What the two back ends do alike is here, the rest in the subclasses."""

    back_end: BackEnd

    def __init__(self, topology: Topology, timeline: Timeline, addresses: AddressPlan) -> None:
        self.topology = topology
        self.timeline = timeline
        self.addresses = addresses
        self._external = {name: tuple(plan.outside.ipv4) for name, plan in addresses.nats.items()}
        self._ever_used = {
            address for addresses in self._external.values() for address in addresses
        } | {
            address
            for plans in (*addresses.hosts.values(), *((p,) for p in addresses.servers.values()))
            for plan in plans
            for address in plan.ipv4
        }

    def now(self) -> float:
        """Return the seconds since the lab started."""
        raise NotImplementedError

    def host(self, name: str) -> RunningHost:
        """Return a host or server.

        Raises:
            ModelError: there is none of this name.
        """
        raise NotImplementedError

    def nat(self, name: str) -> RunningNat:
        """Return a NAT.

        Raises:
            ModelError: there is none of this name.
        """
        raise NotImplementedError

    def set_link(self, owner: str, network: str | None, link: Link) -> None:
        """Change what the link between a machine and a network does, in both directions."""
        raise NotImplementedError

    def log_in(self, nat: str, host: str) -> None:
        """Let a host through a NAT's captive portal."""
        raise NotImplementedError

    async def run_program(
        self, host: str, command: tuple[str, ...], python: str, arguments: tuple[str, ...], say: Say
    ) -> int:
        """Run a program to its end and return its status; `say` gets its lines.

        Raises:
            ProgramError: it cannot be started.
        """
        raise NotImplementedError

    async def let_pass(self, nats: Collection[str], seconds: float) -> None:
        """Let so much time pass for NATs and their mappings.

        Simulated time passes for all; in the kernel only these NATs' clocks jump ahead.
        """
        await trio.sleep(seconds)

    def engine(self, nat: str) -> str:
        """Return what translates for a NAT on the kernel back end: nft or user."""
        return ""

    async def run_on_terminal(self, machine: str, command: tuple[str, ...]) -> int:
        """Run a command in a host, server or NAT with this process's terminal as its own.

        Raises:
            ProgramError: it cannot be started.
        """
        raise ProgramError("only the kernel back end runs commands")

    def address(self, machine: str, *, ipv6: bool = False) -> str:
        """Return a host's or server's first address of a family.

        Raises:
            ModelError: it has none.
        """
        for address in self.host(machine).addresses:
            if (":" in address) == ipv6:
                return address
        raise ModelError(f'host "{machine}"', f"has no IPv{6 if ipv6 else 4} address")

    def external(self, nat: str) -> tuple[IPv4Address, ...]:
        """Return a NAT's external addresses as they are now."""
        return self._external[nat]

    def cut_or_heal(self, machine: str, network: str | None, *, heal: bool) -> None:
        """Stop or start carrying packets on a machine's link."""
        if machine in self.topology.nat_by_name:
            nat = self.nat(machine)
            (nat.heal if heal else nat.cut)()
        else:
            host = self.host(machine)
            (host.heal if heal else host.cut)(network)

    def renumber(self, name: str) -> tuple[IPv4Address, ...]:
        """Give a NAT external addresses that nobody had before, and return them.

        Raises:
            ModelError: its network has none left.
        """
        nat = self.topology.nat_by_name[name]
        if nat.uplink.network == INTERNET:
            around = IPv4Network(f"2.{nat.operator}.0.0/16")
        else:
            inside = self.addresses.nats[nat.uplink.network].inside_ipv4
            if inside is None:
                raise ModelError(f'nat "{name}"', "there is no IPv4 around it to renumber in")
            around = inside
        fresh: list[IPv4Address] = []
        candidate = int(around.broadcast_address)
        while len(fresh) < len(self._external[name]):
            candidate -= 1
            if candidate <= int(around.network_address) + 1:
                raise ModelError(f'nat "{name}"', f"{around} has no address left")
            if IPv4Address(candidate) not in self._ever_used:
                fresh.append(IPv4Address(candidate))
        self._ever_used.update(fresh)
        self.nat(name).renumber(tuple(address.packed for address in fresh))
        self._external[name] = tuple(fresh)
        return self._external[name]


class SimulatedLab(Lab):
    """The simulated back end."""

    back_end = BackEnd.SIMULATED

    def __init__(self, internet: SimulatedInternet) -> None:
        super().__init__(internet.topology, internet.timeline, internet.plan)
        self.internet = internet

    def now(self) -> float:
        return self.internet.world.now()

    def host(self, name: str) -> RunningHost:
        return self.internet.host(name)

    def nat(self, name: str) -> RunningNat:
        return self.internet.nat(name)

    def set_link(self, owner: str, network: str | None, link: Link) -> None:
        if owner in self.topology.nat_by_name:
            attachments = [self.internet.nat(owner).outside]
        else:
            host = self.internet.host(owner)
            chosen = [host.interface(network)] if network else host.interfaces[:1]
            attachments = [interface.attachment for interface in chosen]
        for attachment in attachments:
            attachment.up.link = attachment.down.link = link
        change = NetworkChanged(at=self.now(), what="link", target=owner, detail=network or "")
        self.timeline.add(change)

    def log_in(self, nat: str, host: str) -> None:
        self.internet.nat(nat).log_in(self.internet.host(host))

    async def run_program(
        self, host: str, command: tuple[str, ...], python: str, arguments: tuple[str, ...], say: Say
    ) -> int:
        if not python:
            raise ProgramError(
                f'"{command[0]}" is a command line, which needs the kernel back end; '
                'the simulated one runs Trio functions (python = "module:function")'
            )
        entry = load_entry(python)
        async with self.host(host):
            await entry(say, *arguments)
        return 0


class RunningKernelLab(Lab):
    """The kernel back end."""

    back_end = BackEnd.KERNEL

    def __init__(self, lab: KernelLab) -> None:
        super().__init__(lab.topology, lab.timeline, lab.plan)
        self.lab = lab

    def now(self) -> float:
        return self.lab.now()

    def host(self, name: str) -> RunningHost:
        return self.lab.host(name)

    def nat(self, name: str) -> RunningNat:
        return self.lab.nat(name)

    def set_link(self, owner: str, network: str | None, link: Link) -> None:
        nats = self.topology.nat_by_name
        machine = self.lab.nat(owner) if owner in nats else self.lab.host(owner)
        machine.set_link(link, network=network or None)

    def log_in(self, nat: str, host: str) -> None:
        self.lab.nat(nat).log_in(self.lab.host(host))

    async def run_program(
        self, host: str, command: tuple[str, ...], python: str, arguments: tuple[str, ...], say: Say
    ) -> int:
        environment = {**os.environ, "PATH": program_path()}
        if not command:
            load_entry(python)
            package = str(Path(netlab.__file__).parent.parent)
            path = environment.get("PYTHONPATH", "")
            environment["PYTHONPATH"] = f"{package}{os.pathsep}{path}" if path else package
            command = (sys.executable, "-m", "netlab.program", python, *arguments)
        elif not python:
            command = (*command, *arguments)
        try:
            process = await self.lab.host(host).open_process(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
            )
        except OSError as error:
            raise ProgramError(f"cannot start {command[0]}: {error.strerror}") from error
        assert process.stdout is not None
        try:
            await _read_lines(process.stdout, say)
            return await process.wait()
        except BaseException:
            process.kill()
            raise

    async def let_pass(self, nats: Collection[str], seconds: float) -> None:
        for name in nats:
            self.lab.nat(name).advance(seconds)
        await trio.lowlevel.checkpoint()

    def engine(self, nat: str) -> str:
        return str(self.lab.nat(nat).engine)

    async def run_on_terminal(self, machine: str, command: tuple[str, ...]) -> int:
        is_nat = machine in self.topology.nat_by_name
        place = self.lab.nat(machine) if is_nat else self.lab.host(machine)
        process = os.readlink("/proc/self")
        namespace = f"/proc/{process}/fd/{place.namespace.descriptor}"
        done = await trio.run_process(
            ["nsenter", f"--net={namespace}", "--", *command], stdin=None, check=False
        )
        return done.returncode


def program_path() -> str:
    """Return where programs are looked for: first beside this Python, so that those of its virtual
    environment are found without activating it."""
    own = str(Path(sys.executable).parent)
    return os.pathsep.join(filter(None, (own, os.environ.get("PATH"))))


async def _read_lines(stream: trio.abc.ReceiveStream, say: Say) -> None:
    left = b""
    async for chunk in stream:
        *lines, left = (left + chunk).split(b"\n")
        if len(left) > _MAX_LINE_BYTES:
            lines, left = [*lines, left], b""
        for line in lines:
            say(line.decode(errors="replace").rstrip("\r"))
    if left:
        say(left.decode(errors="replace"))


@asynccontextmanager
async def _packets_on_timeline(lab: KernelLab, snap_bytes: int) -> AsyncIterator[None]:
    from netlab.packet_watch import PacketWatch

    hosts = (*lab.topology.host_by_name, *lab.topology.server_by_name)
    namespaces = {name: lab.namespaces[name] for name in hosts}
    watch = PacketWatch(namespaces, lab.timeline, time.monotonic() - lab.now(), snap_bytes)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
                watch.look(everything=True)
    finally:
        watch.close()


def _names_in_kernel(lab: KernelLab, name_servers: Collection[str]) -> AbstractContextManager[None]:
    topology = lab.topology
    hosts = (*topology.host_by_name, *topology.server_by_name)
    names = {name: lab.host(name).addresses for name in hosts}
    if name_servers and any(nat.behavior.nat64 for nat in topology.nats):
        # One hosts file serves all, and only a DNS64 can give each the address that it can reach.
        names = {
            name: found for name, found in names.items() if any(":" in address for address in found)
        }
    servers = [address for name in name_servers for address in lab.host(name).addresses]
    return names_for_programs(names, servers)


@asynccontextmanager
async def open_lab(
    topology: Topology,
    back_end: BackEnd,
    *,
    adjustable: Collection[str] = (),
    record_packets: bool = True,
    snap_bytes: int = 0,
    name_servers: Collection[str] = (),
) -> AsyncIterator[Lab]:
    """Build a topology and take it down in the end.

    Args:
        topology: the lab.
        back_end: what builds it; the kernel needs the process to be in a jail.
        adjustable: owners of links that `Lab.set_link` may change later.
        record_packets: whether each packet of the hosts goes on the timeline.
        snap_bytes: how much of each packet's contents goes with it, for captures.
        name_servers: servers that will offer DNS, for programs in the kernel.

    Raises:
        JailError, BuildError, FabricError: the kernel back end cannot be built here.
    """
    if back_end is BackEnd.KERNEL:
        from netlab.kernel.lab import KernelLab

        async with KernelLab(topology, adjustable=adjustable) as kernel_lab:
            with _names_in_kernel(kernel_lab, name_servers):
                if record_packets:
                    async with _packets_on_timeline(kernel_lab, snap_bytes):
                        yield RunningKernelLab(kernel_lab)
                else:
                    yield RunningKernelLab(kernel_lab)
        return
    from netlab.simulated import SimulatedInternet

    async with SimulatedInternet(
        topology, record_packets=record_packets, snap_bytes=snap_bytes
    ) as internet:
        yield SimulatedLab(internet)
