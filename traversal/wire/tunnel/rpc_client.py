"""The asking side of an RPC stream: one object of the other side's, and calls to it.

Pure. Calls may be made at once, before the other side has named its object (edge tunnel
specification 7.4). Send what `data_to_send` returns after every other call.
"""

from __future__ import annotations

from dataclasses import dataclass

from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import MAX_MESSAGE_BYTES, MessageSplitter, Struct
from traversal.wire.tunnel.errors import TunnelError


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned; an exception where it failed."""

    question_id: int
    result: Struct | rpc.RpcException


class RpcClient:
    """One RPC stream on which only we ask."""

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._splitter = MessageSplitter(max_message_bytes)
        self._outgoing: list[bytes] = []
        self._open: set[int] = set()
        self._export_id: int | None = None
        self._bootstrap_id: int | None = None

    def call(self, interface_id: int, method_id: int, params: Struct) -> int:
        """Ask; the number returned is that of the `Answer` to come."""
        target: rpc.PromisedAnswer | rpc.ImportedCapability
        if self._export_id is not None:
            target = rpc.ImportedCapability(self._export_id)
        else:
            if self._bootstrap_id is None:
                self._bootstrap_id = self._next_question()
                self._outgoing.append(rpc.Bootstrap(self._bootstrap_id).encode())
            target = rpc.PromisedAnswer(self._bootstrap_id)
        question_id = self._next_question()
        call = rpc.Call(question_id, target, interface_id, method_id, params)
        self._outgoing.append(call.encode())
        return question_id

    def receive(self, data: bytes) -> list[Answer]:
        """Bytes from the stream. Raises TunnelError, also where the other side ends the RPC."""
        answers = []
        for root in self._splitter.receive(data):
            message = rpc.parse_rpc(root)
            if isinstance(message, rpc.Return):
                answer = self._handle_return(message)
                if answer is not None:
                    answers.append(answer)
            elif isinstance(message, rpc.Abort):
                raise TunnelError(f"RPC: the other side ended it: {message.reason}")
            elif isinstance(message, rpc.Unknown):
                self._outgoing.append(rpc.Unimplemented(message.message).encode())
        return answers

    def end(self) -> None:
        """Say that we ask nothing more."""
        if self._export_id is not None:
            self._outgoing.append(rpc.Release(self._export_id, 1).encode())
            self._export_id = None
        self._outgoing.append(rpc.Abort(rpc.SHUTDOWN_REASON).encode())

    def data_to_send(self) -> bytes:
        """Bytes for the stream; empty when there are none."""
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        return data

    def _next_question(self) -> int:
        number = next(n for n in range(len(self._open) + 1) if n not in self._open)
        self._open.add(number)
        return number

    def _handle_return(self, message: rpc.Return) -> Answer | None:
        question_id = message.answer_id
        if question_id not in self._open:
            raise TunnelError(f"RPC: an answer to question {question_id}, which is not open")
        self._open.remove(question_id)
        self._outgoing.append(rpc.Finish(question_id).encode())
        result = message.result
        if question_id == self._bootstrap_id:
            # Its number may be used again, and then means another question.
            self._bootstrap_id = None
            if not isinstance(result, rpc.Hosted):
                raise TunnelError("RPC: the other side has no object")
            self._export_id = result.export_id
            return None
        if isinstance(result, rpc.Hosted):
            raise TunnelError("RPC: an object as the answer to a call")
        if isinstance(result, rpc.Canceled):
            result = rpc.RpcException("the call was canceled")
        return Answer(question_id, result)
