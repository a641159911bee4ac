"""What stands at the two ends of a tunnel that is measured: an origin, and visitors of the public
side. Threads and blocking sockets, each in a process of its own, so that they are never what is
measured. Every byte of a body is compared with what it should be.
"""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable

HOST = "app.example.com"
HELLO = b"Hello, world.\n"
BLOCK = bytes(range(256)) * 4096
"""What bodies consist of: any byte in the wrong place shows, if the error is not a whole block."""
READ_BYTES = 256 << 10


def is_right(data: bytes, at: int) -> bool:
    """Whether `data` is what stands `at` bytes behind a body's beginning."""
    start = at % 256
    # A body repeats every 256 bytes, so any stretch of it can be compared at once.
    if start + len(data) <= len(BLOCK):
        return data == BLOCK[start : start + len(data)]
    return data == (BLOCK * 9)[start : start + len(data)]


# ---- the origin


def serve_origin() -> None:
    """HTTP/1.1 for `GET /bytes/N`, `POST /sink` and `GET /hello`, as simple as it can be."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listener.getsockname()[1], flush=True)
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_serve_connection, args=(sock,), daemon=True).start()


def _serve_connection(sock: socket.socket) -> None:
    reader = sock.makefile("rb", buffering=1 << 20)
    while line := reader.readline():
        _, path, _ = line.split()
        length = 0
        while (header := reader.readline()) not in (b"\r\n", b""):
            if header.lower().startswith(b"content-length:"):
                length = int(header.partition(b":")[2])
        if path.startswith(b"/bytes/"):
            left = int(path.rpartition(b"/")[2])
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % left)
            while left:
                left -= len(BLOCK)
                sock.sendall(BLOCK)
        else:
            at, right = 0, True
            while at < length:
                data = reader.read(min(length - at, READ_BYTES))
                right &= is_right(data, at)
                at += len(data)
            body = HELLO if right else b"Wrong bytes.\n"
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


# ---- visitors


class _Visitor:
    """One TLS connection with HTTP/1.1, kept alive."""

    def __init__(self, port: int) -> None:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        tcp = socket.create_connection(("127.0.0.1", port))
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = context.wrap_socket(tcp, server_hostname=HOST)
        self._reader = self._sock.makefile("rb", buffering=READ_BYTES)

    def get(self, path: str) -> int:
        """The body's length; the body follows."""
        self._sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        return self._read_head()

    def hello(self) -> None:
        assert self._reader.read(self.get("/hello")) == HELLO

    def download(self, size: int) -> None:
        assert self.get(f"/bytes/{size}") == size
        at = 0
        while at < size:
            data = self._reader.read1(READ_BYTES)
            assert data
            assert is_right(data, at)
            at += len(data)

    def upload(self, size: int) -> None:
        head = f"POST /sink HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {size}\r\n\r\n"
        self._sock.sendall(head.encode())
        for at in range(0, size, READ_BYTES):
            start = at % len(BLOCK)
            self._sock.sendall(BLOCK[start : start + READ_BYTES])
        assert self._reader.read(self._read_head()) == HELLO

    def _read_head(self) -> int:
        status = self._reader.readline()
        assert status.startswith(b"HTTP/1.1 200"), status
        length = -1
        while (line := self._reader.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return length


def _in_threads(work: Callable[[_Visitor], None], visitors: list[_Visitor]) -> float:
    """Seconds until all are done. Raises AssertionError if one failed."""
    done: list[None] = []

    def run(visitor: _Visitor) -> None:
        work(visitor)
        done.append(None)

    threads = [threading.Thread(target=run, args=(visitor,)) for visitor in visitors]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len(visitors)
    return time.perf_counter() - began


def visit(port: int, work: str, count: int, amount: float) -> None:
    """Print "ready" when connected, and then the result of `work` as JSON.

    "down" and "up": the seconds that `count` bodies of `amount` bytes took; "requests": the latency
    of each, by `count` visitors for `amount` seconds.
    """
    visitors = [_Visitor(port) for _ in range(count)]
    for visitor in visitors:
        visitor.hello()
    print("ready", flush=True)
    if work == "requests":
        times: list[float] = []
        until = time.perf_counter() + amount

        def ask(visitor: _Visitor) -> None:
            while (began := time.perf_counter()) < until:
                visitor.hello()
                times.append(time.perf_counter() - began)

        _in_threads(ask, visitors)
        print(json.dumps(times), flush=True)
        return
    size = int(amount)
    move = _Visitor.download if work == "down" else _Visitor.upload
    print(json.dumps(_in_threads(lambda visitor: move(visitor, size), visitors)), flush=True)
