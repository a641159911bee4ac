"""The Cap'n Proto codec: round trips, every pointer kind, and what hostile messages may not do."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.wire.tunnel.capnp import (
    MAX_DEPTH,
    Capability,
    MessageSplitter,
    Node,
    Struct,
    StructList,
    encode_message,
    message_length,
    parse_message,
)
from traversal.wire.tunnel.errors import TunnelError


def word(low: int, high: int = 0) -> bytes:
    return struct.pack("<iI", low, high)


def struct_pointer(offset: int, words: int, pointers: int) -> bytes:
    return word(offset << 2, words | pointers << 16)


def list_pointer(offset: int, size: int, count: int) -> bytes:
    return word(offset << 2 | 1, size | count << 3)


def far_pointer(segment: int, position: int, *, is_double: bool = False) -> bytes:
    return struct.pack("<II", position << 3 | is_double << 2 | 2, segment)


def framed(*segments: bytes) -> bytes:
    header = struct.pack(f"<I{len(segments)}I", len(segments) - 1, *(len(s) // 8 for s in segments))
    return header + bytes(-len(header) % 8) + b"".join(segments)


DATA = st.integers(0, 4).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n))


def structs(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Struct]:
    return st.builds(Struct, DATA, st.lists(children, max_size=4).map(tuple))


def lists_of_structs(children: st.SearchStrategy[Node]) -> st.SearchStrategy[StructList]:
    def of_shape(shape: tuple[int, int]) -> st.SearchStrategy[StructList]:
        words, count = shape
        item = st.builds(
            Struct,
            st.binary(min_size=8 * words, max_size=8 * words),
            st.lists(children, min_size=count, max_size=count).map(tuple),
        )
        # Structs without content may be refused, see below, and no schema has lists of them.
        items = st.lists(item, max_size=3 if any(shape) else 0)
        return st.builds(StructList, items.map(tuple), st.just(shape))

    return st.tuples(st.integers(0, 2), st.integers(0, 2)).flatmap(of_shape)


NODES: st.SearchStrategy[Node] = st.recursive(
    st.none() | st.binary(max_size=20) | st.builds(Capability, st.integers(0, 2**32 - 1)),
    lambda children: (
        structs(children) | lists_of_structs(children) | st.lists(children, max_size=4).map(tuple)
    ),
    max_leaves=30,
)


@given(structs(NODES))
def test_round_trip(root: Struct) -> None:
    """What was written is read again, whatever the tree."""
    data = encode_message(root)
    assert message_length(data) == len(data)
    assert parse_message(data) == root


@given(st.lists(structs(NODES), max_size=4), st.lists(st.integers(1, 40)))
def test_splitting(roots: list[Struct], sizes: list[int]) -> None:
    """Messages come out whole and in order, however the stream is cut."""
    stream = b"".join(map(encode_message, roots))
    splitter = MessageSplitter()
    found = []
    for size in sizes:
        found += splitter.receive(stream[:size])
        stream = stream[size:]
    assert found + splitter.receive(stream) == roots


def test_default_values() -> None:
    """Fields beyond a struct's end read as zero and null, as for an older sender."""
    root = Struct()
    assert (root.u8(3), root.u16(0), root.u32(4), root.u64(8), root.i32(0), root.i64(0)) == (0,) * 6
    assert not root.bit(70)
    assert (root.struct(2), root.text(0), root.blob(0)) == (Struct(), "", b"")
    assert root.texts(1) == root.structs(1) == ()


def test_far_pointers() -> None:
    """Content may lie in another segment, behind a landing pad of one or two words."""
    data = b"12345678"
    single = framed(far_pointer(1, 1), word(0) + struct_pointer(0, 1, 0) + data)
    assert parse_message(single) == Struct(data)
    double = framed(
        far_pointer(1, 0, is_double=True),
        far_pointer(2, 1) + struct_pointer(0, 1, 0),
        word(0) + data,
    )
    assert parse_message(double) == Struct(data)
    text = framed(
        struct_pointer(0, 0, 1) + far_pointer(2, 0, is_double=True),
        b"text\0\0\0\0",
        far_pointer(1, 0) + list_pointer(0, 2, 5),
    )
    assert parse_message(text).text(0) == "text"


