"""The RPC messages of the tunnel (edge tunnel specification 7.1 to 7.3).

A subset of Cap'n Proto RPC, level 1: one object, questions and answers, no promises but the
bootstrap object's own. Parameters and results are structs, to be read and made by
`traversal.wire.tunnel.registration` and `.sessions`.

Layouts (words of data/pointers; numbers are byte offsets into the data):

* Message 1/1: discriminant u16@0; p0 the message. Kinds as in `_Kind`
* Bootstrap 1/1: question u32@0
* Call 3/3: question u32@0, method u16@4, results to u16@6 (0 caller), interface u64@8; p0 target,
  p1 Payload
* MessageTarget 1/1: imported capability u32@0, which u16@4 (0 that, 1 promised answer); p0
  PromisedAnswer 1/1: question u32@0; p0 transform
* Payload 0/2: p0 content, p1 table of CapDescriptor 1/1: which u16@0 (1 sender hosted), id u32@4
* Return 2/1: answer u32@0, bit 32 not releaseParamCaps, which u16@6 (0 results, 1 exception,
  2 canceled); p0 Payload or Exception
* Exception 1/1: type u16@4; p0 reason
* Finish 1/0: question u32@0, bit 32 not releaseResultCaps
* Release 1/0: id u32@0, count u32@4
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

from traversal.wire.tunnel.capnp import (
    Capability,
    Struct,
    StructList,
    encode_message,
    text_node,
)
from traversal.wire.tunnel.errors import TunnelError

REGISTRATION_SERVER: Final = 0xF71695EC7FE85497
SESSION_MANAGER: Final = 0x839445A59FB01686
CONFIGURATION_MANAGER: Final = 0xB48EDFBDAA25DB04

SHUTDOWN_REASON: Final = "rpc: shutdown"
"""The reason of the abort with which a connector ends in order."""


class _Kind(IntEnum):
    UNIMPLEMENTED = 0
    ABORT = 1
    CALL = 2
    RETURN = 3
    FINISH = 4
    RELEASE = 6
    BOOTSTRAP = 8


class ExceptionType(IntEnum):
    """Why a call failed, in Cap'n Proto's words."""

    FAILED = 0
    OVERLOADED = 1
    DISCONNECTED = 2
    UNIMPLEMENTED = 3


_CANCELED: Final = 2
_SENDER_HOSTED: Final = 1
_EMPTY_TABLE: Final = StructList(shape=(1, 1))
_NO_TRANSFORM: Final = StructList(shape=(1, 0))


@dataclass(frozen=True, slots=True)
class PromisedAnswer:
    """A call's target: what the answer to a question will be, itself (no transform)."""

    question_id: int


@dataclass(frozen=True, slots=True)
class ImportedCapability:
    """A call's target: an object that the receiver of the call hosts."""

    export_id: int


@dataclass(frozen=True, slots=True)
class RpcException:
    """A call failed."""

    reason: str
    type: ExceptionType = ExceptionType.FAILED


@dataclass(frozen=True, slots=True)
class Hosted:
    """The result of a bootstrap: an object that the sender hosts."""

    export_id: int


@dataclass(frozen=True, slots=True)
class Canceled:
    """The call was canceled."""


Result: TypeAlias = Struct | Hosted | RpcException | Canceled


@dataclass(frozen=True, slots=True)
class Abort:
    """The sender ends the RPC connection."""

    reason: str
    type: ExceptionType = ExceptionType.FAILED

    def encode(self) -> bytes:
        """The message with its stream header."""
        return _encode(_Kind.ABORT, _exception(self.reason, self.type))


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Ask for the other side's object."""

    question_id: int

    def encode(self) -> bytes:
        """The message with its stream header."""
        return _encode(_Kind.BOOTSTRAP, Struct(_data("<II", self.question_id, 0), (None,)))


@dataclass(frozen=True, slots=True)
class Call:
    """Call a method; `interface_id` is that of the interface that declares it."""

    question_id: int
    target: PromisedAnswer | ImportedCapability
    interface_id: int
    method_id: int
    params: Struct

    def encode(self) -> bytes:
        """The message with its stream header."""
        match self.target:
            case PromisedAnswer(question_id):
                promised = Struct(_data("<II", question_id, 0), (_NO_TRANSFORM,))
                target = Struct(_data("<IHH", 0, 1, 0), (promised,))
            case ImportedCapability(export_id):
                target = Struct(_data("<IHH", export_id, 0, 0), (None,))
        data = _data("<IHHQQ", self.question_id, self.method_id, 0, self.interface_id, 0)
        payload = Struct(pointers=(self.params, _EMPTY_TABLE))
        return _encode(_Kind.CALL, Struct(data, (target, payload, None)))


