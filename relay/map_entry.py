"""The relay-map entry under which clients find this relay (DERP specification 14)."""

from __future__ import annotations

import ipaddress

from relay.config import Config
from traversal.relay_map import Dial, Region, RelayMap, RelayNode

PRIVATE_REGION_ID = 900
"""The first of the ids that are set aside for users' own regions (900 to 999)."""


def build_map(
    config: Config,
    *,
    derp_port: int,
    stun_port: int | None,
    can_port_80: bool,
    pin: str = "",
    region_id: int = PRIVATE_REGION_ID,
    region_code: str = "underpass",
    region_name: str = "Underpass",
    node_name: str = "",
    ipv4: ipaddress.IPv4Address | None = None,
    ipv6: ipaddress.IPv6Address | None = None,
) -> RelayMap:
    """A map with this relay as its only node. Raises RelayMapError.

    Args:
        derp_port, stun_port: as clients see them; None for no STUN.
        pin: `sha256-raw:...` of a self-signed certificate, else empty.
        node_name: unique over all regions of the final map; by default the region id and "a".
        ipv4, ipv6: where DNS should not be asked; a host name that is an address says it itself.
    """
    host = config.server.hostname
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = ipaddress.ip_address(host)
    except ValueError:
        address = None
    v4: ipaddress.IPv4Address | Dial = ipv4 or Dial.BY_NAME
    v6: ipaddress.IPv6Address | Dial = ipv6 or Dial.BY_NAME
    if isinstance(address, ipaddress.IPv4Address):
        v4 = address
        v6 = ipv6 or Dial.NEVER
    elif isinstance(address, ipaddress.IPv6Address):
        v6 = address
        v4 = ipv4 or Dial.NEVER
    node = RelayNode(
        name=node_name or f"{region_id}a",
        region_id=region_id,
        host_name=host,
        certificate_name=pin,
        ipv4=v4,
        ipv6=v6,
        stun_port=stun_port,
        derp_port=derp_port,
        can_port_80=can_port_80,
    )
    region = Region(region_id, region_code, region_name, (node,))
    return RelayMap({region_id: region}, omit_default_regions=True)
