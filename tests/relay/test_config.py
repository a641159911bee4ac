"""Configuration: sources and their order, errors that name the line, reload."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config import Config, ConfigError, ListenAddress, MeshPeer, diff_reload

MINIMAL = '[server]\nhostname = "derp.example"\n'


def write(directory: Path, text: str) -> Path:
    path = directory / "relay.toml"
    path.write_text(text)
    return path


def load(directory: Path, text: str) -> Config:
    return Config.load(write(directory, text), {}, {})


def problems(directory: Path, text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(directory, text)
    return caught.value.problems


class TestSources:
    def test_a_file_sets_every_kind_of_value(self, tmp_path: Path) -> None:
        """Lists, addresses, networks, numbers and nested tables arrive as their own types."""
        config = load(
            tmp_path,
            MINIMAL
            + """
            [listen]
            derp = [":443", "[2001:db8::1]:8443"]
            http = "off"
            [proxy]
            protocol = "proxy-protocol"
            trusted = ["192.0.2.0/24", "2001:db8::/32"]
            [limits]
            connections_per_ip = 7
            accept_rate_per_second = 2.5
            [tls.acme]
            email = "night@derp.example"
            """,
        )
        assert config.listen.derp == (ListenAddress("", 443), ListenAddress("2001:db8::1", 8443))
        assert config.listen.http is None
        assert config.proxy.trusted[1] == ipaddress.ip_network("2001:db8::/32")
        assert (config.limits.connections_per_ip, config.limits.accept_rate_per_second) == (7, 2.5)
        assert config.tls.acme.email == "night@derp.example"

    def test_environment_beats_file_and_options_beat_both(self, tmp_path: Path) -> None:
        """The nearer to the keyboard, the stronger."""
        path = write(tmp_path, MINIMAL + "[limits]\nconnections = 1\nhandshakes = 1\n")
        env = {
            "UNDERPASS_RELAY_LIMITS_CONNECTIONS": "2",
            "UNDERPASS_RELAY_LIMITS_HANDSHAKES": "2",
            "UNDERPASS_RELAY_LISTEN_DERP": ":1, :2",
            "UNDERPASS_RELAY_ADMISSION_HOOK_FAIL_OPEN": "true",
            "PATH": "/bin",
        }
        config = Config.load(path, env, {"limits.connections": 3, "limits.queue_packets": None})
        assert (config.limits.connections, config.limits.handshakes) == (3, 2)
        assert [address.port for address in config.listen.derp] == [1, 2]
        assert config.admission.hook.fail_open is True

    def test_paths_in_the_file_start_at_the_file(self, tmp_path: Path) -> None:
        """A configuration directory can be moved as a whole."""
        config = load(tmp_path, '[server]\nhostname = "x"\nkey_file = "k"\nmesh_key_file = "/m"\n')
        assert config.server.key_file == str(tmp_path / "k")
        assert config.server.mesh_key_file == "/m"

    def test_dev_needs_nothing_and_stays_on_loopback(self) -> None:
        """Every listener of the development relay is on loopback with a free port."""
        config = Config.dev({"server.workers": 2})
        listen = config.listen
        assert {*listen.derp, *listen.stun, listen.http, listen.admin} == {
            ListenAddress("127.0.0.1", 0)
        }
        assert config.server.workers == 2
        assert config.admission.mode == "open"

    def test_variables_that_kubernetes_makes_are_not_ours(self) -> None:
        """A service that has our name does not break the start."""
        env = {
            "UNDERPASS_RELAY_SERVICE_HOST": "10.0.0.1",
            "UNDERPASS_RELAY_PORT_443_TCP": "tcp://10.0.0.1:443",
            "UNDERPASS_RELAY_SERVER_HOSTNAME": "derp.example",
        }
        assert Config.load(None, env, {}).server.hostname == "derp.example"

    def test_derpers_rate_file_replaces_the_rate(self, tmp_path: Path) -> None:
        """Whatever the TOML says, derper's file decides, and the burst has its lower bound."""
        (tmp_path / "rate.json").write_text(
            '{"PerClientRateLimitBytesPerSec": 1000, "PerClientRateBurstBytes": 2000}'
        )
        config = load(tmp_path, MINIMAL + '[limits]\nrate_config_file = "rate.json"\n')
        assert config.limits.client_rate() == (1000, 65568)

    def test_lists_are_written_in_any_way(self, tmp_path: Path) -> None:
        """As a list, as its only member, as text with commas, or switched off."""
        text = MINIMAL + '[listen]\nderp = ":1"\nstun = ["192.0.2.1:2", "[::1]:2"]\n'
        path = write(tmp_path, text)
        listen = Config.load(path, {}, {}).listen
        assert [str(address) for address in listen.derp] == [":1"]
        assert [str(address) for address in listen.stun] == ["192.0.2.1:2", "[::1]:2"]
        listen = Config.load(path, {"UNDERPASS_RELAY_LISTEN_STUN": ":3, :4"}, {}).listen
        assert [address.port for address in listen.stun] == [3, 4]
        assert Config.load(path, {}, {"listen.stun": "off"}).listen.stun == ()


