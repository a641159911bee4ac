"""The edge's side of the control stream: the documented conversation, and every other one."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.edge.control import (
    MESSAGES,
    REGISTRATION_BYTES,
    REGISTRATION_SECONDS,
    UNFINISHED_QUESTIONS,
    ControlEnded,
    ControlServer,
    LocalConfigurationReported,
    RegistrationRequested,
    UnregisterRequested,
)
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import MessageSplitter, Struct, encode_message, parse_message
from traversal.wire.tunnel.registration import (
    EMPTY_RESULTS,
    ConnectionDetails,
    ConnectionOptions,
    ConnectionRefusal,
    RegisterConnection,
    RegistrationMethod,
    UpdateLocalConfiguration,
)

REQUEST = RegisterConnection(
    "account", b"S" * 32, UUID(int=1), 2, ConnectionOptions(UUID(int=3), ("a",), "1", "linux")
)
DETAILS = ConnectionDetails(UUID(int=4), "lab01")
EDGE = rpc.ImportedCapability(0)
BOOTSTRAP = rpc.Bootstrap(0).encode()


def call(
    question_id: int,
    method_id: int,
    params: Struct = EMPTY_RESULTS,
    *,
    interface_id: int = rpc.REGISTRATION_SERVER,
    target: rpc.PromisedAnswer | rpc.ImportedCapability = EDGE,
) -> bytes:
    return rpc.Call(question_id, target, interface_id, method_id, params).encode()


REGISTER = call(
    1,
    RegistrationMethod.REGISTER_CONNECTION,
    REQUEST.to_struct(),
    target=rpc.PromisedAnswer(0),
)


def sent(server: ControlServer) -> list[rpc.RpcMessage]:
    return [rpc.parse_rpc(root) for root in MessageSplitter().receive(server.data_to_send())]


def registered() -> ControlServer:
    server = ControlServer(now=100.0)
    assert server.receive(BOOTSTRAP + REGISTER) == [RegistrationRequested(REQUEST)]
    server.answer(DETAILS)
    assert sent(server) == [
        rpc.Return(0, rpc.Hosted(0)),
        rpc.Return(1, DETAILS.to_struct()),
    ]
    assert server.receive(rpc.Finish(0).encode() + rpc.Finish(1).encode()) == []
    return server


def test_the_documented_conversation() -> None:
    """Register, report, unregister and leave, with question numbers used again."""
    server = registered()
    assert server.next_deadline() is None
    report = UpdateLocalConfiguration(b"{}").to_struct()
    method = RegistrationMethod.UPDATE_LOCAL_CONFIGURATION
    assert server.receive(call(1, method, report)) == [LocalConfigurationReported(b"{}")]
    assert sent(server) == [rpc.Return(1, EMPTY_RESULTS)]
    assert server.receive(rpc.Finish(1).encode()) == []
    unregister = call(1, RegistrationMethod.UNREGISTER_CONNECTION)
    assert server.receive(unregister) == [UnregisterRequested()]
    assert sent(server) == [rpc.Return(1, EMPTY_RESULTS)]
    leaving = (
        rpc.Finish(1).encode()
        + rpc.Release(0, 1).encode()
        + rpc.Abort(rpc.SHUTDOWN_REASON).encode()
    )
    assert server.receive(leaving) == [ControlEnded()]
    assert server.receive(b"more") == [ControlEnded()]


def test_byte_by_byte() -> None:
    """However slowly it comes, it is the same conversation."""
    server = ControlServer(now=0.0)
    events = []
    for byte in BOOTSTRAP + REGISTER:
        events += server.receive(bytes([byte]))
    assert events == [RegistrationRequested(REQUEST)]


def test_refusal() -> None:
    """A refusal is answered, and the deadline goes on: the shell closes the connection."""
    server = ControlServer(now=0.0)
    server.receive(BOOTSTRAP + REGISTER)
    refusal = ConnectionRefusal("no")
    server.answer(refusal)
    assert sent(server)[1] == rpc.Return(1, refusal.to_struct())
    assert server.next_deadline() == REGISTRATION_SECONDS


def test_overdue_registration() -> None:
    """Whoever does not register in time is let go; who has registered may be silent for ever."""
    server = ControlServer(now=5.0)
    assert server.on_time(5.0 + REGISTRATION_SECONDS - 0.1) == []
    (event,) = server.on_time(5.0 + REGISTRATION_SECONDS)
    assert isinstance(event, ControlEnded)
    assert "no registration" in event.failure
    assert registered().on_time(1e9) == []


@pytest.mark.parametrize(
    "message",
    [
        call(2, 7),
        call(2, 0, REQUEST.to_struct()),  # a second registration
        call(2, 0, interface_id=rpc.SESSION_MANAGER),
        call(2, 1, target=rpc.ImportedCapability(9)),
        call(2, 1, target=rpc.PromisedAnswer(9)),
    ],
)
def test_wrong_calls_fail(message: bytes) -> None:
    """They are answered with an exception, and the connection goes on."""
    server = registered()
    assert server.receive(message) == []
    (answer,) = sent(server)
    assert isinstance(answer, rpc.Return)
    assert isinstance(answer.result, rpc.RpcException)


@pytest.mark.parametrize("method", [1, 2])
def test_nothing_before_registration(method: int) -> None:
    """Nobody can unregister or report who has not registered."""
    server = ControlServer(now=0.0)
    assert server.receive(BOOTSTRAP + call(1, method)) == []
    assert isinstance(sent(server)[1].result, rpc.RpcException)  # type: ignore[union-attr]


def test_unknown_messages_are_echoed() -> None:
    """As Cap'n Proto asks for."""
    server = registered()
    resolve = parse_message(bytes.fromhex("00000000020000000000000001000000 0500000000000000"))
    assert server.receive(encode_message(resolve)) == []
    assert sent(server) == [rpc.Unimplemented(resolve)]


