"""The tunnels of an edge as files in its directory, `tunnels/`:

* `<name>.json`: credentials, in the format that connectors read (edge tunnel specification 12.1)
* `<name>.config.json`: where it is there, the configuration that the tunnel's connectors get
  (specification 12.2); each change is pushed to them

Connectors ignore a configuration whose version is not higher than theirs. The version is the
file's time in seconds, so it grows with every change, on every edge, across restarts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from uuid import UUID

from relay.config_sources import ConfigError, read_text_file
from relay.derper_files import write_private_file
from relay.edge.registry import Registry, RemoteConfiguration, Tunnel
from relay.file_watch import FileWatch
from traversal.keys import Entropy
from traversal.wire.tunnel.capnp import MAX_MESSAGE_BYTES
from traversal.wire.tunnel.configuration import parse_configuration
from traversal.wire.tunnel.credentials import SECRET_BYTES, Credentials, parse_credentials_file
from traversal.wire.tunnel.errors import TunnelError

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_CONFIGURATION_SUFFIX: Final = ".config.json"
_VERSION_EPOCH_UNIX: Final = 1_700_000_000
"""So that versions, which have 31 bits, last until 2091."""
_MAX_CREDENTIALS_BYTES: Final = 8192


def tunnels_directory(directory: str) -> Path:
    """Where the files are, in the edge's directory."""
    return Path(directory, "tunnels")


def read_tunnel(path: Path) -> Tunnel:
    """The tunnel of a credentials file. Raises ConfigError."""
    name = path.name.removesuffix(".json")
    try:
        credentials = parse_credentials_file(
            read_text_file(path, "tunnel's credentials file", _MAX_CREDENTIALS_BYTES)
        )
    except TunnelError as error:
        raise ConfigError(f"{path}: {error}") from None
    configuration_path = path.with_name(name + _CONFIGURATION_SUFFIX)
    if not configuration_path.exists():
        return Tunnel(name, credentials)
    try:
        changed = int(configuration_path.stat().st_mtime) - _VERSION_EPOCH_UNIX
        text = read_text_file(configuration_path, "tunnel's configuration", MAX_MESSAGE_BYTES // 2)
        document = parse_configuration(text).encode()
    except OSError as error:
        raise ConfigError(f"{configuration_path}: {error.strerror}") from None
    except TunnelError as error:
        raise ConfigError(f"{configuration_path}: {error}") from None
    return Tunnel(name, credentials, RemoteConfiguration(max(changed, 0), document))


def new_credentials(entropy: Entropy) -> Credentials:
    """Of a tunnel that does not exist yet."""
    raw = bytearray(entropy(16))
    raw[6] = raw[6] & 0x0F | 0x40  # RFC 9562: a random UUID, version 4
    raw[8] = raw[8] & 0x3F | 0x80
    return Credentials(UUID(bytes=bytes(raw)), entropy(16).hex(), entropy(SECRET_BYTES))


def create_tunnel(directory: str, name: str, entropy: Entropy) -> Tunnel:
    """Make a tunnel with new credentials. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f'"{name}" is no name for a tunnel: use letters, digits, "-" and "_"')
    credentials = new_credentials(entropy)
    path = tunnels_directory(directory) / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private_file(path, f"{credentials.to_file()}\n".encode(), replace=False)
    except FileExistsError:
        raise ConfigError(f"{path}: there is a tunnel of this name already") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None
    return Tunnel(name, credentials)


def credentials_files(directory: str) -> list[Path]:
    """One for each tunnel. Raises ConfigError."""
    return [path for path in _files(directory) if not path.name.endswith(_CONFIGURATION_SUFFIX)]


def _files(directory: str) -> list[Path]:
    path = tunnels_directory(directory)
    try:
        return sorted(path.glob("*.json"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None


class TunnelFiles:
    """Keeps a registry in accord with the files.

    A file that is wrong leaves its tunnel as it was. Tunnels that others put into the registry are
    left alone.
    """

    def __init__(self, directory: str, registry: Registry) -> None:
        self._directory = directory
        self._registry = registry
        self._tunnels: dict[Path, Tunnel] = {}
        self._watch = self._new_watch()

    def poll(self) -> list[str] | None:
        """Look whether anything changed; then read it, and say what is wrong. Else None."""
        return self.reload() if self._watch.poll() else None

    def reload(self) -> list[str]:
        """Read everything again; what is wrong, a sentence for each file."""
        self._watch = self._new_watch()
        problems: list[str] = []
        try:
            paths = credentials_files(self._directory)
        except ConfigError as error:
            return [str(error)]
        for path in set(self._tunnels) - set(paths):
            self._remove(path)
        for path in paths:
            try:
                problems += self._use(path, read_tunnel(path))
            except ConfigError as error:
                problems.append(str(error))
        return problems

    def _use(self, path: Path, tunnel: Tunnel) -> Iterator[str]:
        old = self._tunnels.get(path)
        if old == tunnel:
            return
        if any(tunnel.id == other.id for at, other in self._tunnels.items() if at != path):
            yield f"{path}: another file has credentials for the same tunnel"
            return
        if old is not None and old.id != tunnel.id:
            self._remove(path)
            old = None
        if (
            old is not None
            and (was := old.configuration) is not None
            and (now := tunnel.configuration) is not None
            and now.document != was.document
            and now.version <= was.version
        ):
            # Changed twice in a second, or replaced by an older file.
            later = RemoteConfiguration(was.version + 1, now.document)
            tunnel = Tunnel(tunnel.name, tunnel.credentials, later)
        self._tunnels[path] = tunnel
        self._registry.add_tunnel(tunnel)

    def _remove(self, path: Path) -> None:
        self._registry.remove_tunnel(self._tunnels.pop(path).id)

    def _new_watch(self) -> FileWatch:
        directory = tunnels_directory(self._directory)
        try:
            paths = _files(self._directory)
        except ConfigError:
            paths = []
        return FileWatch(map(str, [directory, *paths]))
