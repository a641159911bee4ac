"""Wire formats and decisions do no I/O, read no clock and draw no random numbers of their own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import traversal

FORBIDDEN = {
    "asyncio", "random", "secrets", "select", "selectors", "socket", "ssl", "subprocess",
    "threading", "time", "trio", "urllib.request", "os",
}  # fmt: skip
PURE_IN_TUNNEL = (
    "addresses", "backoff", "checking", "configuration_file", "control", "ingress",
    "origin_options", "services", "transport_choice",
)  # fmt: skip
ROOT = Path(traversal.__file__).parent
MODULES = sorted(
    [
        *ROOT.glob("wire/**/*.py"),
        *ROOT.glob("paths/*.py"),
        ROOT / "relay_map.py",
        *(ROOT / "tunnel" / f"{name}.py" for name in PURE_IN_TUNNEL),
    ]
)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_forbidden_import(module) -> None:
    """A pure module imports nothing by which the world could get in or out."""
    for node in ast.walk(ast.parse(module.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name not in FORBIDDEN
            assert name.split(".")[0] not in FORBIDDEN
            assert name.split(".")[0] not in ("relay", "netlab")
