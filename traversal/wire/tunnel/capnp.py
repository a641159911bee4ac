"""Cap'n Proto messages as trees of plain values, as far as the tunnel needs them (specification 7).

A message on a stream: u32 number of segments - 1, then each segment's length in words (u32), padded
to a word, then the segments. A word is 8 bytes; everything is little-endian. A pointer is one word,
its kind in the lowest two bits:

* 0 struct: signed offset in words (30 bits) from the pointer's end, words of data (u16), number of
  pointers (u16)
* 1 list: offset as above, element size (3 bits), count (29 bits): elements, or words of elements
  for element size 7 (structs), which begin with a tag word in the shape of a struct pointer whose
  offset is the count
* 2 far: bit 2 says whether the landing pad has two words; its position in words (29 bits), its
  segment (u32)
* 3 capability: index into the payload's table (u32)

A pointer of 0 is null. Reading is eager and linear in the message's size: whatever is reachable is
read once, and a message whose pointers make anything count twice is refused, since an honest
builder's message is a tree. Lists that the tunnel's schema has no use for read as null.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from traversal.wire.tunnel.errors import TunnelError

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Registrations have less than 1 KiB; a configuration of a thousand rules has some 200 KiB."""
MAX_SEGMENTS: Final = 64
MAX_DEPTH: Final = 32
"""The schema's deepest message has 8 levels."""

_WORD: Final = 8
_NO_OFFSET_STRUCT: Final = b"\xfc\xff\xff\xff\x00\x00\x00\x00"
_BYTE_LIST: Final = 2
_POINTER_LIST: Final = 6
_STRUCT_LIST: Final = 7
_MAX_COUNT: Final = (1 << 29) - 1
_U32: Final = struct.Struct("<I")
_POINTER: Final = struct.Struct("<iI")


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability pointer: an index into the payload's table."""

    index: int


@dataclass(frozen=True, slots=True)
class StructList:
    """A list of structs; `shape` (words of data, pointers) matters only to an empty one."""

    items: tuple[Struct, ...] = ()
    shape: tuple[int, int] = (0, 0)


Node: TypeAlias = "Struct | StructList | tuple[Node, ...] | bytes | Capability | None"
"""What a pointer leads to: a tuple is a list of pointers, bytes are a list of bytes."""


