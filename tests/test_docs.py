"""The examples of README.md and docs/ work as they are written there; nothing here knows them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import trio

from relay.config import Config
from relay.map_entry import build_map
from relay.server import serve
from traversal import NodePrivate, NodePublic, RelayMap, open_node
from traversal.agent.tables import parse_file

pytestmark = pytest.mark.jail
"""They use the network as any node does: in a jail there is only loopback."""

ROOT = Path(__file__).parent.parent
SECONDS = 30


def example(file: str) -> str:
    """The Python code of a document."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
    return str(code)


@pytest.fixture
async def relay_map(nursery: trio.Nursery) -> RelayMap:
    """Of a relay on loopback, as `underpass-relay serve --dev` starts one."""
    config = Config.dev()
    bound = await nursery.start(serve, config, lambda: config)
    return build_map(
        config,
        derp_port=bound.derp[0][1],
        stun_port=bound.stun[0][1],
        can_port_80=False,
        pin=bound.pin,
    )


class Example:
    """An example that runs as a program; `says` waits for what it prints."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._printed = ""

    async def says(self, wanted: str) -> re.Match[str]:
        assert self._process.stdout is not None
        with trio.fail_after(SECONDS):
            while (found := re.search(wanted, self._printed)) is None:
                data = await self._process.stdout.receive_some()
                assert data, f"it ended without saying {wanted!r}: {self._printed}"
                self._printed += data.decode()
        return found


@pytest.fixture
def start(nursery: trio.Nursery, tmp_path: Path) -> Callable[..., object]:
    """Starts Python with arguments, in a directory of the test."""

    async def start(*arguments: str) -> Example:
        run = partial(
            trio.run_process,
            [sys.executable, "-u", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        process: trio.Process = await nursery.start(run)
        return Example(process)

    return start


def a_key() -> NodePrivate:
    return NodePrivate.generate(os.urandom)


async def test_readme(start: Callable[..., object], relay_map: RelayMap, tmp_path: Path) -> None:
    """A node that knows the printed key gets the greeting, and its answer is printed."""
    (tmp_path / "relays.json").write_text(relay_map.to_json())
    program = await start("-c", example("README.md"))
    key = NodePublic.parse((await program.says(r"nodekey:[0-9a-f]{64}"))[0])
    async with open_node(a_key(), relay_map) as node:
        link = await node.connect(key, relay=900)
        await link.send(b"from a peer")
        with trio.fail_after(SECONDS):
            assert await link.receive() == b"hello"
        await program.says("from a peer")
        await program.says(r"LinkPath\(kind=.*\) Traffic to ")


async def test_nodes(start: Callable[..., object], relay_map: RelayMap, tmp_path: Path) -> None:
    """With the peer's key filled in, it greets that peer and prints the answer."""
    (tmp_path / "relays.json").write_text(relay_map.to_json())
    private = a_key()
    (tmp_path / "node.key").write_text(private.reveal() + "\n")
    peer = a_key()
    async with open_node(peer, relay_map, admit=lambda key: key == private.public()) as node:
        code = example("docs/nodes.md").replace("nodekey:...", str(peer.public()))
        program = await start("-c", code)
        with trio.fail_after(SECONDS):
            link = await node.accept()
            assert await link.receive() == b"hello"
        await link.send(b"from attic")
        await program.says("from attic.*LinkPath")


async def test_ice(start: Callable[..., object]) -> None:
    """Both ends are in it."""
    program = await start("-c", example("docs/ice.md"))
    await program.says("hello.*from")


async def test_agent(start: Callable[..., object], relay_map: RelayMap, tmp_path: Path) -> None:
    """Two agents greet each other, directly in the end, and say why."""
    (tmp_path / "relays.json").write_text(relay_map.to_json())
    keys = {name: a_key() for name in ("attic", "desk")}
    for name, key in keys.items():
        (tmp_path / f"{name}.key").write_text(key.reveal())
    agents = {}
    for name, other in (("attic", "desk"), ("desk", "attic")):
        agents[name] = await start(
            str(ROOT / "docs/agent.py"),
            f"{name}.key",
            "relays.json",
            f"{other}={keys[other].public()}@900",
        )
    for name, other in (("attic", "desk"), ("desk", "attic")):
        await agents[name].says(f"{other} says b'hello {name}, ")
        await agents[name].says(f"{other}: direct [0-9.]+:[0-9]+ ")
        await agents[name].says(f"Traffic to {other} goes directly to ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "python agent.py desk.key"),
        (["none.key", "relays.json", "x=nodekey:1"], "No such file"),
        (["agent.py", "relays.json", "x=nodekey:1"], "privkey"),
    ],
)
def test_agent_wrong_input(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what is wrong."""
    monkeypatch.chdir(ROOT / "docs")
    assert complaint in (agent_module().main(arguments) or "")


def agent_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent_example", ROOT / "docs/agent.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", ["README.md", "docs/nodes.md"])
def test_agent_files(file: str) -> None:
    """Every key of the agent's file that a document names is one."""
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
    (text,) = (block for block in blocks if 'key = "node.key"' in block)
    assert parse_file(text).peers[0].name == "attic"


def test_agent_is_typed() -> None:
    """What a developer copies passes the strict type checker."""
    pytest.importorskip("mypy", reason="mypy is not installed; the extra [dev] has it")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(ROOT / "docs/agent.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
