"""The edge's side of the control stream: the RPC by which a connection registers and leaves.

Pure, and the same over HTTP/2 and QUIC (edge tunnel specification 7.4). Feed bytes with `receive`,
carry out the events that it returns, answer `RegistrationRequested` with `answer`; after each of
these send what `data_to_send` returns. Ends with `ControlEnded`, after which nothing is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import MAX_MESSAGE_BYTES, MessageSplitter, Struct
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.registration import (
    EMPTY_RESULTS,
    ConnectionDetails,
    ConnectionRefusal,
    RegisterConnection,
    RegistrationMethod,
    UpdateLocalConfiguration,
)

REGISTRATION_SECONDS: Final = 10.0
"""From the control stream's beginning. A connector waits 5 s for the answer, and asks at once."""
REGISTRATION_BYTES: Final = 64 << 10
"""All that may come before somebody has proved who he is; usual are 700 bytes."""
UNFINISHED_QUESTIONS: Final = 64
"""The reference has two at a time."""
MESSAGES: Final = 10_000
"""In the life of a connection; the reference sends some ten."""
_BOOTSTRAP_EXPORT: Final = 0


@dataclass(frozen=True, slots=True)
class RegistrationRequested:
    """Answer it within 5 s."""

    request: RegisterConnection


@dataclass(frozen=True, slots=True)
class LocalConfigurationReported:
    """The connector told its configuration (JSON)."""

    document: bytes


@dataclass(frozen=True, slots=True)
class UnregisterRequested:
    """Give the connection no new requests, and close it when those under way are done."""


@dataclass(frozen=True, slots=True)
class ControlEnded:
    """The stream is of no more use; `failure` says what was wrong, empty if nothing was."""

    failure: str = ""


ControlEvent: TypeAlias = (
    RegistrationRequested | LocalConfigurationReported | UnregisterRequested | ControlEnded
)


class ControlServer:
    """One control stream. See the module's text for the order of calls."""

    def __init__(self, now: float) -> None:
        self._splitter = MessageSplitter(REGISTRATION_BYTES)
        self._outgoing: list[bytes] = []
        self._bytes_before_registration = 0
        self._messages = 0
        self._questions: set[int] = set()
        self._bootstrap_question: int | None = None
        self._register_question: int | None = None
        self._is_registered = False
        self._failure: str | None = None
        self._deadline = now + REGISTRATION_SECONDS

    def next_deadline(self) -> float | None:
        """When `on_time` is due; None once registered."""
        is_waiting = not self._is_registered and self._failure is None
        return self._deadline if is_waiting else None

    def on_time(self, now: float) -> list[ControlEvent]:
        """Whether the registration is overdue."""
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return []
        return self._end(f"no registration within {REGISTRATION_SECONDS:.0f} s")

    def receive(self, data: bytes) -> list[ControlEvent]:
        """Bytes from the stream; empty at its end. Once it has ended, that is all that happens."""
        if self._failure is not None:
            return [ControlEnded(self._failure)]
        if not data:
            return self._end("" if self._is_registered else "it ended before the registration")
        events: list[ControlEvent] = []
        try:
            if not self._is_registered:
                self._bytes_before_registration += len(data)
                if self._bytes_before_registration > REGISTRATION_BYTES:
                    raise TunnelError(f"more than {REGISTRATION_BYTES} bytes before registration")
            for root in self._splitter.receive(data):
                events += self._handle(rpc.parse_rpc(root))
                if events and isinstance(events[-1], ControlEnded):
                    break
        except TunnelError as error:
            self._outgoing.append(rpc.Abort(str(error)).encode())
            events += self._end(str(error))
        return events

    def answer(self, result: ConnectionDetails | ConnectionRefusal) -> None:
        """Answer the registration."""
        assert self._register_question is not None
        self._return(self._register_question, result.to_struct())
        self._register_question = None
        if isinstance(result, ConnectionDetails):
            self._is_registered = True
            # A connector that is known may report a large configuration.
            self._splitter.max_bytes = MAX_MESSAGE_BYTES

    def data_to_send(self) -> bytes:
        """Bytes for the stream; empty when there are none."""
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        return data

    def _end(self, failure: str) -> list[ControlEvent]:
        self._failure = failure
        return [ControlEnded(failure)]

    def _handle(self, message: rpc.RpcMessage) -> list[ControlEvent]:
        self._messages += 1
        if self._messages > MESSAGES:
            raise TunnelError(f"more than {MESSAGES} messages on a control stream")
        match message:
            case rpc.Bootstrap(question_id):
                self._ask(question_id)
                self._bootstrap_question = question_id
                self._outgoing.append(
                    rpc.Return(question_id, rpc.Hosted(_BOOTSTRAP_EXPORT)).encode()
                )
            case rpc.Call():
                self._ask(message.question_id)
                return self._handle_call(message)
            case rpc.Finish(question_id):
                self._questions.discard(question_id)
            case rpc.Abort(reason):
                return self._end("" if reason == rpc.SHUTDOWN_REASON else f"aborted: {reason}")
            case rpc.Unknown(root):
                self._outgoing.append(rpc.Unimplemented(root).encode())
            case _:
                pass  # Release: the object lives as long as the stream. We asked nothing.
        return []

    def _ask(self, question_id: int) -> None:
        if question_id in self._questions:
            raise TunnelError(f"RPC: question {question_id} is still open")
        if len(self._questions) >= UNFINISHED_QUESTIONS:
            raise TunnelError(f"RPC: more than {UNFINISHED_QUESTIONS} open questions")
        self._questions.add(question_id)

    def _handle_call(self, call: rpc.Call) -> list[ControlEvent]:
        question_id = call.question_id
        match call.target:
            case rpc.PromisedAnswer(promised):
                is_known = promised == self._bootstrap_question
            case rpc.ImportedCapability(export_id):
                is_known = export_id == _BOOTSTRAP_EXPORT and self._bootstrap_question is not None
        if not is_known:
            self._fail(question_id, "there is no such object")
            return []
        if call.interface_id != rpc.REGISTRATION_SERVER:
            self._fail(question_id, "unknown interface", rpc.ExceptionType.UNIMPLEMENTED)
            return []
        if call.method_id == RegistrationMethod.REGISTER_CONNECTION:
            if self._is_registered or self._register_question is not None:
                self._fail(question_id, "the connection is registered already")
                return []
            request = RegisterConnection.from_struct(call.params)
            self._register_question = question_id
            return [RegistrationRequested(request)]
        if not self._is_registered:
            self._fail(question_id, "the connection is not registered")
            return []
        match call.method_id:
            case RegistrationMethod.UNREGISTER_CONNECTION:
                self._return(question_id, EMPTY_RESULTS)
                return [UnregisterRequested()]
            case RegistrationMethod.UPDATE_LOCAL_CONFIGURATION:
                report = UpdateLocalConfiguration.from_struct(call.params)
                self._return(question_id, EMPTY_RESULTS)
                return [LocalConfigurationReported(report.configuration)]
        self._fail(question_id, "unknown method", rpc.ExceptionType.UNIMPLEMENTED)
        return []

    def _return(self, question_id: int, results: Struct) -> None:
        self._outgoing.append(rpc.Return(question_id, results).encode())

    def _fail(
        self,
        question_id: int,
        reason: str,
        kind: rpc.ExceptionType = rpc.ExceptionType.FAILED,
    ) -> None:
        self._outgoing.append(rpc.Return(question_id, rpc.RpcException(reason, kind)).encode())