def test_negative_offset() -> None:
    """A pointer may lead backwards."""
    message = framed(struct_pointer(1, 1, 1) + b"earlier\0" + b"datadata" + list_pointer(-3, 2, 8))
    assert parse_message(message) == Struct(b"datadata", (b"earlier\0",))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        bytes(7),
        framed(b""),
        framed(struct_pointer(0, 1, 0)),  # content outside
        framed(struct_pointer(-2, 1, 0)),
        framed(list_pointer(0, 2, 4) + b"text\0\0\0\0"),  # the root is a list
        framed(word(7)),  # an unknown kind of pointer
        framed(far_pointer(1, 0)),  # no such segment
        framed(far_pointer(1, 5), word(0)),
        framed(far_pointer(0, 0)),  # to itself
        framed(far_pointer(1, 0), far_pointer(0, 0)),  # a loop
        framed(far_pointer(1, 0, is_double=True), struct_pointer(0, 0, 0) * 2),
        framed(far_pointer(1, 0, is_double=True), far_pointer(0, 0) * 2),
        framed(far_pointer(1, 0, is_double=True), far_pointer(0, 0) + struct_pointer(1, 0, 0)),
        framed(far_pointer(1, 0, is_double=True), far_pointer(9, 0) + struct_pointer(0, 1, 0)),
        framed(struct_pointer(0, 0, 1) + list_pointer(0, 7, 1) + struct_pointer(9, 1, 0) + word(0)),
        framed(struct_pointer(0, 0, 1) + list_pointer(0, 7, 0) + struct_pointer(1 << 28, 0, 0)),
        framed(struct_pointer(0, 0, 1) + list_pointer(0, 6, 1 << 28)),
        struct.pack("<I", 0xFFFFFFFF) + bytes(100),
        struct.pack("<II", 0, 0xFFFFFFFF) + bytes(100),
    ],
)
def test_malformed(message: bytes) -> None:
    """Every way to be wrong leads to the one error."""
    with pytest.raises(TunnelError):
        parse_message(message)


def test_nesting_is_bounded() -> None:
    """A chain of structs deeper than any schema is refused before Python's stack ends."""
    chain = b"".join(struct_pointer(0, 0, 1) for _ in range(100_000))
    with pytest.raises(TunnelError, match="deeper"):
        parse_message(framed(chain + word(0)))
    allowed = b"".join(struct_pointer(0, 0, 1) for _ in range(MAX_DEPTH))
    parse_message(framed(allowed + word(0)))


def test_amplification_is_bounded() -> None:
    """Pointers that share their target can't make a short message long."""
    fan = 1000
    # Each level's pointers all lead to the next level: fan ** 3 visits if nobody counted.
    levels = b"".join(
        b"".join(list_pointer(fan - 1 - i, 6, fan) for i in range(fan)) for _ in range(3)
    )
    message = framed(struct_pointer(0, 0, fan) + levels + bytes(8 * fan))
    started = time.perf_counter()
    with pytest.raises(TunnelError, match="more than once"):
        parse_message(message)
    assert time.perf_counter() - started < 1
    shared = framed(
        struct_pointer(0, 0, 2) + list_pointer(1, 2, 8) + list_pointer(0, 2, 8) + b"12345678"
    )
    with pytest.raises(TunnelError, match="more than once"):
        parse_message(shared)


def test_empty_structs_take_no_memory() -> None:
    """A list of millions of structs without content is refused."""
    message = framed(
        struct_pointer(0, 0, 1) + list_pointer(0, 7, 0) + struct_pointer(1 << 27, 0, 0)
    )
    with pytest.raises(TunnelError, match="more than once"):
        parse_message(message)


def test_large_messages_are_refused_early() -> None:
    """The header alone ends it; nobody waits for the content."""
    with pytest.raises(TunnelError, match="at most"):
        MessageSplitter().receive(struct.pack("<II", 0, 1 << 20))
    with pytest.raises(TunnelError, match="segments"):
        MessageSplitter().receive(struct.pack("<I", 64))


def test_a_slow_stream_costs_linear_time() -> None:
    """A message of the largest size, byte by byte, is looked at when it is whole."""
    message = encode_message(Struct(pointers=(bytes(300_000),)))
    splitter = MessageSplitter()
    started = time.perf_counter()
    found = [root for i in range(len(message)) for root in splitter.receive(message[i : i + 1])]
    assert len(found) == 1
    assert time.perf_counter() - started < 5


SEGMENTS = st.lists(
    st.lists(
        st.one_of(
            st.binary(min_size=8, max_size=8),
            st.builds(struct_pointer, st.integers(-4, 12), st.integers(0, 4), st.integers(0, 4)),
            st.builds(list_pointer, st.integers(-4, 12), st.integers(0, 7), st.integers(0, 40)),
            st.builds(far_pointer, st.integers(0, 4), st.integers(0, 9), is_double=st.booleans()),
        ),
        max_size=20,
    ).map(b"".join),
    min_size=1,
    max_size=4,
)


@given(SEGMENTS)
def test_never_crashes_on_plausible_messages(segments: list[bytes]) -> None:
    """Words that look like pointers are read or refused."""
    try:
        parse_message(framed(*segments))
    except TunnelError:
        pass


@given(st.binary(max_size=200))
def test_never_crashes_on_noise(data: bytes) -> None:
    """Any bytes are read, waited for, or refused."""
    for read in (parse_message, MessageSplitter().receive):
        try:
            read(data)
        except TunnelError:
            pass