class TestErrors:
    def test_hostname_that_is_none(self) -> None:
        """A URL or a name with a space is told before a certificate is asked for."""
        for wrong in ("https://derp.example", "derp example", "derp.example:443"):
            with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
                Config.load(None, {}, {"server.hostname": wrong})
        for right in ("derp.example", "localhost", "192.0.2.1", "2001:db8::1"):
            assert Config.load(None, {}, {"server.hostname": right}).server.hostname == right

    def test_unknown_key_names_the_line_and_the_nearest_key(self, tmp_path: Path) -> None:
        """A typing mistake costs one look."""
        (problem,) = problems(tmp_path, MINIMAL + "[limits]\n# bound\nconections = 3\n")
        assert problem == (
            f"{tmp_path}/relay.toml:5: there is no key limits.conections; "
            "did you mean limits.connections?"
        )

    def test_key_in_the_wrong_section_is_led_home(self, tmp_path: Path) -> None:
        """The same name elsewhere is the best guess."""
        (problem,) = problems(tmp_path, 'hostname = "derp.example"\n')
        assert problem.endswith(":1: there is no key hostname; did you mean server.hostname?")

    def test_wrong_type_and_wrong_choice_are_told_together(self, tmp_path: Path) -> None:
        """All mistakes are reported in one go."""
        text = MINIMAL + '[limits]\nconnections = "many"\n[tls]\nmode = "file"\n'
        first, second = problems(tmp_path, text)
        assert first.startswith(f"{tmp_path}/relay.toml:4: limits.connections: Expected `int`")
        assert second.endswith(
            'tls.mode: expected one of "files", "acme", "self-signed", "off", got \'file\''
        )

    def test_environment_mistakes_name_the_variable(self) -> None:
        """Also a variable that is no key at all."""
        env = {"UNDERPASS_RELAY_LIMITS_CONNECTION": "1", "UNDERPASS_RELAY_SERVER_WORKERS": "0"}
        with pytest.raises(ConfigError) as caught:
            Config.load(None, env, {})
        first, second = caught.value.problems
        assert "UNDERPASS_RELAY_LIMITS_CONNECTION: there is no key limits.connection;" in first
        assert second.startswith("environment variable UNDERPASS_RELAY_SERVER_WORKERS: server.work")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "server.hostname: is missing"),
            (MINIMAL + "[server\n", "not valid TOML"),
            ('[server]\nhostname="x"\nhome_page="nope"\n', ":3: server.home_page: must be"),
            (MINIMAL + '[admission]\nmode="closed"\n', "nobody could be admitted"),
            (MINIMAL + '[admission]\nkeys_file="k"\n', 'is "open" but a way'),
            (MINIMAL + '[[mesh]]\npeers=["a"]\n', "mesh is a section, not a value; write [mesh]"),
            (MINIMAL + '[mesh]\npeers=["a"]\n', "needs server.mesh_key_file"),
            (MINIMAL + '[proxy]\nprotocol="x-forwarded-for"\n', "proxy.trusted: is empty"),
            (MINIMAL + '[tls]\ncert_file="c"\n', "go together"),
            (MINIMAL + '[listen]\nderp=["443"]\n', "has no port"),
            (
                MINIMAL + '[listen]\nderp=["localhost:443"]\n',
                '"localhost:443" must have an IP address',
            ),
            (MINIMAL + '[listen]\nderp=[":70000"]\n', "is not a port number"),
            (MINIMAL + '[listen]\nstun_alternate="192.0.2.2:3479"\n', "needs an IP address here"),
            (MINIMAL + '[proxy]\ntrusted=["192.0.2.1/24"]\n', "has host bits set"),
            (MINIMAL + '[tls]\nmode="acme"\n[listen]\nhttp="off"\n', 'use "tls-alpn-01"'),
        ],
    )
    def test_contradictions_are_refused(self, tmp_path: Path, text: str, expected: str) -> None:
        """Nothing starts that could not work."""
        assert any(expected in problem for problem in problems(tmp_path, text))

    def test_missing_and_binary_files_are_told_plainly(self, tmp_path: Path) -> None:
        """No traceback for a wrong path."""
        with pytest.raises(ConfigError, match="can't be read: No such file"):
            Config.load(tmp_path / "absent.toml", {}, {})
        (tmp_path / "relay.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="not UTF-8"):
            Config.load(tmp_path / "relay.toml", {}, {})

    @given(text=st.text(alphabet='[]="\n.#ab1server{},', max_size=80))
    def test_any_file_loads_or_is_a_config_error(
        self, tmp_path_factory: pytest.TempPathFactory, text: str
    ) -> None:
        """One error type, whatever the text."""
        path = write(tmp_path_factory.getbasetemp(), text)
        try:
            Config.load(path, {}, {"server.hostname": "x"})
        except ConfigError:
            pass


class TestMeshPeer:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("d1.example", MeshPeer("d1.example", 443, "d1.example")),
            ("d1.example:8443", MeshPeer("d1.example", 8443, "d1.example")),
            ("d1.example:8443/10.0.0.1", MeshPeer("d1.example", 8443, "10.0.0.1")),
            ("d1.example/fd00::1", MeshPeer("d1.example", 443, "fd00::1")),
        ],
    )
    def test_forms(self, text: str, expected: MeshPeer) -> None:
        """derper's three forms of --mesh-with."""
        assert MeshPeer.parse(text) == expected

    @pytest.mark.parametrize("text", ["", ":443", "a b", "user@host", "h:99999"])
    def test_others_are_refused(self, text: str) -> None:
        """A name is needed, and a port must be one."""
        with pytest.raises(ValueError, match=r"."):
            MeshPeer.parse(text)


class TestReload:
    def test_what_can_change_does_and_the_rest_is_named(self) -> None:
        """The result holds the values that count from now on."""
        old = Config.dev()
        new = Config.dev({"limits.connections": 5, "server.workers": 3, "log.level": "debug"})
        reload = diff_reload(old, new)
        assert reload.applied == ("limits.connections", "log.level")
        assert reload.needs_restart == ("server.workers",)
        assert reload.config.limits.connections == 5
        assert reload.config.server.workers == 1

    def test_no_change_is_no_news(self) -> None:
        """An unchanged file applies nothing."""
        assert diff_reload(Config.dev(), Config.dev()) == (Config.dev(), (), ())