@dataclass(frozen=True, slots=True)
class Struct:
    """A struct: its data section (whole words) and its pointers.

    What is beyond the end of either reads as zero or null: an older program wrote it.
    """

    data: bytes = b""
    pointers: tuple[Node, ...] = ()

    def u8(self, offset: int) -> int:
        """An unsigned number at a byte offset."""
        return self.data[offset] if offset < len(self.data) else 0

    def u16(self, offset: int) -> int:
        """An unsigned number at a byte offset."""
        return int.from_bytes(self.data[offset : offset + 2], "little")

    def u32(self, offset: int) -> int:
        """An unsigned number at a byte offset."""
        return int.from_bytes(self.data[offset : offset + 4], "little")

    def u64(self, offset: int) -> int:
        """An unsigned number at a byte offset."""
        return int.from_bytes(self.data[offset : offset + 8], "little")

    def i32(self, offset: int) -> int:
        """A signed number at a byte offset."""
        return int.from_bytes(self.data[offset : offset + 4], "little", signed=True)

    def i64(self, offset: int) -> int:
        """A signed number at a byte offset."""
        return int.from_bytes(self.data[offset : offset + 8], "little", signed=True)

    def bit(self, number: int) -> bool:
        """A Bool, by its bit number in the data section."""
        return bool(self.u8(number // 8) >> number % 8 & 1)

    def pointer(self, index: int) -> Node:
        """What a pointer leads to; None where it is null or not there."""
        return self.pointers[index] if index < len(self.pointers) else None

    def struct(self, index: int) -> Struct:
        """A struct; null reads as an empty one. Raises TunnelError where it is something else."""
        node = self.pointer(index)
        if node is None:
            return EMPTY
        if not isinstance(node, Struct):
            raise TunnelError(f"Cap'n Proto: pointer {index} does not lead to a struct")
        return node

    def blob(self, index: int) -> bytes:
        """A Data field; null reads as empty. Raises TunnelError."""
        node = self.pointer(index)
        if node is None:
            return b""
        if not isinstance(node, bytes):
            raise TunnelError(f"Cap'n Proto: pointer {index} does not lead to bytes")
        return node

    def text(self, index: int) -> str:
        """A Text field; null reads as empty. Raises TunnelError."""
        return _decode_text(self.pointer(index))

    def text_bytes(self, index: int) -> bytes:
        """A Text field as its bytes, UTF-8 or not. Raises TunnelError."""
        return _text_bytes(self.pointer(index))

    def texts(self, index: int) -> tuple[str, ...]:
        """A List(Text) field. Raises TunnelError."""
        node = self.pointer(index)
        if node is None:
            return ()
        if not isinstance(node, tuple):
            raise TunnelError(f"Cap'n Proto: pointer {index} does not lead to a list of texts")
        return tuple(map(_decode_text, node))

    def structs(self, index: int) -> tuple[Struct, ...]:
        """A list of structs. Raises TunnelError."""
        node = self.pointer(index)
        if node is None:
            return ()
        if not isinstance(node, StructList):
            raise TunnelError(f"Cap'n Proto: pointer {index} does not lead to a list of structs")
        return node.items


EMPTY: Final = Struct()


def text_node(text: str) -> bytes | None:
    """A Text field's value; empty becomes null. Surrogates stand for bytes that are no UTF-8
    ("surrogateescape")."""
    return text.encode(errors="surrogateescape") + b"\0" if text else None


def blob_node(data: bytes) -> bytes | None:
    """A Data field's value; empty becomes null."""
    return data or None


def _text_bytes(node: Node) -> bytes:
    if node is None:
        return b""
    if not isinstance(node, bytes) or node[-1:] != b"\0":
        raise TunnelError("Cap'n Proto: a text is not a list of bytes with a zero at its end")
    return node[:-1]


def _decode_text(node: Node) -> str:
    try:
        return _text_bytes(node).decode()
    except UnicodeDecodeError:
        raise TunnelError("Cap'n Proto: a text is not UTF-8") from None


# --- Reading -------------------------------------------------------------------------------------


def message_length(
    data: bytes | bytearray | memoryview, max_bytes: int = MAX_MESSAGE_BYTES
) -> int | None:
    """The length of the message at the start of `data`; None while too little of it is there.

    Raises TunnelError as soon as the message is known to exceed `max_bytes`, header included.
    """
    if len(data) < 4:
        return None
    segments = _U32.unpack_from(data)[0] + 1
    if segments > MAX_SEGMENTS:
        raise TunnelError(f"Cap'n Proto: {segments} segments, at most {MAX_SEGMENTS} are read")
    header = (4 + 4 * segments + 7) // 8 * 8
    if len(data) < header:
        return None
    length: int = header + _WORD * sum(struct.unpack_from(f"<{segments}I", data, 4))
    if length > max_bytes:
        raise TunnelError(f"Cap'n Proto: a message of {length} bytes, at most {max_bytes} are read")
    return length


def parse_message(data: bytes) -> Struct:
    """The root struct of a whole message, its stream header included. Raises TunnelError."""
    length = message_length(data, max(len(data), MAX_MESSAGE_BYTES))
    if length is None or length > len(data):
        raise TunnelError("Cap'n Proto: the message is incomplete")
    count = _U32.unpack_from(data)[0] + 1
    start = (4 + 4 * count + 7) // 8 * 8
    segments = []
    for words in struct.unpack_from(f"<{count}I", data, 4):
        segments.append(data[start : start + words * _WORD])
        start += words * _WORD
    root = _Reader(segments).read_pointer(0, 0, 0)
    if root is None:
        return EMPTY
    if not isinstance(root, Struct):
        raise TunnelError("Cap'n Proto: the root is not a struct")
    return root


class MessageSplitter:
    """Cuts a stream of bytes into messages; holds at most one that is incomplete."""

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._buffer = bytearray()
        self._needed = 4

    def receive(self, data: bytes) -> list[Struct]:
        """The roots of the messages that are complete now. Raises TunnelError."""
        buffer = self._buffer
        buffer += data
        roots = []
        start = 0
        while len(buffer) - start >= self._needed:
            with memoryview(buffer)[start:] as view:
                length = message_length(view, self.max_bytes)
                if length is None:
                    # The header: its length depends on the first four bytes alone.
                    self._needed = (4 + 4 * (_U32.unpack_from(view)[0] + 1) + 7) // 8 * 8
                    continue
                if length > len(view):
                    self._needed = length
                    continue
                message = bytes(view[:length])
            roots.append(parse_message(message))
            start += length
            self._needed = 4
        del buffer[:start]
        return roots


class _Reader:
    """Reads one message. Each word may be read once: that bounds time and memory."""

    def __init__(self, segments: Sequence[bytes]) -> None:
        self._segments = segments
        # The root pointer is read without a claim.
        self._budget = sum(map(len, segments)) // _WORD - 1

    def read_pointer(self, segment: int, position: int, depth: int) -> Node:
        """The value of the pointer at a word of a segment."""
        low, high, base = self._load(segment, position)
        if low == 0 and high == 0:
            return None
        if depth > MAX_DEPTH:
            raise TunnelError(f"Cap'n Proto: nested deeper than {MAX_DEPTH}")
        if low & 3 == 2:
            segment, low, high, base = self._follow_far(low, high)
        match low & 3:
            case 0:
                words, count = high & 0xFFFF, high >> 16
                return self._read_struct(segment, base + (low >> 2), words, count, depth)
            case 1:
                return self._read_list(segment, base + (low >> 2), high & 7, high >> 3, depth)
            case 3:
                if low != 3:
                    raise TunnelError("Cap'n Proto: a pointer of an unknown kind")
                return Capability(high)
        raise TunnelError("Cap'n Proto: a far pointer leads to a far pointer")

    def _load(self, segment: int, position: int) -> tuple[int, int, int]:
        """A pointer's two halves, and the word that its offset counts from."""
        if not 0 <= segment < len(self._segments):
            raise TunnelError(f"Cap'n Proto: there is no segment {segment}")
        data = self._segments[segment]
        if not 0 <= position < len(data) // _WORD:
            raise TunnelError("Cap'n Proto: a pointer lies outside its segment")
        low, high = _POINTER.unpack_from(data, position * _WORD)
        return low, high, position + 1

    def _follow_far(self, low: int, segment: int) -> tuple[int, int, int, int]:
        position = (low & 0xFFFFFFFF) >> 3
        self._charge(2 if low & 4 else 1)
        pad_low, pad_high, base = self._load(segment, position)
        if not low & 4:
            return segment, pad_low, pad_high, base
        # Two words: where the content starts, and a pointer that describes it with offset 0.
        if pad_low & 7 != 2:
            raise TunnelError(
                "Cap'n Proto: a double far pointer's landing pad is not a far pointer"
            )
        tag_low, tag_high, _ = self._load(segment, position + 1)
        if not 0 <= tag_low <= 1:
            raise TunnelError("Cap'n Proto: a double far pointer's tag has an offset")
        return pad_high, tag_low, tag_high, (pad_low & 0xFFFFFFFF) >> 3

    def _read_struct(self, segment: int, start: int, words: int, count: int, depth: int) -> Struct:
        content = self._claim(segment, start, words + count)
        first = start + words
        return Struct(
            content[start * _WORD : first * _WORD],
            tuple(self.read_pointer(segment, first + i, depth + 1) for i in range(count)),
        )

    def _read_list(self, segment: int, start: int, size: int, count: int, depth: int) -> Node:
        if size == _BYTE_LIST:
            content = self._claim(segment, start, (count + 7) // 8)
            return content[start * _WORD : start * _WORD + count]
        if size == _POINTER_LIST:
            self._claim(segment, start, count)
            return tuple(self.read_pointer(segment, start + i, depth + 1) for i in range(count))
        if size != _STRUCT_LIST:
            return None
        low, high = _POINTER.unpack_from(self._claim(segment, start, count + 1), start * _WORD)
        words, pointers = high & 0xFFFF, high >> 16
        items, step = (low & 0xFFFFFFFF) >> 2, words + pointers
        if low & 3 or items * step > count:
            raise TunnelError("Cap'n Proto: a list of structs does not fit its tag")
        if step:
            # Claimed with the list already, and now once more one by one.
            self._budget += items * step
        else:
            # Structs without content take no room, so only this bounds their number.
            self._charge(items)
        return StructList(
            tuple(
                self._read_struct(segment, start + 1 + i * step, words, pointers, depth + 1)
                for i in range(items)
            ),
            (words, pointers),
        )

    def _claim(self, segment: int, start: int, words: int) -> bytes:
        """The segment in which these words lie; nobody else may read them."""
        if not words:
            return b""
        if not 0 <= segment < len(self._segments):
            raise TunnelError(f"Cap'n Proto: there is no segment {segment}")
        content = self._segments[segment]
        if start < 0 or (start + words) * _WORD > len(content):
            raise TunnelError("Cap'n Proto: a pointer leads outside its segment")
        self._charge(words)
        return content

    def _charge(self, words: int) -> None:
        self._budget -= words
        if self._budget < 0:
            raise TunnelError("Cap'n Proto: pointers lead to the same words more than once")


# --- Writing -------------------------------------------------------------------------------------


def encode_message(root: Struct) -> bytes:
    """One segment with its stream header, laid out in preorder as the reference does.

    Raises TunnelError for a value that is too large for its pointer.
    """
    out = bytearray(_WORD)
    _write_pointer(out, 0, root)
    return struct.pack("<II", 0, len(out) // _WORD) + out


def _write_pointer(out: bytearray, at: int, node: Node) -> None:
    """Write the pointer at byte `at`, and what it leads to at the end."""
    offset = (len(out) - at) // _WORD - 1
    match node:
        case None:
            return
        case Capability(index):
            out[at : at + _WORD] = struct.pack("<II", 3, index)
        case bytes():
            _put(out, at, offset, 1, _list_size(_BYTE_LIST, len(node)))
            out += node + bytes(-len(node) % _WORD)
        case Struct():
            words, count = len(node.data) // _WORD, len(node.pointers)
            if not words + count:
                out[at : at + _WORD] = _NO_OFFSET_STRUCT
                return
            _put(out, at, offset, 0, words | count << 16)
            start = len(out)
            out += node.data + bytes(count * _WORD)
            _write_pointers(out, start + words * _WORD, node.pointers)
        case StructList(items, shape):
            words, count = (len(items[0].data) // _WORD, len(items[0].pointers)) if items else shape
            step = words + count
            _put(out, at, offset, 1, _list_size(_STRUCT_LIST, len(items) * step))
            out += struct.pack("<II", len(items) << 2, words | count << 16)
            start = len(out)
            out += bytes(len(items) * step * _WORD)
            for position, item in enumerate(items):
                first = start + position * step * _WORD
                out[first : first + words * _WORD] = item.data
                _write_pointers(out, first + words * _WORD, item.pointers)
        case tuple():
            _put(out, at, offset, 1, _list_size(_POINTER_LIST, len(node)))
            start = len(out)
            out += bytes(len(node) * _WORD)
            _write_pointers(out, start, node)


def _write_pointers(out: bytearray, start: int, nodes: Sequence[Node]) -> None:
    for position, node in enumerate(nodes):
        _write_pointer(out, start + position * _WORD, node)


def _put(out: bytearray, at: int, offset: int, kind: int, high: int) -> None:
    out[at : at + _WORD] = struct.pack("<II", offset << 2 | kind, high)


def _list_size(size: int, count: int) -> int:
    if count > _MAX_COUNT:
        raise TunnelError(f"Cap'n Proto: a list of {count} is too long")
    return count << 3 | size
