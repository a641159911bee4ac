"""Both sides of an RPC stream, joined; and each alone with whatever comes."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import Struct, parse_message
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.rpc_client import Answer, RpcClient
from traversal.wire.tunnel.rpc_server import MAX_OPEN_QUESTIONS, RpcServer
from traversal.wire.tunnel.sessions import RegisterUdpSession, SessionMethod

SESSION = RegisterUdpSession(UUID(int=7), "192.0.2.1", 53)
RESULTS = Struct(b"12345678")


def ask(client: RpcClient) -> int:
    return client.call(rpc.SESSION_MANAGER, SessionMethod.REGISTER_UDP_SESSION, SESSION.to_struct())


def converse(client: RpcClient, server: RpcServer, step: int = 10_000) -> list[Answer]:
    """Carry bytes both ways, `step` at a time, until nothing is left; calls get RESULTS."""
    answers = []
    while data := client.data_to_send():
        for start in range(0, len(data), step):
            for call in server.receive(data[start : start + step]):
                server.answer(call.question_id, RESULTS)
        back = server.data_to_send()
        for start in range(0, len(back), step):
            answers += client.receive(back[start : start + step])
    return answers


@pytest.mark.parametrize("step", [1, 13, 10_000])
def test_calls(step: int) -> None:
    """Calls before and after the other side has named its object are answered, each once, however
    the bytes are cut."""
    client, server = RpcClient(), RpcServer()
    first, second = ask(client), ask(client)
    answers = converse(client, server, step)
    assert answers == [Answer(first, RESULTS), Answer(second, RESULTS)]
    third = ask(client)
    assert converse(client, server, step) == [Answer(third, RESULTS)]
    client.end()
    converse(client, server)
    assert server.is_ended


def test_the_call_arrives() -> None:
    """The answering side sees interface, method and parameters as they were meant."""
    client, server = RpcClient(), RpcServer()
    ask(client)
    (call,) = server.receive(client.data_to_send())
    assert (call.interface_id, call.method_id) == (rpc.SESSION_MANAGER, 0)
    assert RegisterUdpSession.from_struct(call.params) == SESSION


def test_failures() -> None:
    """An exception comes back as the answer; other objects than ours have no methods."""
    client, server = RpcClient(), RpcServer()
    question = ask(client)
    (call,) = server.receive(client.data_to_send())
    server.answer(call.question_id, rpc.RpcException("no"))
    assert client.receive(server.data_to_send()) == [Answer(question, rpc.RpcException("no"))]
    stray = rpc.Call(9, rpc.ImportedCapability(5), rpc.SESSION_MANAGER, 0, Struct())
    assert server.receive(stray.encode()) == []
    answer = rpc.parse_rpc(parse_message(server.data_to_send()))
    assert isinstance(answer, rpc.Return)
    assert isinstance(answer.result, rpc.RpcException)


@pytest.mark.parametrize(
    "data",
    [
        rpc.Return(5, RESULTS).encode(),
        rpc.Return(0, RESULTS).encode(),
        rpc.Return(1, rpc.Hosted(0)).encode(),
        rpc.Abort("lost").encode(),
    ],
    ids=["not asked", "no object", "object for a call", "abort"],
)
def test_bad_answers(data: bytes) -> None:
    """Answers that answer nothing, or with the wrong kind of thing, end the client."""
    client = RpcClient()
    ask(client)
    with pytest.raises(TunnelError):
        client.receive(data)


def test_bounded_questions() -> None:
    """A client that never finishes its questions, or asks one twice, is refused."""
    server = RpcServer()
    server.receive(rpc.Bootstrap(0).encode())
    with pytest.raises(TunnelError):
        server.receive(rpc.Bootstrap(0).encode())
    flood = b"".join(rpc.Bootstrap(number).encode() for number in range(1, MAX_OPEN_QUESTIONS + 1))
    with pytest.raises(TunnelError):
        server.receive(flood)


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_any_bytes(chunks: list[bytes]) -> None:
    """Whatever comes is taken or refused with TunnelError, by either side."""
    client = RpcClient()
    ask(client)
    for side in (client, RpcServer()):
        try:
            for chunk in chunks:
                side.receive(chunk)
        except TunnelError:
            pass
