"""placeholder"""

from __future__ import annotations

from pathlib import Path

from netlab.run_directory import SavedRun


def write_report(saved: SavedRun, path: Path | None = None) -> Path:
    return path or saved.directory / "report.html"
