"""Netlink requests: many at once, and refusals that name what was refused."""

from __future__ import annotations

import errno
from ipaddress import ip_interface, ip_network

import pytest

from netlab.kernel.namespaces import create_namespaces
from netlab.kernel.netlink import (
    LinkEnd,
    Netlink,
    NetlinkError,
    Route,
    add_address,
    add_veth,
    interface_names,
    replace_route,
    set_link,
)

pytestmark = pytest.mark.jail


def test_thousands_of_requests_run_in_order() -> None:
    """More than any socket buffer holds, also of their answers, in one call."""
    left, right = create_namespaces(2)
    with Netlink() as netlink:
        netlink.run([add_veth(LinkEnd(left, "a", 101), LinkEnd(right, "b", 102))])
    networks = [ip_network((0x02000000 + number, 32)) for number in range(5000)]
    with Netlink(left) as netlink:
        netlink.run(replace_route(Route(network, 101)) for network in networks)
    with left.entered(), open("/proc/thread-self/net/route") as table:
        assert sum(line.startswith("a\t") for line in table) == 5000
    with left.entered():
        assert "a" in interface_names()
    left.close()
    right.close()


def test_a_refusal_names_the_request_and_the_reason() -> None:
    """The first refused request of a batch is the one in the error."""
    (namespace,) = create_namespaces(1)
    with Netlink(namespace) as netlink:
        with pytest.raises(NetlinkError, match=r"refused to add address 2\.0\.0\.1/32") as refusal:
            netlink.run([set_link(1, up=True), add_address(99, ip_interface("2.0.0.1/32"))] * 300)
        assert refusal.value.errno == errno.ENODEV
        # The socket is still in step afterwards.
        netlink.run([set_link(1, up=True)])
    namespace.close()
