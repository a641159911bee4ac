"""The command line: keys, tokens, configuration, and what it says when it is used wrongly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from relay.cli import main
from relay.derper_files import read_server_key
from relay.tokens import TokenKey, open_token
from traversal.keys import MeshKey
from traversal.relay_map import RelayMap

KEY = "nodekey:" + "ab" * 32


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    """The command's outcome; whatever it did wrong must not be a traceback."""
    result = CliRunner().invoke(main, list(map(str, arguments)), env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


class TestKeygen:
    def test_server_key_is_what_the_relay_reads(self, tmp_path: Path) -> None:
        """In derper's format, readable by the owner only; the public half is shown."""
        path = tmp_path / "relay.key"
        result = run("keygen", "--output", path)
        assert str(read_server_key(path).public()) in result.output
        assert path.stat().st_mode & 0o777 == 0o600

    def test_mesh_key(self) -> None:
        """64 hex digits and nothing else."""
        assert MeshKey.parse(run("keygen", "mesh").output)

    def test_an_existing_file_stays(self, tmp_path: Path) -> None:
        """A relay's identity is not overwritten by a slip."""
        path = tmp_path / "relay.key"
        path.write_text("precious")
        result = run("keygen", "--output", path)
        assert result.exit_code == 1
        assert f"{path}: there is a file already" in result.output
        assert path.read_text() == "precious"

    def test_a_place_that_is_not_there(self, tmp_path: Path) -> None:
        """The file is named as it was typed."""
        path = tmp_path / "missing" / "relay.key"
        result = run("keygen", "--output", path)
        assert result.exit_code == 1
        assert f"{path}: can't be written: No such file or directory" in result.output


class TestTokens:
    def test_an_issued_token_is_genuine(self, tmp_path: Path) -> None:
        """Signed by the key that was made, with the limits that were asked for."""
        secret = tmp_path / "signing.key"
        made = json.loads(run("token", "keygen", "--output", secret, "--json").output)
        result = run(
            *("token", "issue", "--signing-key", secret, "--key", KEY),
            *("--rate", "1000", "--id", "laptop", "--json"),
        )
        issued = json.loads(result.output)
        claims = open_token(issued["token"], [TokenKey.parse(made["public"])]).claims
        assert (claims.id, str(claims.key), claims.rate_bytes_per_second) == ("laptop", KEY, 1000)
        assert (issued["id"], issued["expires_unix"]) == ("laptop", claims.expires_unix)

    def test_wrong_arguments_are_explained(self, tmp_path: Path) -> None:
        """A missing file, another kind of key, half a node key, a rate of nothing."""
        secret, other = tmp_path / "signing.key", tmp_path / "relay.key"
        run("token", "keygen", "--output", secret)
        run("keygen", "--output", other)
        issue = ("token", "issue", "--key", KEY, "--signing-key")
        for arguments, text in (
            ((*issue, tmp_path / "nothing"), "the signing key can't be read"),
            ((*issue, other), f"{other}: this is no signing key"),
            ((*issue, secret, "--key", "nodekey:12"), "64 hex digits"),
            ((*issue, secret, "--rate", "0"), "above zero"),
            ((*issue, secret, "--id", "a b"), "a token's id is"),
        ):
            result = run(*arguments)
            assert result.exit_code == 1
            assert text in result.output


class TestConfiguration:
    def test_the_environment_names_the_file(self, tmp_path: Path) -> None:
        """As in a container, where nobody types options."""
        path = tmp_path / "relay.toml"
        path.write_text("[server]\nhostnam = 'derp.example'\n")
        result = run("check-config", "--json", env={"UNDERPASS_RELAY_CONFIG": str(path)})
        assert result.exit_code == 1
        (problem,) = json.loads(result.output)["problems"]
        assert problem.startswith(f"{path}:2: there is no key server.hostnam")

    def test_mistakes_on_the_command_line(self) -> None:
        """The key is named, and where its value came from."""
        result = run("check-config", "--hostname", "derp.example", "--workers", "0")
        assert (result.exit_code, result.output.partition(": Exp")[0]) == (
            1,
            "command line: server.workers",
        )
        assert run("check-config", "--set", "limits.connections").exit_code == 2

    @pytest.mark.parametrize("form", ["json", "headscale"])
    def test_map_entry_of_a_relay_behind_a_proxy(self, form: str) -> None:
        """No certificate of its own, so no pin."""
        result = run(
            *("print-map", "--hostname", "derp.example", "--format", form),
            *("--set", "tls.mode=off", "--region-id", "901"),
        )
        assert result.exit_code == 0
        assert "derp.example" in result.output
        assert "sha256-raw" not in result.output

    def test_map_entry_has_the_ports_that_clients_see(self) -> None:
        """A proxy or a container's port mapping changes them."""
        ports = ("--derp-port", "8443", "--stun-port", "3479")
        mode = ("--set", "tls.mode=off", "--derp", ":8000")
        result = run("print-map", "--hostname", "derp.example", *mode, *ports)
        (node,) = RelayMap.parse(result.output).nodes()
        assert (node.derp_port, node.stun_port) == (8443, 3479)

    def test_a_map_that_can_not_be_written_ends_the_relay(self, tmp_path: Path) -> None:
        """With the file's name, and no traceback."""
        path = tmp_path / "missing" / "map.json"
        result = run("serve", "--dev", "--dev-map", path)
        assert result.exit_code == 1
        assert f"{path}: can't be written" in result.output


@pytest.mark.parametrize(("given", "meant"), [("prob", "probe"), ("serv", "serve")])
def test_a_misspelt_command_is_recognised(given: str, meant: str) -> None:
    """Though some commands are loaded late."""
    assert f"Did you mean {meant!r}?" in run(given).output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_ends_when_told(number: signal.Signals) -> None:
    """In the middle, at once and without a traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "relay.cli", "demo", "--seconds", "600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "FORCE_COLOR": "1"},  # so that rich shows figures before the end
    )
    with process:
        assert process.stdout is not None
        while b"packets relayed" not in process.stdout.readline():
            pass
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.split() == [b"Aborted!"]
