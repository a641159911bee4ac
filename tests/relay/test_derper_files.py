"""derper's small files are read, and made, as derper does it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relay.config_sources import ConfigError
from relay.derper_files import (
    RateConfig,
    load_or_create_server_key,
    read_mesh_key,
    read_rate_config,
    read_server_key,
)

SECRET = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e5f"
PUBLIC = "8f40c5adb68f25624ae5b214ea767a6ec94d829d3d7b5e1ad1ba6f3e2138285f"


def test_a_key_file_of_derper_is_read(tmp_path: Path) -> None:
    """Vector 18.1 in derper's own layout."""
    path = tmp_path / "derper.key"
    path.write_text('{\n\t"PrivateKey": "privkey:' + SECRET + '"\n}')
    assert read_server_key(path).public().raw.hex() == PUBLIC


def test_an_absent_key_file_is_made_private_and_kept(tmp_path: Path) -> None:
    """Mode 0600, derper's layout, and the same key at the next start."""
    path = tmp_path / "new" / "relay.key"
    key = load_or_create_server_key(path, os.urandom)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_server_key(path, os.urandom) == key
    assert path.read_text().startswith('{\n\t"PrivateKey": "privkey:')
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"PrivateKey": 1}', '{"PrivateKey": "x"}'])
def test_a_bad_key_file_is_never_replaced(tmp_path: Path, text: str) -> None:
    """It might be somebody's only copy."""
    path = tmp_path / "relay.key"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"relay\.key"):
        load_or_create_server_key(path, os.urandom)
    assert path.read_text() == text


def test_error_texts_hold_no_key(tmp_path: Path) -> None:
    """A truncated secret is still a secret."""
    path = tmp_path / "relay.key"
    path.write_text('{"PrivateKey": "privkey:' + SECRET[:-1] + '"}')
    with pytest.raises(ConfigError) as caught:
        read_server_key(path)
    assert SECRET[:16] not in str(caught.value)


def test_mesh_key_is_64_hex_digits_with_white_space_around(tmp_path: Path) -> None:
    """DERP specification 2.1."""
    path = tmp_path / "mesh"
    path.write_text(f"\n  {SECRET}\n")
    assert read_mesh_key(path).raw.hex() == SECRET
    path.write_text(SECRET + "00")
    with pytest.raises(ConfigError, match="64 hex digits"):
        read_mesh_key(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", RateConfig(None, None)),
        ('{"PerClientRateLimitBytesPerSec": 5, "Other": 1}', RateConfig(5, 65568)),
        ('{"PerClientRateBurstBytes": 5}', RateConfig(None, None)),
        (
            '{"PerClientRateLimitBytesPerSec": 1250000, "PerClientRateBurstBytes": 2500000}',
            RateConfig(1250000, 2500000),
        ),
    ],
)
def test_rate_configuration(tmp_path: Path, text: str, expected: RateConfig) -> None:
    """Both numbers are optional; without a rate the burst means nothing."""
    path = tmp_path / "rate.json"
    path.write_text(text)
    assert read_rate_config(path) == expected


@pytest.mark.parametrize("text", ["", "5", '{"PerClientRateLimitBytesPerSec": -1}'])
def test_bad_rate_configuration_is_refused(tmp_path: Path, text: str) -> None:
    """It is fatal at start and leaves the old limits on reload; both need the error."""
    path = tmp_path / "rate.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_rate_config(path)