@dataclass(frozen=True, slots=True)
class Return:
    """The answer to a call or bootstrap."""

    answer_id: int
    result: Result

    def encode(self) -> bytes:
        """The message with its stream header."""
        body: Struct | None
        match self.result:
            case RpcException(reason, kind):
                which, body = 1, _exception(reason, kind)
            case Canceled():
                which, body = _CANCELED, None
            case Hosted(export_id):
                table = StructList((Struct(_data("<HHI", _SENDER_HOSTED, 0, export_id), (None,)),))
                which, body = 0, Struct(pointers=(Capability(0), table))
            case Struct() as content:
                which, body = 0, Struct(pointers=(content, None))
        data = _data("<IHHQ", self.answer_id, 0, which, 0)
        return _encode(_Kind.RETURN, Struct(data, (body,)))


@dataclass(frozen=True, slots=True)
class Finish:
    """The question's answer is no longer needed; its number may be used again."""

    question_id: int
    release_result_caps: bool = False

    def encode(self) -> bytes:
        """The message with its stream header."""
        data = _data("<IB3x", self.question_id, not self.release_result_caps)
        return _encode(_Kind.FINISH, Struct(data))


@dataclass(frozen=True, slots=True)
class Release:
    """The sender drops references to an object of the receiver's."""

    export_id: int
    count: int

    def encode(self) -> bytes:
        """The message with its stream header."""
        return _encode(_Kind.RELEASE, Struct(_data("<II", self.export_id, self.count)))


@dataclass(frozen=True, slots=True)
class Unimplemented:
    """The sender does not know this message of ours, which comes back."""

    message: Struct

    def encode(self) -> bytes:
        """The message with its stream header."""
        return _encode(_Kind.UNIMPLEMENTED, self.message)


@dataclass(frozen=True, slots=True)
class Unknown:
    """A message outside the subset; answer it with `Unimplemented(message)`."""

    message: Struct


RpcMessage: TypeAlias = (
    Abort | Bootstrap | Call | Return | Finish | Release | Unimplemented | Unknown
)


def parse_rpc(message: Struct) -> RpcMessage:
    """Read a message from its root. Raises TunnelError."""
    kind = message.u16(0)
    read = _READERS.get(kind)
    return Unknown(message) if read is None else read(message.struct(0))


def _encode(kind: _Kind, body: Struct) -> bytes:
    return encode_message(Struct(_data("<HHI", kind, 0, 0), (body,)))


def _data(form: str, *values: int) -> bytes:
    try:
        return struct.pack(form, *values)
    except struct.error as error:
        raise TunnelError(f"RPC: a number does not fit its field: {error}") from None


def _exception(reason: str, kind: ExceptionType) -> Struct:
    return Struct(_data("<IHH", 0, kind, 0), (text_node(reason),))


def _read_exception(body: Struct) -> tuple[str, ExceptionType]:
    try:
        kind = ExceptionType(body.u16(4))
    except ValueError:
        kind = ExceptionType.FAILED
    return body.text(0), kind


def _read_call(body: Struct) -> Call:
    target: PromisedAnswer | ImportedCapability
    where = body.struct(0)
    which = where.u16(4)
    if which == 0:
        target = ImportedCapability(where.u32(0))
    elif which == 1:
        promised = where.struct(0)
        if promised.structs(0):
            raise TunnelError("RPC: a call to a part of an answer; only the whole can be called")
        target = PromisedAnswer(promised.u32(0))
    else:
        raise TunnelError(f"RPC: a call to a target of the unknown kind {which}")
    if body.u16(6):
        raise TunnelError("RPC: a call whose results are to go elsewhere than to its caller")
    params = body.struct(1).struct(0)
    return Call(body.u32(0), target, body.u64(8), body.u16(4), params)


def _read_return(body: Struct) -> Return:
    which = body.u16(6)
    result: Result
    if which == 0:
        result = _read_payload(body.struct(0))
    elif which == 1:
        result = RpcException(*_read_exception(body.struct(0)))
    elif which == _CANCELED:
        result = Canceled()
    else:
        raise TunnelError(f"RPC: an answer of the unknown kind {which}")
    return Return(body.u32(0), result)


def _read_payload(payload: Struct) -> Struct | Hosted:
    content = payload.pointer(0)
    if not isinstance(content, Capability):
        return payload.struct(0)
    table = payload.structs(1)
    if content.index >= len(table) or table[content.index].u16(0) != _SENDER_HOSTED:
        raise TunnelError("RPC: a capability that the sender does not host")
    return Hosted(table[content.index].u32(4))


_READERS: Final[dict[int, Callable[[Struct], RpcMessage]]] = {
    _Kind.UNIMPLEMENTED: Unimplemented,
    _Kind.ABORT: lambda body: Abort(*_read_exception(body)),
    _Kind.CALL: _read_call,
    _Kind.RETURN: _read_return,
    _Kind.FINISH: lambda body: Finish(body.u32(0), not body.bit(32)),
    _Kind.RELEASE: lambda body: Release(body.u32(0), body.u32(4)),
    _Kind.BOOTSTRAP: lambda body: Bootstrap(body.u32(0)),
}
