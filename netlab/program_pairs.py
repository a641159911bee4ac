"""Well-known pairs of programs for a matrix, from the data file `presets/programs.toml`.

All of them meet at Underpass's relay, which also offers the STUN tests of RFC 5780.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from importlib import resources

import msgspec

from netlab.behavior import ModelError, suggest
from netlab.labs import program_path
from netlab.matrix import ProgramPair

# The lab's own STUN service has 3478 and 3479 on every address of the server.
_SERVER = """
sh -c 'underpass-relay serve --dev --hostname ${server.address} --derp ${server.address}:443
    --stun ${server.address}:3477 --set listen.stun_alternate=${server.address2}:3476
    --http off --admin off --dev-map ${directory}/map &
    until test -s ${directory}/map; do sleep 0.1; done
    exec python3 -u -m http.server -d ${directory} 80'
""".replace("\n    --", " --")
_SERVER_READY = "Serving HTTP"


class _Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    needs: list[str]
    source: str
    version: list[str]
    left: str
    ready: str
    right: str
    direct: str
    relay: str


def program_pair(name: str, timeout_seconds: float) -> ProgramPair:
    """Return the pair of this name.

    Raises:
        ModelError: there is none, or one of its programs is not installed; says how to get it.
    """
    preset = _preset(name)
    for program in preset.needs:
        if shutil.which(program, path=program_path()) is None:
            raise ModelError(f'--programs "{name}"', f"{program} is not installed: {preset.source}")
    return ProgramPair(
        left=preset.left,
        right=preset.right,
        ready=re.compile(preset.ready),
        direct=re.compile(preset.direct),
        relay=re.compile(preset.relay),
        timeout_seconds=timeout_seconds,
        server=_SERVER,
        server_ready=re.compile(_SERVER_READY),
        title=name,
    )


def program_version(name: str) -> str:
    """Return what a pair's program says of its version, on one line."""
    environment = {**os.environ, "PATH": program_path()}
    done = subprocess.run(
        _preset(name).version, env=environment, capture_output=True, text=True, check=False
    )
    return " ".join((done.stdout or done.stderr).split())


def _preset(name: str) -> _Preset:
    text = (resources.files("netlab.presets") / "programs.toml").read_text(encoding="utf-8")
    presets = msgspec.convert(tomllib.loads(text), dict[str, _Preset])
    if name not in presets:
        raise ModelError(f'--programs "{name}"', f"unknown; {suggest(name, presets)}")
    return presets[name]
