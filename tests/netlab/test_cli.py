"""The command as its users meet it: output, files, errors and exit statuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from netlab.choice import kernel_shortcomings
from netlab.cli import main
from netlab.labs import BackEnd
from netlab.matrix import Cell, MatrixResult
from netlab.matrix_report import matrix_markdown
from netlab.presets import link_presets, nat_presets
from netlab.run_directory import load_run
from netlab.terminal import console, matrix_table
from netlab.timeline import ProgramOutput, read_jsonl, write_jsonl

SIMULATED = ["--backend", "simulated"]


def call(*arguments: str) -> Result:
    """Run the command in this process."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_presets_are_listed() -> None:
    """Every NAT and link that a scenario can name, with its class, for people and programs."""
    told = call("presets").output
    for name in (*nat_presets(), *link_presets()):
        assert any(line.split()[:1] == [name] for line in told.splitlines()), name
    listed = json.loads(call("presets", "--json").output)
    assert listed["nats"]["office/pf"]["claims"] == "APDM+APDF"


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a simulated run of an example leaves behind."""
    place = tmp_path_factory.mktemp("run")
    assert call("run", "punch", *SIMULATED, "-o", str(place)).exit_code == 0
    return place


class Page(HTMLParser):
    """Checks that a page is well nested and needs nothing from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not {"src", "href"} & {name for name, _ in attrs}
        self.seen.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_run_leaves_everything_behind(run_directory: Path) -> None:
    """Timeline, summary, plan, capture and a page that works offline."""
    names = {path.name for path in run_directory.iterdir()}
    assert names == {
        "capture.pcapng",
        "plan.txt",
        "report.html",
        "scenario.toml",
        "summary.json",
        "timeline.jsonl",
    }
    page = Page()
    text = (run_directory / "report.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.open == []
    assert {"svg", "rect", "path", "circle", "table"} <= page.seen
    assert "url(" not in text
    summary = json.loads((run_directory / "summary.json").read_text())
    assert summary["succeeded"]
    assert len(summary["checks"]) == 2


def test_a_page_shows_output_as_text(run_directory: Path, tmp_path: Path) -> None:
    """What a program prints can't become part of the page's structure."""
    for path in run_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "timeline.jsonl").open("rb") as file:
        events = list(read_jsonl(file))
    evil = "</svg><script>alert(1)</script>"
    events.append(ProgramOutput(at=9.0, host="alice", program=evil, line=evil))
    with (tmp_path / "timeline.jsonl").open("wb") as file:
        write_jsonl(events, file)
    assert call("report", str(tmp_path)).exit_code == 0
    page = Page()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []


def test_explain_and_capture_read_a_run(run_directory: Path, tmp_path: Path) -> None:
    """Two hosts are explained; the capture has packets."""
    told = call("explain", "alice", "bob", str(run_directory))
    assert "alice sent" in told.output
    assert "dropped at office" in told.output
    assert json.loads(call("explain", "alice", "bob", str(run_directory), "--json").output)
    target = tmp_path / "c.pcapng"
    assert call("capture", str(run_directory), "-o", str(target)).exit_code == 0
    assert target.read_bytes()[:4] == b"\x0a\x0d\x0d\x0a"


def test_what_was_written_is_told_to_programs(run_directory: Path, tmp_path: Path) -> None:
    """File names and figures, as JSON and nothing else."""
    page, packets = str(tmp_path / "r.html"), str(tmp_path / "c.pcapng")
    told = call("report", str(run_directory), "-o", page, "--json")
    assert json.loads(told.stdout) == {"file": page}
    told = json.loads(call("capture", str(run_directory), "-o", packets, "--json").stdout)
    assert (told["file"], told["packets"] > 0) == (packets, True)
    told = call("demo", *SIMULATED, "-o", str(tmp_path / "demo"), "--json")
    assert (told.exit_code, json.loads(told.stdout)["succeeded"]) == (0, True)
    assert (tmp_path / "demo" / "report.html").exists()


