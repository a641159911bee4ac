"""The answering side of an RPC stream: one object of ours, and the calls to it.

Pure. Feed bytes with `receive`, answer each call that it returns with `answer`; after each of these
send what `data_to_send` returns.
"""

from __future__ import annotations

from typing import Final

from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import MAX_MESSAGE_BYTES, MessageSplitter, Struct
from traversal.wire.tunnel.errors import TunnelError

MAX_OPEN_QUESTIONS: Final = 64
"""The reference has two at a time."""
_EXPORT_ID: Final = 0


class RpcServer:
    """One RPC stream on which only the other side asks.

    Attributes:
        is_ended: the other side said that it asks nothing more.
    """

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.is_ended = False
        self._splitter = MessageSplitter(max_message_bytes)
        self._outgoing: list[bytes] = []
        self._questions: set[int] = set()
        self._bootstrap_id: int | None = None

    def receive(self, data: bytes) -> list[rpc.Call]:
        """Bytes from the stream. Raises TunnelError."""
        calls = []
        for root in self._splitter.receive(data):
            match rpc.parse_rpc(root):
                case rpc.Bootstrap(question_id):
                    self._ask(question_id)
                    self._bootstrap_id = question_id
                    self.answer(question_id, rpc.Hosted(_EXPORT_ID))
                case rpc.Call() as call:
                    self._ask(call.question_id)
                    if self._is_ours(call.target):
                        calls.append(call)
                    else:
                        self.answer(call.question_id, rpc.RpcException("there is no such object"))
                case rpc.Finish(question_id):
                    self._questions.discard(question_id)
                case rpc.Abort(reason):
                    self.is_ended = True
                    if reason != rpc.SHUTDOWN_REASON:
                        raise TunnelError(f"RPC: the other side ended it: {reason}")
                case rpc.Unknown(message):
                    self._outgoing.append(rpc.Unimplemented(message).encode())
                case _:
                    pass  # Release: our object lives as long as the stream. We asked nothing.
        return calls

    def answer(self, question_id: int, result: Struct | rpc.Hosted | rpc.RpcException) -> None:
        """Answer a call."""
        self._outgoing.append(rpc.Return(question_id, result).encode())

    def data_to_send(self) -> bytes:
        """Bytes for the stream; empty when there are none."""
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        return data

    def _ask(self, question_id: int) -> None:
        if question_id in self._questions:
            raise TunnelError(f"RPC: question {question_id} is still open")
        if len(self._questions) >= MAX_OPEN_QUESTIONS:
            raise TunnelError(f"RPC: more than {MAX_OPEN_QUESTIONS} open questions")
        self._questions.add(question_id)

    def _is_ours(self, target: rpc.PromisedAnswer | rpc.ImportedCapability) -> bool:
        match target:
            case rpc.PromisedAnswer(question_id):
                return question_id == self._bootstrap_id
            case rpc.ImportedCapability(export_id):
                return export_id == _EXPORT_ID and self._bootstrap_id is not None
