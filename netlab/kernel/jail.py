"""The jail: namespaces of users, networks, mounts and processes with nothing but loopback.

    python -m netlab.kernel.jail [--] COMMAND [ARGUMENT...]

Inside, a socket that escaped its host gets ENETUNREACH instead of the real internet; nothing
needs root; and when the jail's first process goes, for whatever reason, the kernel ends every
other one in it and reclaims all that they made.

Three processes make a jail:

    outer   waits, hands signals on, returns the command's status
      init  process 1 of the jail: collects orphans, dies with the outer one
        command

Process 1 can't be the command itself: the kernel ignores signals that process 1 has no handler
for, and nobody would collect orphans.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from netlab.kernel import namespaces
from netlab.kernel.namespaces import NamespaceError, unshare
from netlab.kernel.netlink import Netlink, interface_names, set_link

_PR_SET_PDEATHSIG = 1
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_LOOPBACK_INDEX = 1
_ALL = (
    namespaces.CLONE_NEWUSER
    | namespaces.CLONE_NEWNET
    | namespaces.CLONE_NEWNS
    | namespaces.CLONE_NEWPID
)
_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# Exit statuses of a jail that did not come to run its command, as those of env(1) and nohup(1).
_NO_JAIL, _NO_COMMAND = 125, 127
# First byte of the answer from a call in a jail.
_RESULT, _RAISED, _REFUSED = b"R", b"E", b"J"

_libc = ctypes.CDLL(None, use_errno=True)


class JailError(Exception):
    """No jail can be made here; the message names the setting or tool that stands in the way."""


class JailCallError(Exception):
    """A call in a jail raised (the message holds its traceback), died, or ran out of time."""


def in_jail() -> bool:
    """Whether this process may build labs here: it rules its network, which is only loopback."""
    capabilities = 0
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            capabilities = int(line.split()[1], 16)
    needed = 1 << _CAP_NET_ADMIN | 1 << _CAP_SYS_ADMIN
    return capabilities & needed == needed and not _outside_interfaces()


def _outside_interfaces() -> list[str]:
    # A new namespace may hold the fallback devices of tunnel modules (tunl0, sit0, ...). They
    # are down and lead nowhere; everything else might lead out.
    fallback = {"lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0"}
    fallback |= {"ip6tnl0", "ip6gre0"}
    return [name for name in interface_names() if name not in fallback]


def _read_setting(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def explain_refusal(error: OSError) -> str:
    """Return why the kernel refused user namespaces, and what an administrator can do."""
    limit = _read_setting("/proc/sys/user/max_user_namespaces")
    if limit == "0":
        return "user namespaces are switched off: set the sysctl user.max_user_namespaces to 10000"
    if _read_setting("/proc/sys/kernel/unprivileged_userns_clone") == "0":
        return (
            "only root may create user namespaces: set the sysctl "
            "kernel.unprivileged_userns_clone to 1, or run as root"
        )
    if _read_setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor restricts user namespaces: set the sysctl "
            "kernel.apparmor_restrict_unprivileged_userns to 0, or run as root"
        )
    if error.errno == errno.ENOSPC:
        return (
            "the limit of namespaces is reached: raise the sysctls user.max_user_namespaces "
            "and user.max_net_namespaces"
        )
    if error.errno == errno.EPERM:
        return (
            "the kernel or the container's seccomp filter forbids user namespaces: allow "
            "unshare(CLONE_NEWUSER), or run as root with CAP_SYS_ADMIN"
        )
    return f"the kernel refused the namespaces: {error.strerror}"


def _unshare_all() -> None:
    """Enter new namespaces of every kind; the calling process must have one thread only."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(_ALL)
    except NamespaceError as error:
        # Real root can do without a user namespace where those are forbidden.
        try:
            unshare(_ALL & ~namespaces.CLONE_NEWUSER)
        except NamespaceError:
            raise JailError(explain_refusal(error)) from error
    else:
        try:
            Path("/proc/thread-self/setgroups").write_text("deny")
            Path("/proc/thread-self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/thread-self/gid_map").write_text(f"0 {gid} 1")
        except OSError as error:
            raise JailError(explain_refusal(error)) from error


def _enter() -> None:
    """Finish the jail from its first process: private mounts, own /proc, loopback up."""
    if _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        number = ctypes.get_errno()
        raise JailError(f"cannot make the jail's mounts private: {os.strerror(number)}")
    # Containers that hide parts of /proc forbid a new one. The old one then still serves: it
    # shows the processes under their outer numbers, and /proc/self is right in both.
    _libc.mount(b"proc", b"/proc", b"proc", 0, None)
    with Netlink() as netlink:
        netlink.run([set_link(_LOOPBACK_INDEX, up=True)])
    namespaces.raise_descriptor_limit()


