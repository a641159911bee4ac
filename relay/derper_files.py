"""Readers for the small files that derper's operators already have (DERP specification 9, 12).

* key file: `{"PrivateKey": "privkey:<64 hex>"}`, made with mode 0600 if absent
* mesh key file: 64 hex digits
* rate configuration: `{"PerClientRateLimitBytesPerSec": n, "PerClientRateBurstBytes": n}`

All of them raise ConfigError, and no error text holds a key.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from relay.config_schema import MIN_CLIENT_BURST_BYTES
from relay.config_sources import ConfigError, read_text_file
from traversal.keys import Entropy, KeyFormatError, MeshKey, NodePrivate

# Each of these files is a line or two.
_LIMIT: Final = 4096


class _KeyFile(msgspec.Struct, rename={"private_key": "PrivateKey"}):
    private_key: str


class _RateFile(
    msgspec.Struct,
    rename={"rate": "PerClientRateLimitBytesPerSec", "burst": "PerClientRateBurstBytes"},
):
    rate: int = 0
    burst: int = 0


@dataclass(frozen=True, slots=True)
class RateConfig:
    """What each client may send: bytes per second and burst in bytes. Both None: anything."""

    bytes_per_second: int | None
    burst_bytes: int | None


def read_server_key(path: Path) -> NodePrivate:
    """The relay's own key from derper's key file. Raises ConfigError."""
    text = read_text_file(path, "key file", _LIMIT)
    try:
        return NodePrivate.parse(msgspec.json.decode(text, type=_KeyFile).private_key)
    except msgspec.DecodeError:
        wanted = '{"PrivateKey": "privkey:<64 hex digits>"}'
        raise ConfigError(f"{path}: the key file must hold {wanted}") from None
    except KeyFormatError as error:
        raise ConfigError(f"{path}: PrivateKey: {error}") from None


def load_or_create_server_key(path: Path, entropy: Entropy) -> NodePrivate:
    """The relay's own key; a new one, written with mode 0600, if there is no file.

    Raises ConfigError.
    """
    key = NodePrivate.generate(entropy)
    document = json.dumps({"PrivateKey": key.reveal()}, indent="\t") + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private_file(path, document.encode(), replace=False)
    except FileExistsError:
        return read_server_key(path)
    except OSError as error:
        raise ConfigError(f"{path}: the key file can't be made: {error.strerror}") from None
    return key


def read_mesh_key(path: Path) -> MeshKey:
    """The region's shared key. Raises ConfigError."""
    try:
        return MeshKey.parse(read_text_file(path, "mesh key file", _LIMIT))
    except KeyFormatError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_rate_config(path: Path) -> RateConfig:
    """derper's --rate-config file. A rate of 0 means no limit; a burst below one maximum frame is
    raised to it. Raises ConfigError."""
    text = read_text_file(path, "rate configuration", _LIMIT)
    try:
        file = msgspec.json.decode(text, type=_RateFile)
    except msgspec.DecodeError as error:
        wanted = '{"PerClientRateLimitBytesPerSec": 1250000, "PerClientRateBurstBytes": 2500000}'
        raise ConfigError(
            f"{path}: the rate configuration must look like {wanted}: {error}"
        ) from None
    if file.rate < 0 or file.burst < 0:
        raise ConfigError(f"{path}: a rate or burst must not be negative")
    if file.rate == 0:
        return RateConfig(None, None)
    return RateConfig(file.rate, max(file.burst, MIN_CLIENT_BURST_BYTES))


def write_private_file(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file of mode 0600 that is whole or not there at all.

    Raises OSError that names `path`; FileExistsError if it is there and may not be replaced.
    """
    # The name is unlikely to be taken: only a crashed writer of the same process id leaves one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)
    except OSError as error:
        # Nobody has heard of the temporary file.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
