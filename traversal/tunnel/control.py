"""The connector's side of the control stream: register, report the configuration, leave.

Pure, and the same over HTTP/2 and QUIC (edge tunnel specification 7.4). Feed bytes with `receive`
and carry out the events that it returns; send what `data_to_send` returns after every other call,
and once at the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import Struct
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.registration import (
    EMPTY_RESULTS,
    ConnectionDetails,
    ConnectionRefusal,
    RegisterConnection,
    RegistrationMethod,
    UpdateLocalConfiguration,
    parse_register_results,
)
from traversal.wire.tunnel.rpc_client import Answer, RpcClient


@dataclass(frozen=True, slots=True)
class Registered:
    """The connection serves the tunnel now."""

    details: ConnectionDetails


@dataclass(frozen=True, slots=True)
class Refused:
    """The edge does not take the connection."""

    refusal: ConnectionRefusal


@dataclass(frozen=True, slots=True)
class Unregistered:
    """The edge gives the connection no new requests; it closes it when those open are done."""


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """The edge did not take our configuration; it serves us all the same."""

    reason: str


ControlEvent: TypeAlias = Registered | Refused | Unregistered | ReportFailed


class ControlClient:
    """One control stream. Asks for registration at once."""

    def __init__(self, request: RegisterConnection) -> None:
        self._rpc = RpcClient()
        self._asked: dict[int, RegistrationMethod] = {}
        self._call(RegistrationMethod.REGISTER_CONNECTION, request.to_struct())

    def report_configuration(self, document: bytes) -> None:
        """Tell the edge our configuration (JSON): on connection 0, and only if it does not manage
        it."""
        params = UpdateLocalConfiguration(document).to_struct()
        self._call(RegistrationMethod.UPDATE_LOCAL_CONFIGURATION, params)

    def unregister(self) -> None:
        """Ask the edge for no new requests."""
        self._call(RegistrationMethod.UNREGISTER_CONNECTION, EMPTY_RESULTS)

    def receive(self, data: bytes) -> list[ControlEvent]:
        """Bytes from the stream. Raises TunnelError, also at the stream's end."""
        if not data:
            raise TunnelError("the edge ended the control stream")
        events = []
        for answer in self._rpc.receive(data):
            event = self._handle(answer)
            if event is not None:
                events.append(event)
        return events

    def end(self) -> None:
        """Nothing more will be asked; end the stream after this."""
        self._rpc.end()

    def data_to_send(self) -> bytes:
        """Bytes for the stream; empty when there are none."""
        return self._rpc.data_to_send()

    def _call(self, method: RegistrationMethod, params: Struct) -> None:
        self._asked[self._rpc.call(rpc.REGISTRATION_SERVER, method, params)] = method

    def _handle(self, answer: Answer) -> ControlEvent | None:
        method = self._asked.pop(answer.question_id)
        result = answer.result
        if method is RegistrationMethod.UPDATE_LOCAL_CONFIGURATION:
            return ReportFailed(result.reason) if isinstance(result, rpc.RpcException) else None
        if isinstance(result, rpc.RpcException):
            raise TunnelError(f"the edge: {result.reason}")
        if method is RegistrationMethod.UNREGISTER_CONNECTION:
            return Unregistered()
        outcome = parse_register_results(result)
        if isinstance(outcome, ConnectionRefusal):
            return Refused(outcome)
        return Registered(outcome)
