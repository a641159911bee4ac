"""Setting WireGuard up: the kernel's is modeled by programs that note how they are called."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from traversal.agent import wireguard
from traversal.agent.wireguard import (
    WireGuardError,
    WireGuardInterface,
    WireGuardPeer,
    make_commands,
    make_config,
    run_wireguard,
    sync_wireguard,
)
from traversal.wire.address import Address

INTERFACE = WireGuardInterface(
    "wg7",
    "cHJpdmF0ZQ==",
    (ipaddress.ip_interface("10.88.0.1/24"), ipaddress.ip_interface("fd00:88::1/64")),
    51820,
    1380,
)
PEERS = (
    WireGuardPeer(
        "cHVibGlj",
        (ipaddress.ip_network("10.88.0.2/32"), ipaddress.ip_network("10.99.0.0/16")),
        Address("127.0.0.1", 40001),
    ),
    WireGuardPeer("b3RoZXI=", (ipaddress.ip_network("fd00:99::/48"),), Address("127.0.0.1", 40002)),
)


def test_config_text() -> None:
    """What `wg setconf` reads: our key and port, each peer's key, networks and bridge."""
    assert make_config(INTERFACE, PEERS) == (
        "[Interface]\nPrivateKey = cHJpdmF0ZQ==\nListenPort = 51820\n"
        "[Peer]\nPublicKey = cHVibGlj\nAllowedIPs = 10.88.0.2/32, 10.99.0.0/16\n"
        "Endpoint = 127.0.0.1:40001\n"
        "[Peer]\nPublicKey = b3RoZXI=\nAllowedIPs = fd00:99::/48\nEndpoint = 127.0.0.1:40002\n"
    )
    assert INTERFACE.key not in repr(INTERFACE)


def test_commands() -> None:
    """Addresses, then up, then routes for what is not on the interface's own networks."""
    assert [" ".join(command) for command in make_commands(INTERFACE, PEERS)] == [
        "ip address add 10.88.0.1/24 dev wg7",
        "ip address add fd00:88::1/64 dev wg7",
        "ip link set dev wg7 mtu 1380 up",
        "ip -4 route replace 10.99.0.0/16 dev wg7",
        "ip -6 route replace fd00:99::/48 dev wg7",
    ]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all of PATH; what `ip` and `wg` were called with is in its file `log`."""
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "cat").symlink_to("/bin/cat")
    for name in ("ip", "wg"):
        write_program(directory / name, f'echo "{name} $@" >> {directory}/log')
    monkeypatch.setenv("PATH", str(directory))
    return directory


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


async def test_kernel(programs: Path, nursery: trio.Nursery) -> None:
    """The kernel makes the interface; it is configured, and deleted at the end."""
    write_program(programs / "wg", f'echo "wg $@" >> {programs}/log; cat > {programs}/config')
    kind = await nursery.start(run_wireguard, INTERFACE, PEERS)
    assert kind == "kernel"
    assert (programs / "config").read_text() == make_config(INTERFACE, PEERS)
    lines = (programs / "log").read_text().splitlines()
    assert lines[:2] == ["ip link add dev wg7 type wireguard", "wg setconf wg7 /dev/stdin"]
    assert lines[2:] == [" ".join(command) for command in make_commands(INTERFACE, PEERS)]
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True), trio.fail_after(5):
        while "delete" not in (programs / "log").read_text():  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert (programs / "log").read_text().splitlines()[-1] == "ip link delete dev wg7"


async def test_full_tunnel(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    """A peer that is allowed everything gets a table of its own, which rules lead to, except for
    what is marked; the rules go at the end."""
    valid_mark = tmp_path / "src_valid_mark"
    monkeypatch.setattr(wireguard, "VALID_MARK", trio.Path(valid_mark))
    everything = tuple(map(ipaddress.ip_network, ("0.0.0.0/0", "::/0", "10.9.0.0/16")))
    peer = WireGuardPeer("cHVibGlj", everything, Address("127.0.0.1", 40001))
    assert await nursery.start(run_wireguard, replace(INTERFACE, mark=30064), (peer,)) == "kernel"
    assert valid_mark.read_text() == "1"
    rules = [
        "ip -4 rule add not fwmark 30064 table 30064",
        "ip -4 rule add table main suppress_prefixlength 0",
        "ip -6 rule add not fwmark 30064 table 30064",
        "ip -6 rule add table main suppress_prefixlength 0",
    ]
    assert (programs / "log").read_text().splitlines()[-7:] == [
        "ip -4 route replace 0.0.0.0/0 dev wg7 table 30064",
        "ip -6 route replace ::/0 dev wg7 table 30064",
        "ip -4 route replace 10.9.0.0/16 dev wg7",
        *rules,
    ]
    nursery.cancel_scope.cancel()
    with trio.CancelScope(shield=True), trio.fail_after(5):
        while "link delete" not in (programs / "log").read_text():  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert (programs / "log").read_text().splitlines()[-5:] == [
        *(rule.replace("add", "delete") for rule in rules),
        "ip link delete dev wg7",
    ]


async def test_other_peers(programs: Path) -> None:
    """`wg syncconf` leaves sessions of those that stay alone; routes follow."""
    write_program(programs / "wg", f'echo "wg $@" >> {programs}/log; cat > {programs}/config')
    newcomer = WireGuardPeer(
        "bmV3", (ipaddress.ip_network("10.77.0.0/16"),), Address("127.0.0.1", 40003)
    )
    after = (PEERS[0], newcomer)
    await sync_wireguard(INTERFACE, PEERS, after)
    assert (programs / "config").read_text() == make_config(INTERFACE, after)
    assert (programs / "log").read_text().splitlines() == [
        "wg syncconf wg7 /dev/stdin",
        "ip -6 route delete fd00:99::/48 dev wg7",
        "ip -4 route replace 10.77.0.0/16 dev wg7",
    ]


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo RTNETLINK answers: File exists >&2; exit 2", "an interface wg7 already"),
        ("echo Unknown device type >&2; exit 2", "wireguard-go is not installed"),
        ('case "$1" in address) echo no such thing >&2; exit 1;; esac', "no such thing"),
    ],
)
async def test_what_can_fail(programs: Path, script: str, complaint: str) -> None:
    """Each failure says what to do, and leaves no interface behind."""
    write_program(programs / "ip", f'echo "ip $@" >> {programs}/log; {script}')
    with pytest.raises(WireGuardError, match=complaint):
        await run_wireguard(INTERFACE, PEERS)
    lines = (programs / "log").read_text().splitlines()
    was_made = "address" in script
    assert ("ip link delete dev wg7" in lines) == was_made


async def test_missing_program(programs: Path) -> None:
    """Without wg the package is named."""
    os.unlink(programs / "wg")
    with pytest.raises(WireGuardError, match="wireguard-tools"):
        await run_wireguard(INTERFACE, PEERS)