def test_a_failed_expectation_is_status_1(tmp_path: Path) -> None:
    """And its reason is printed."""
    scenario = tmp_path / "s.toml"
    scenario.write_text('[host.a]\n[[expect]]\nwithin = "1s"\nthat = "drops() > 5"\n')
    result = call("run", str(scenario), *SIMULATED, "-o", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "was not true within 1 s" in result.output


def test_a_matrix_scenario_runs_every_pair(tmp_path: Path) -> None:
    """One line and one directory for each, as JSON too."""
    result = call("run", "pairs", *SIMULATED, "-o", str(tmp_path), "--json")
    rows = json.loads(result.output)
    assert len(rows) == 12
    assert all(row["summary"]["succeeded"] for row in rows)
    place = tmp_path / "home_linux--office_pf"
    assert (place / "report.html").exists()
    # What is read back is the pair's network, not the file's placeholders.
    assert load_run(place).scenario.topology.nat_by_name["right"].behavior.class_name == "APDM+APDF"


def test_plan_as_drawing_commands_and_json() -> None:
    """Nothing is built; the three forms agree on what would be."""
    drawn = call("plan", "commands").output
    assert "└── home  NAT EIM+APDF" in drawn
    text = call("plan", "commands", "--commands").output
    assert "ip link add" in text
    assert "table ip nat" in text
    data = json.loads(call("plan", "commands", "--json").output)
    assert data["nats"]["home"]["behind"] == "cgn"
    assert data["nats"]["home"]["external"][0] in drawn


def test_verify_and_matrix_tables(tmp_path: Path) -> None:
    """Both print what they measured and how many were right."""
    told = call("verify", "--nat", "home/linux", "--nat", "APDM+EIF", *SIMULATED)
    assert told.exit_code == 0
    assert "2 of 2 as claimed on the simulated back end" in told.output
    told = call("matrix", "--nat", "EIM+EIF", *SIMULATED, "-o", str(tmp_path))
    assert told.exit_code == 0
    assert "1 of 1 direct" in told.output
    assert json.loads((tmp_path / "matrix.json").read_text())["cells"][0]["path"] == "direct"
    assert (tmp_path / "matrix.html").exists()


def test_several_results_in_one_table() -> None:
    """Side by side in each field, for a terminal and for a document."""

    def result(pair: str, path: str, seconds: float | None) -> MatrixResult:
        cell = Cell(
            left="home/linux", right="office/pf", path=path, seconds=seconds,
            expected="relay", letter="B", agrees=path == "relay",
        )  # fmt: skip
        return MatrixResult(
            back_end=BackEnd.KERNEL, pair=pair, seed=0, seconds=1.0,
            left=["home/linux"], right=["office/pf"], cells=[cell],
        )  # fmt: skip

    results = [result("ours", "direct", 0.62), result("theirs", "relay", None)]
    assert matrix_markdown(results).splitlines() == [
        "|  | office/pf |",
        "| --- | --- |",
        "| home/linux | 0.6 s / relay |",
    ]
    with console.capture() as captured:
        console.print(matrix_table(results))
    assert "620 ms / relay" in captured.get()


@pytest.mark.usefixtures("kernel")
def test_matrix_of_our_own_program(tmp_path: Path) -> None:
    """The well-known pair of names finds its programs, its relay and its path."""
    names = ("--nat", "home/linux", "--programs", "underpass", "-o", str(tmp_path))
    done = kernel_call("matrix", *names, "--timeout", "30", "--markdown")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\| home/linux \| [0-9.]+ s \|", done.stdout), done.stdout
    assert "1 of 1 direct" in done.stdout
    assert (tmp_path / "underpass.html").exists()


def test_doctor_tells_as_json() -> None:
    """The status says whether the kernel back end works."""
    result = call("doctor", "--json")
    data = json.loads(result.output)
    assert result.exit_code == (0 if data["kernel_back_end"] else 1)
    assert data["capabilities"][0]["name"] == "jail"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "punsh"), 'did you mean "punch"'),
        (("plan", "/nonexistent.toml"), "there is no file"),
        (("run", "commands", *SIMULATED), "command lines run on the kernel back end only"),
        (("run", "punch", "--backend", "cloud"), "is not one of"),
        (("verify", "--nat", "home/linus"), 'did you mean "home/linux"'),
        (("verify", "punch", "--nat", "home/linux"), "give either"),
        (("matrix", "--left", "x"), "--left and --right go together"),
        (("matrix", "--left", "'", "--right", "x"), "--left: No closing quotation"),
        (("matrix", "--programs", "tailcta"), 'did you mean "tailcat"'),
        (("matrix", "--programs", "underpass", "--left", "x", "--right", "y"), "give either"),
        (("matrix", "--programs", "underpass", *SIMULATED), "run on the kernel back end only"),
        (
            ("matrix", "--left", "a:b", "--right", "a:b", "--direct", "("),
            "--direct is not a regular expression",
        ),
        (("matrix", "--nat", "nothing", *SIMULATED), "is no preset and no class"),
        (("explain", "a", "b", "/nonexistent"), "No such file"),
        (("shell", "punch", "alicia"), 'did you mean "alice"'),
        (("report", "/"), "No such file"),
    ],
)
def test_wrong_use_is_status_2(arguments: tuple[str, ...], words: str) -> None:
    """One line says what is wrong and what to do."""
    result = call(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_an_unknown_host_of_a_run(run_directory: Path) -> None:
    """The nearest host is suggested."""
    result = call("explain", "alice", "bop", str(run_directory))
    assert result.exit_code == 2
    assert 'did you mean "bob"' in result.output


def test_every_command_has_help() -> None:
    """The first line of each says what it does."""
    listing = call("--help").output
    for name, command in main.commands.items():
        assert name in listing
        assert command.help
        assert call(name, "--help").exit_code == 0


# --- the kernel back end ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel() -> None:
    """Skip where the kernel back end is not possible."""
    missing = kernel_shortcomings()
    if missing:
        pytest.skip(f"no kernel back end: {missing[0].name}: {missing[0].why}")


def kernel_call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process, which moves itself into a jail."""
    return subprocess.run(
        [sys.executable, "-m", "netlab.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.usefixtures("kernel")
def test_any_program_runs_in_the_kernel(tmp_path: Path) -> None:
    """A scenario of command lines, from the file to the report."""
    done = kernel_call("run", "commands", "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "heard hello" in done.stdout
    assert (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("kernel")
def test_the_same_scenario_in_the_kernel(tmp_path: Path) -> None:
    """Nodes as real processes find the path that they find in simulation."""
    done = kernel_call("run", "punch", "--backend", "kernel", "-o", str(tmp_path), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["back_end"] == "kernel"


@pytest.mark.usefixtures("kernel")
def test_shell_runs_a_command_in_a_machine() -> None:
    """Its status and its addresses are the machine's; a missing command has status 127."""
    done = kernel_call("shell", "commands", "pc", "ip", "-brief", "address")
    assert done.returncode == 0
    assert "192.168." in done.stdout
    done = kernel_call("shell", "commands", "pc", "--", "getent", "hosts", "echo")
    assert done.stdout.split()[-1] == "echo"
    assert kernel_call("shell", "commands", "cgn", "no-such-command").returncode == 127


@pytest.mark.usefixtures("kernel")
def test_verify_and_matrix_agree_with_the_simulation(tmp_path: Path) -> None:
    """Two classes: the same claims, the same paths."""
    names = ["--nat", "EIM+APDF", "--nat", "APDM+ADF"]
    done = kernel_call("verify", *names, "--backend", "kernel", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    done = kernel_call("matrix", *names, "--backend", "kernel", "--json", "-o", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    simulated = call("matrix", *names, *SIMULATED, "--json", "-o", str(tmp_path))
    both = [
        [(cell["left"], cell["right"], cell["path"]) for cell in json.loads(output)["cells"]]
        for output in (done.stdout, simulated.stdout)
    ]
    assert both[0] == both[1]


def test_a_misspelt_command_is_recognised() -> None:
    """Though commands are loaded late."""
    assert "Did you mean 'verify'?" in call("verfy").output
