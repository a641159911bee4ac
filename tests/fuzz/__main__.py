"""Coverage-guided fuzzing by hand: `python -m tests.fuzz [TARGET ...] --seconds 60`.

Needs the extra `fuzz` (atheris). Each target runs in a process of its own; the first input that
raises what it must not is written to the current directory and printed. The test suite runs the
same targets for a moment with hypothesis.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click

MAX_BYTES = 4096
INSTRUMENTED = ["traversal", "relay", "netlab", "tests.fuzz"]


@click.command()
@click.argument("names", nargs=-1)
@click.option("--seconds", default=60, show_default=True, help="For each target.")
@click.option("--in-process", is_flag=True, hidden=True)
def main(names: tuple[str, ...], seconds: int, in_process: bool) -> None:
    """Fuzz TARGETs, by default all of them."""
    if in_process:
        _fuzz(names[0], seconds)
        return
    from tests.fuzz.targets import TARGETS

    if unknown := set(names) - set(TARGETS):
        raise click.BadParameter(f"no target {unknown}; there are {', '.join(sorted(TARGETS))}")
    failed = []
    for name in names or sorted(TARGETS):
        click.echo(f"{name} ", nl=False)
        command = [sys.executable, "-m", "tests.fuzz", name, "--in-process", f"--seconds={seconds}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [
            line for line in done.stderr.splitlines() if line.startswith("#") and "cov:" in line
        ]
        click.echo(" ".join(lines[-1].split()) if lines else "nothing was run")
        if done.returncode:
            failed.append(name)
            click.echo(done.stdout[-3000:] + done.stderr[-3000:])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _fuzz(name: str, seconds: int) -> None:
    import atheris

    # Only our own code, at import: patching everything that is loaded takes minutes.
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]

    def run(data: bytes) -> None:
        try:
            target.read(data)
        except target.errors:
            pass

    with tempfile.TemporaryDirectory() as corpus:
        for number, sample in enumerate(target.samples):
            Path(corpus, str(number)).write_bytes(sample)
        options = [f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-timeout=10"]
        atheris.Setup([sys.argv[0], corpus, *options, "-rss_limit_mb=2048"], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
