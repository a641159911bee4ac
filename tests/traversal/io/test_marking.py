"""Socket marks: which sockets have them, and that names are asked for with them."""

from __future__ import annotations

import socket
from pathlib import Path

import dns.flags
import dns.message
import dns.rrset
import pytest
import trio

from traversal import NodeError, NodePrivate, RelayMap, open_node
from traversal import node as node_module
from traversal.io import marking
from traversal.io.marking import marked, new_socket, resolve

MARK = 0x7570


def mark_of(sock: trio.socket.SocketType) -> int:
    return int(sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK))


@pytest.mark.jail
async def test_sockets_of_a_task_tree() -> None:
    """Tasks started inside have the mark, those started outside have none."""
    found: dict[str, int] = {}

    async def look(name: str) -> None:
        with new_socket() as sock:
            found[name] = mark_of(sock)

    async with trio.open_nursery() as outer:
        outer.start_soon(look, "before")
        with marked(MARK):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look, "inside")
        outer.start_soon(look, "after")
    assert found == {"before": 0, "inside": MARK, "after": 0}


async def test_without_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a node says which right is missing."""

    def refuse() -> None:
        raise PermissionError

    monkeypatch.setattr(node_module, "new_socket", refuse)
    key = NodePrivate.generate(lambda size: b"k" * size)
    with pytest.raises(NodeError, match="CAP_NET_ADMIN"):
        async with open_node(key, RelayMap({}), socket_mark=MARK):
            pass


class NameServer:
    """Answers on 127.0.0.1:53 of a jail: cut off by UDP for `long.test`, whole by TCP."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, wire: bytes, *, is_tcp: bool) -> bytes:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        self.asked.append(f"{question.name} {'tcp' if is_tcp else 'udp'}")
        response = dns.message.make_response(query)
        if str(question.name) == "long.test." and not is_tcp:
            response.flags |= dns.flags.TC
        elif str(question.name) != "none.test.":
            address = "2001:db8::7" if question.rdtype == dns.rdatatype.AAAA else "192.0.2.7"
            response.answer.append(
                dns.rrset.from_text(question.name, 60, "IN", question.rdtype, address)
            )
        return response.to_wire()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with (
            trio.socket.socket(type=socket.SOCK_DGRAM) as udp,
            trio.socket.socket() as tcp,
        ):
            for sock in (udp, tcp):
                await sock.bind(("127.0.0.1", marking.DNS_PORT))
            tcp.listen()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_tcp, tcp)
                task_status.started()
                while True:
                    wire, source = await udp.recvfrom(512)
                    # Something else comes first: who asks must wait for the answer to its question.
                    await udp.sendto(dns.message.make_query("x.test", "A").to_wire(), source)
                    await udp.sendto(self.answer(wire, is_tcp=False), source)

    async def _serve_tcp(self, listener: trio.socket.SocketType) -> None:
        while True:
            sock, _ = await listener.accept()
            with sock:
                wire = (await sock.recv(512))[2:]
                answer = self.answer(wire, is_tcp=True)
                await sock.send(len(answer).to_bytes(2, "big") + answer[:9])
                await sock.send(answer[9:])


@pytest.mark.jail
async def test_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    """With a mark the DNS servers of the system are asked directly, by TCP for what is long; the
    system's resolver is the last resort. Without a mark it is the only one."""
    resolver_file = tmp_path / "resolv.conf"
    resolver_file.write_text("nameserver 127.0.0.1\n")
    monkeypatch.setattr(marking, "RESOLVER_FILE", str(resolver_file))
    by_system: list[str] = []
    system = trio.socket.getaddrinfo

    async def getaddrinfo(host: str, *arguments: object, **options: object) -> object:
        by_system.append(host)
        if host.endswith(".test"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return await system(host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    server = NameServer()
    await nursery.start(server.run)
    with trio.fail_after(5):
        with marked(MARK):
            for name in ("a.test", "long.test"):
                found = await resolve(name, 443, socket.AF_UNSPEC, socket.SOCK_STREAM)
                assert [entry[4][:2] for entry in found] == [
                    ("2001:db8::7", 443),
                    ("192.0.2.7", 443),
                ]
            (only,) = await resolve("a.test", 443, socket.AF_INET, socket.SOCK_DGRAM)
            assert only[4] == ("192.0.2.7", 443)
            assert not [name for name in by_system if name.endswith(".test")]
            with pytest.raises(OSError, match="unknown"):
                await resolve("none.test", 443, socket.AF_UNSPEC, socket.SOCK_STREAM)
            before = len(server.asked)
            await resolve("192.0.2.1", 443, socket.AF_UNSPEC, socket.SOCK_STREAM)
        assert "long.test. tcp" in server.asked
        with pytest.raises(OSError, match="unknown"):
            await resolve("a.test", 443, socket.AF_UNSPEC, socket.SOCK_STREAM)
        assert len(server.asked) == before
    nursery.cancel_scope.cancel()
