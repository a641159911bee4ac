"""Where configuration values come from, and which line or variable to blame when one is wrong.

A source is a mapping from dotted key ("limits.connections") to value, with an origin for every
key: `relay.toml:12`, `environment variable UNDERPASS_RELAY_LIMITS_CONNECTIONS`, `command line`.
Later sources win key by key. This module knows nothing about which keys exist or what they mean.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ENVIRONMENT_PREFIX: Final = "UNDERPASS_RELAY_"

# Half of a configuration this large would already be a mistake (a key list given in its place).
MAX_FILE_BYTES: Final = 1 << 20

# Kubernetes gives every container variables named after the services around it, so a service
# called underpass-relay makes these; UNDERPASS_RELAY_CONFIG names the file and is the command's.
_NOT_OURS = re.compile(r"SERVICE_(HOST|PORT.*)|PORT(_.*)?|CONFIG")

_TABLE = re.compile(r"^\s*\[\s*([A-Za-z0-9_\-.\s]+?)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_\-]+(?:\s*\.\s*[A-Za-z0-9_\-]+)*)\s*=")


class ConfigError(ValueError):
    """The configuration can't be used. `problems` has one sentence per mistake."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Setting:
    """One value as it was given.

    `text` says that it was written as text whatever its type (environment variables are), and
    `base` is the directory that a relative path in it starts from.
    """

    value: object
    origin: str
    text: bool = False
    base: Path = Path()


def read_text_file(path: Path, what: str, limit: int = MAX_FILE_BYTES) -> str:
    """The text of a UTF-8 file of at most `limit` bytes. Raises ConfigError, naming `what`."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{path}: the {what} can't be read: {error.strerror}") from None
    if len(data) > limit:
        raise ConfigError(f"{path}: the {what} is larger than {limit} bytes; is this the file?")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the {what} is not UTF-8 text") from None


def from_toml_file(path: Path) -> dict[str, Setting]:
    """The settings of a TOML file. Raises ConfigError."""
    text = read_text_file(path, "configuration file")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: this is not valid TOML: {error}") from None
    lines = _key_lines(text)
    base = path.absolute().parent
    return {
        key: Setting(value, f"{path}:{lines[key]}" if key in lines else str(path), base=base)
        for key, value in _flatten(document)
    }


def from_environment(env: Mapping[str, str], keys: Collection[str]) -> dict[str, Setting]:
    """The settings among environment variables: `UNDERPASS_RELAY_` + the key in capitals, its
    dots as underscores.

    A variable with the prefix that is none of `keys` is kept under a guessed key, so that a
    misspelt one is reported and not ignored.
    """
    names = {ENVIRONMENT_PREFIX + key.upper().replace(".", "_"): key for key in keys}
    settings = {}
    for name, value in env.items():
        rest = name.removeprefix(ENVIRONMENT_PREFIX)
        if rest != name and not _NOT_OURS.fullmatch(rest):
            guess = rest.lower().replace("_", ".", 1)
            origin = f"environment variable {name}"
            settings[names.get(name, guess)] = Setting(value, origin, text=True)
    return settings


def from_overrides(overrides: Mapping[str, object]) -> dict[str, Setting]:
    """The settings given on the command line; None is an option that was not given."""
    return {
        key: Setting(value, "command line", text=True)
        for key, value in overrides.items()
        if value is not None
    }


def _flatten(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _key_lines(text: str) -> dict[str, int]:
    """The line of each dotted key.

    A reader of lines, not of TOML: good enough for error texts (it is fooled by lines inside
    multi-line strings that look like keys), and tomllib keeps no positions.
    """
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            table = re.sub(r"\s", "", match[1]) + "."
        elif match := _KEY.match(line):
            lines.setdefault(table + re.sub(r"\s", "", match[1]), number)
    return lines
