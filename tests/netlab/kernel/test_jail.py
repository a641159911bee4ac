"""The jail: what it lets in, what it lets out, and that nothing survives it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from netlab.kernel import jail
from netlab.kernel.builder import Built
from netlab.kernel.jail import JailCallError, JailError, call_in_jail, explain_refusal, in_jail
from netlab.kernel.netlink import interface_names
from netlab.kernel.wiring import plan_wiring
from netlab.model import Host, Nat, Server, Topology, Uplink

JAIL = [sys.executable, "-m", "netlab.kernel.jail", "--"]


@pytest.fixture(autouse=True)
def _skip_where_the_kernel_forbids() -> None:
    try:
        call_in_jail(lambda: b"")
    except JailError as error:
        pytest.skip(f"no jail here: {error}")


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "a process outlived its jail"
        time.sleep(0.002)


@pytest.mark.jail
def test_inside_there_is_only_loopback() -> None:
    """A jailed process rules a network that has nothing but loopback, and knows it."""
    assert in_jail()
    assert "lo" in interface_names()
    assert "eth0" not in interface_names()


def test_a_command_runs_inside_with_its_status_and_output() -> None:
    """The command sees a network of its own; its exit status comes back."""
    script = "cat /proc/thread-self/net/dev; exit 7"
    done = subprocess.run([*JAIL, "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 7
    interfaces = [line.split(":")[0].strip() for line in done.stdout.splitlines() if ":" in line]
    assert "lo" in interfaces
    assert "eth0" not in interfaces


def test_a_missing_command_is_named() -> None:
    """A command that isn't there gives status 127 and its name."""
    done = subprocess.run([*JAIL, "no-such-command"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        127,
        "cannot run no-such-command: No such file or directory\n",
    )


def test_no_command_prints_the_usage() -> None:
    """Without a command there is nothing to do, and the usage says so."""
    done = subprocess.run(JAIL, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_builds_a_lab() -> None:
    """Without root a jail and a lab with an nftables NAT in it work all the same."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            # Changing the user hides /proc/self from it; a process that was an ordinary user's
            # from the beginning sees it.
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
            assert call_in_jail(build_and_use_a_lab) == b"hello"
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def build_and_use_a_lab() -> bytes:
    topology = Topology(
        nats=(Nat(name="n"),),
        hosts=(Host(name="a", uplinks=(Uplink(network="n"),)),),
        servers=(Server(name="s"),),
    )
    built = Built(plan_wiring(topology))
    built.build()
    address = str(built.wiring.addresses.servers["s"].ipv4[0]), 3478
    with (
        built.namespaces["a"].socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        built.namespaces["s"].socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        server.bind(address)
        server.settimeout(5)
        client.sendto(b"hello", address)
        return server.recv(100)


def test_a_signal_reaches_the_command() -> None:
    """SIGTERM to the outer process ends the command, as 128 + 15."""
    with subprocess.Popen([*JAIL, "sh", "-c", "echo ready; exec sleep 60"], stdout=-1) as outer:
        assert outer.stdout is not None
        outer.stdout.readline()
        outer.terminate()
        assert outer.wait(5) == 128 + signal.SIGTERM


def test_sigkill_leaves_nothing_running() -> None:
    """When the outer process is killed, even programs that detached themselves are gone."""
    # Before the jail has its own /proc, numbers inside it differ from ours: find them by name.
    marker = f"86400.{os.getpid()}"
    script = f"setsid sleep {marker} & sleep {marker} & echo ready; wait"
    with subprocess.Popen([*JAIL, "sh", "-c", script], stdout=-1) as outer:
        assert outer.stdout is not None
        outer.stdout.readline()
        deadline = time.monotonic() + 5
        while len(sleepers := processes_with(marker)) < 3:
            assert time.monotonic() < deadline
        outer.kill()
        outer.wait(5)
    wait_until_gone(*sleepers)


def processes_with(argument: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if argument.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return [pid for pid in found if pid != os.getpid()]


def test_a_call_in_a_jail_returns_what_it_returned() -> None:
    """The bytes come back whole, also many of them."""
    assert call_in_jail(lambda: b"x" * 5_000_000) == b"x" * 5_000_000


def test_a_call_in_a_jail_tells_what_was_raised() -> None:
    """The traceback of the copy is in the error."""
    with pytest.raises(JailCallError, match="ZeroDivisionError"):
        call_in_jail(lambda: bytes(1 // 0))


def test_a_call_that_hangs_is_killed_with_all_it_started() -> None:
    """Out of time, the caller gets an error and the jail's processes are gone."""
    marker = f"86401.{os.getpid()}"

    def hang() -> bytes:
        subprocess.run(["sleep", marker], check=True)
        return b""

    with pytest.raises(JailCallError, match=r"longer than 0\.3 s"):
        call_in_jail(hang, timeout_seconds=0.3)
    wait_until_gone(*processes_with(marker))


@pytest.mark.parametrize(
    ("settings", "number", "remedy"),
    [
        ({"/proc/sys/user/max_user_namespaces": "0"}, 28, "user.max_user_namespaces"),
        (
            {"/proc/sys/kernel/unprivileged_userns_clone": "0"},
            1,
            "kernel.unprivileged_userns_clone",
        ),
        (
            {"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"},
            13,
            "kernel.apparmor_restrict_unprivileged_userns",
        ),
        ({}, 28, "user.max_net_namespaces"),
        ({}, 1, "seccomp"),
    ],
)
def test_a_refusal_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], number: int, remedy: str
) -> None:
    """Each way a kernel forbids user namespaces leads to the setting that allows them."""
    monkeypatch.setattr(jail, "_read_setting", settings.get)
    assert remedy in explain_refusal(OSError(number, os.strerror(number)))
