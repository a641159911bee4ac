"""Who is connected, here and elsewhere in the region, and who is told of it. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from relay.client import Client
from relay.counters import Counters
from relay.outbox import Outbox
from traversal.keys import NodePublic
from traversal.wire.derp import (
    WATCH_CONNS,
    FrameType,
    GoneReason,
    PresentFlags,
    encode_frame,
    encode_health,
    encode_peer_gone,
    encode_peer_present,
)

DUPLICATE_WARNING: Final = (
    "another connection uses the same node key; "
    "if that is another machine, give it a key of its own"
)


class Presence:
    """The tables of all connections of one relay process and of what its mesh peers told it.

    Args:
        server_key: of this relay.
        outbox: takes the notices.
    """

    def __init__(self, server_key: NodePublic, counters: Counters, outbox: Outbox) -> None:
        self._server_key = server_key.raw
        self._counters = counters
        self._outbox = outbox
        # Key -> the connection that receives its packets.
        self.active: dict[bytes, Client] = {}
        # Keys with more than one connection: all of them, the most recent speaker last.
        self._duplicates: dict[bytes, list[Client]] = {}
        # Keys connected elsewhere: the links that lead there. The first one is used.
        self._forwarders: dict[bytes, list[Client]] = {}
        self._siblings: set[Client] = set()
        self._watchers: set[Client] = set()
        # Source key -> connections that got a packet of it, to be told when it goes.
        self._delivered: dict[bytes, set[Client]] = {}

    # --- Looking ---------------------------------------------------------------------------------

    def connections_of(self, key: bytes) -> list[Client]:
        """Every local connection of a key."""
        if key in self._duplicates:
            return list(self._duplicates[key])
        active = self.active.get(key)
        return [] if active is None else [active]

    def clients(self) -> Iterator[Client]:
        """Every registered connection but those between workers of this host."""
        for key, active in self.active.items():
            yield from self._duplicates.get(key, (active,))

    def forwarder_of(self, key: bytes) -> Client | None:
        """The link over which packets for a key that is not here leave, if there is one."""
        links = self._forwarders.get(key)
        return links[0] if links else None

    @property
    def local_keys(self) -> int:
        """Distinct keys connected here."""
        return len(self.active)

    @property
    def remote_keys(self) -> int:
        """Distinct keys connected only elsewhere in the region."""
        return sum(1 for key in self._forwarders if key not in self.active)

    @property
    def duplicate_keys(self) -> int:
        """Keys with two connections or more."""
        return len(self._duplicates)

    @property
    def duplicate_connections(self) -> int:
        """Connections of such keys."""
        return sum(map(len, self._duplicates.values()))

    @property
    def watchers(self) -> int:
        """Connections that asked to be told who comes and goes."""
        return len(self._watchers)

    # --- Coming and going ------------------------------------------------------------------------

    def connect(self, client: Client) -> None:
        """Register a connection; from here on packets for its key go to it.

        An outgoing link asks the other side, with its first frame, who is connected there.
        """
        if client.is_outgoing:
            self._outbox.send(client, WATCH_CONNS)
        if client.is_sibling:
            self._siblings.add(client)
        if client.is_outgoing or client.is_sibling:
            return
        self._counters.accepts += 1
        key = client.key
        previous = self.active.get(key)
        if previous is not None:
            self._counters.duplicate_connections += 1
            connections = self._duplicates.setdefault(key, [previous])
            connections.append(client)
            # Those who know already are not told again: a thousand connections of one key would
            # have each further one answered a thousandfold.
            news = [each for each in (previous, client) if not each.duplicate]
            previous.duplicate = client.duplicate = True
            self._send_health(news, DUPLICATE_WARNING)
        self.active[key] = client
        self._tell_watchers(
            encode_peer_present(key, client.address, client.port, client.present_flags())
        )

    def disconnect(self, client: Client) -> None:
        """Forget a connection; harmless when repeated."""
        if client.closed:
            return
        client.closed = True
        self._outbox.forget(client)
        self._watchers.discard(client)
        self._siblings.discard(client)
        for source in client.heard_from or ():
            receivers = self._delivered[source]
            receivers.discard(client)
            if not receivers:
                del self._delivered[source]
        client.heard_from = None
        if client.is_outgoing:
            self._drop_forwarders(client)
        elif not client.is_sibling:
            self._unregister(client)

    def _unregister(self, client: Client) -> None:
        key = client.key
        connections = self._duplicates.get(key)
        if connections is not None:
            connections.remove(client)
            self.active[key] = connections[-1]
            if len(connections) == 1:
                connections[0].duplicate = False
                self._send_health(connections, "")
                del self._duplicates[key]
            return
        del self.active[key]
        here = self._reachable_by_sibling(key)
        self._tell_watchers(encode_peer_gone(key, GoneReason.DISCONNECTED), only_siblings=here)
        self._maybe_left_region(key)

    def _send_health(self, clients: Iterable[Client], problem: str) -> None:
        for client in clients:
            if client.takes_notices:
                self._outbox.send(client, encode_health(problem))

    def note_activity(self, client: Client) -> None:
        """The last of several connections of a key to speak is the one that receives."""
        connections = self._duplicates[client.key]
        if connections[-1] is not client:
            connections.remove(client)
            connections.append(client)
            self.active[client.key] = client

    def note_delivery(self, source: bytes, destination: Client) -> None:
        """The destination gets packets of this key: it will be told when that key goes."""
        if destination.heard_from is None:
            destination.heard_from = set()
        if source not in destination.heard_from:
            destination.heard_from.add(source)
            self._delivered.setdefault(source, set()).add(destination)

    def _maybe_left_region(self, key: bytes) -> None:
        """If the key is nowhere any more, tell all who got packets of it (specification 7.7).

        Unlike derper we tell them each time: a new delivery arms the notice again.
        """
        if key in self.active or key in self._forwarders:
            return
        frame = encode_peer_gone(key, GoneReason.DISCONNECTED)
        for receiver in self._delivered.pop(key, ()):
            if receiver.heard_from is not None:
                receiver.heard_from.discard(key)
            self._outbox.send(receiver, frame)
            self._counters.peer_gone_disconnected_frames += 1

    # --- Mesh ------------------------------------------------------------------------------------

    def _reachable_by_sibling(self, key: bytes) -> bool:
        return any(link.is_sibling for link in self._forwarders.get(key, ()))

    def add_forwarder(self, key: bytes, link: Client) -> None:
        """A server that we watch has this key: packets for it may leave over the link."""
        links = self._forwarders.setdefault(key, [])
        if link in links:
            return
        if len(links) == 1:
            self._counters.multiforwarder_created += 1
        news = link.is_sibling and key not in self.active and not self._reachable_by_sibling(key)
        # A worker of this host is nearer than another host; among equals the oldest is used.
        if link.is_sibling:
            links.insert(sum(other.is_sibling for other in links), link)
        else:
            links.append(link)
        if news:
            frame = encode_peer_present(key, None, 0, PresentFlags.REGULAR)
            self._tell_watchers(frame, only_outsiders=True)

    def remove_forwarder(self, key: bytes, link: Client) -> None:
        """A server that we watch has this key no more."""
        links = self._forwarders.get(key, [])
        if link not in links:
            self._counters.forwarder_delete_other_value += 1
            return
        links.remove(link)
        if len(links) == 1:
            self._counters.multiforwarder_deleted += 1
        if not links:
            del self._forwarders[key]
        if link.is_sibling and key not in self.active and not self._reachable_by_sibling(key):
            frame = encode_peer_gone(key, GoneReason.DISCONNECTED)
            self._tell_watchers(frame, only_outsiders=True)
        self._maybe_left_region(key)

    def _drop_forwarders(self, link: Client) -> None:
        for key in [key for key, links in self._forwarders.items() if link in links]:
            self.remove_forwarder(key, link)

    def _tell_watchers(
        self, frame: bytes, *, only_siblings: bool = False, only_outsiders: bool = False
    ) -> None:
        for watcher in self._watchers:
            if (only_siblings and not watcher.is_sibling) or (
                only_outsiders and watcher.is_sibling
            ):
                continue
            self._outbox.send(watcher, frame)

    def watch(self, client: Client) -> None:
        """Tell a connection who is here, and from now on who comes and goes."""
        if client.key == self._server_key and not client.is_sibling:
            return  # this server has reached itself (DERP specification 10)
        self._watchers.add(client)
        for key, active in self.active.items():
            frame = encode_peer_present(key, active.address, active.port, active.present_flags())
            self._outbox.send(client, frame)
        if client.is_sibling:
            return
        for key in self._forwarders:
            if key not in self.active and self._reachable_by_sibling(key):
                self._outbox.send(client, encode_peer_present(key, None, 0, PresentFlags.REGULAR))

    def close_key(self, key: bytes, reason: str, *, tell_siblings: bool = True) -> int:
        """End every connection of a key, on all workers of this host; returns how many here."""
        connections = self.connections_of(key)
        self._outbox.doomed.extend((connection, reason) for connection in connections)
        if tell_siblings:
            for sibling in self._siblings:
                if sibling.is_outgoing:
                    self._outbox.send(sibling, encode_frame(FrameType.CLOSE_PEER, key))
        return len(connections)