def _exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _forward_signals(process: int) -> None:
    for number in _FORWARDED_SIGNALS:
        signal.signal(number, lambda number, _: os.kill(process, number))


def _run_init(work: Callable[[], int], refuse: Callable[[JailError], None], alive: int) -> NoReturn:
    """Be process 1: fork `work`, collect orphans until it ends, exit with its status.

    `alive` is the read end of a pipe that the outer process holds open: it tells whether that
    one died before the kernel knew that this process is to die with it.
    """
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if select.select([alive], [], [], 0)[0]:
            os._exit(_NO_JAIL)
        _enter()
        child = os.fork()
        if child == 0:
            os._exit(work())
        _forward_signals(child)
        while True:
            ended, status = os.wait()
            if ended == child:
                os._exit(_exit_status(status))
    except JailError as error:
        refuse(error)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(_NO_JAIL)


def _become_jail(work: Callable[[], int], refuse: Callable[[JailError], None]) -> NoReturn:
    """Turn this process into a jail's outer process; exit with the status of `work`."""
    try:
        _unshare_all()
        alive, held = os.pipe()
        init = os.fork()
        if init == 0:
            os.close(held)
            _run_init(work, refuse, alive)
        _forward_signals(init)
        os._exit(_exit_status(os.waitpid(init, 0)[1]))
    except JailError as error:
        refuse(error)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(_NO_JAIL)


def run_in_jail(command: Sequence[str]) -> NoReturn:
    """Replace this process by a jail that runs `command`; never returns.

    The exit status is the command's, 128 + n after signal n, 127 when there is no such command,
    or 125 when no jail can be made (standard error then says why). Call it early: the process
    must still be single-threaded.
    """
    sys.stdout.flush()
    sys.stderr.flush()

    def work() -> int:
        try:
            os.execvp(command[0], list(command))
        except OSError as error:
            print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            return _NO_COMMAND

    def refuse(error: JailError) -> None:
        print(f"no jail: {error}", file=sys.stderr, flush=True)

    _become_jail(work, refuse)


def call_in_jail(function: Callable[[], bytes], *, timeout_seconds: float = 120.0) -> bytes:
    """Run `function` in a forked copy of this process inside a jail; return what it returns.

    Works from a multi-threaded process too (a pytest-xdist worker): the copy has one thread.
    The copy must not use what other threads of this process may hold, and ends by `os._exit`.

    Raises:
        JailError: no jail can be made here.
        JailCallError: the copy raised, died, or took longer than `timeout_seconds`, in which
            case everything in its jail has been killed.
    """
    receiver, sender = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()

    def work() -> int:
        try:
            sender.sendall(_RESULT + function())
        except BaseException:
            sender.sendall(_RAISED + traceback.format_exc().encode())
        return 0

    with warnings.catch_warnings():
        # Python 3.12 warns of every fork with threads around. The copy only runs `function`.
        warnings.simplefilter("ignore", DeprecationWarning)
        outer = os.fork()
    if outer == 0:
        receiver.close()
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        _become_jail(work, lambda error: sender.sendall(_REFUSED + str(error).encode()))
    sender.close()
    try:
        answer = _receive_answer(receiver, timeout_seconds)
    finally:
        receiver.close()
        os.kill(outer, signal.SIGKILL)
        os.waitpid(outer, 0)
    kind, payload = answer[:1], answer[1:]
    if kind == _RESULT:
        return payload
    if kind == _REFUSED:
        raise JailError(payload.decode())
    if kind == _RAISED:
        raise JailCallError(f"the call in the jail raised:\n{payload.decode()}")
    raise JailCallError("the process in the jail died without an answer")


def _receive_answer(receiver: socket.socket, timeout_seconds: float) -> bytes:
    deadline = time.monotonic() + timeout_seconds
    chunks: list[bytes] = []
    while True:
        # A timeout of exactly 0 would mean "do not block" instead of "out of time".
        receiver.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            chunk = receiver.recv(1 << 20)
        except TimeoutError:
            raise JailCallError(
                f"the call in the jail took longer than {timeout_seconds:g} s and was killed"
            ) from None
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def main(arguments: Sequence[str]) -> NoReturn:
    """Run the command given as arguments in a jail."""
    command = list(arguments[1:] if arguments[:1] == ["--"] else arguments)
    if not command:
        print("usage: python -m netlab.kernel.jail [--] COMMAND [ARGUMENT...]", file=sys.stderr)
        sys.exit(2)
    run_in_jail(command)


if __name__ == "__main__":
    main(sys.argv[1:])