@pytest.mark.parametrize(
    "data",
    [
        BOOTSTRAP + BOOTSTRAP,  # a question asked twice
        b"".join(rpc.Bootstrap(i).encode() for i in range(UNFINISHED_QUESTIONS + 1)),
        b"".join(rpc.Finish(i).encode() for i in range(MESSAGES + 1)),
        b"\xff" * 8,
        bytes(REGISTRATION_BYTES + 1),
        rpc.Abort("because").encode(),
        b"",
    ],
)
def test_what_ends_the_stream(data: bytes) -> None:
    """Violations end it with a reason, and nothing more is read."""
    server = ControlServer(now=0.0)
    (event,) = server.receive(data)
    assert isinstance(event, ControlEnded)
    assert event.failure
    assert server.receive(BOOTSTRAP + REGISTER) == [event]
    assert server.next_deadline() is None


def test_large_reports_only_after_registration() -> None:
    """A stranger gets 64 KiB; a connector may report a large configuration."""
    report = call(2, 2, UpdateLocalConfiguration(bytes(500_000)).to_struct())
    (event,) = registered().receive(report)
    assert event == LocalConfigurationReported(bytes(500_000))
    (event,) = ControlServer(now=0.0).receive(report)
    assert isinstance(event, ControlEnded)


MESSAGES_OF_ANY_KIND = st.one_of(
    st.builds(rpc.Bootstrap, st.integers(0, 3)),
    st.builds(rpc.Finish, st.integers(0, 3), st.booleans()),
    st.builds(rpc.Release, st.integers(0, 3), st.integers(0, 3)),
    st.builds(rpc.Return, st.integers(0, 3), st.just(EMPTY_RESULTS)),
    st.builds(
        rpc.Call,
        st.integers(0, 3),
        st.builds(rpc.PromisedAnswer, st.integers(0, 2))
        | st.builds(rpc.ImportedCapability, st.integers(0, 1)),
        st.sampled_from([rpc.REGISTRATION_SERVER, rpc.SESSION_MANAGER, 0]),
        st.integers(0, 4),
        st.just(REQUEST.to_struct()) | st.just(EMPTY_RESULTS),
    ),
    st.just(rpc.Unimplemented(EMPTY_RESULTS)),
).map(lambda message: message.encode())


@given(st.lists(MESSAGES_OF_ANY_KIND | st.binary(max_size=40), max_size=12), st.booleans())
def test_any_conversation(parts: list[bytes], accepts: bool) -> None:
    """No order of messages, and no noise among them, does more than end the stream; what we send
    is always well-formed, and never a second registration."""
    server = ControlServer(now=0.0)
    requests = 0
    for part in parts:
        for event in server.receive(part):
            if isinstance(event, RegistrationRequested):
                requests += 1
                server.answer(DETAILS if accepts else ConnectionRefusal("no"))
        sent(server)
    assert requests <= 1 or not accepts
