"""A report comes out whatever happens: errors, kills, time-outs, full disks, broken templates."""

import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import external_requests
from jupyter_client.connect import LocalPortCache

from fresnel.cli import main
from fresnel.report import engine as execution
from fresnel.report import html as _html
from fresnel.report import page as pages
from fresnel.report import run as report
from fresnel.report.record import RunRecord
from fresnel.study import runner

ROOT = Path(__file__).resolve().parent.parent
Maker = Callable[..., Path]
PARAMETERS = 'output_dir = ""'
START = """\
from fresnel.report import record
run = record.start("n", {}, output_dir)
print("so" + " far")"""
PRODUCTS = {"executed.ipynb", "report.html", "results.json"}
FINISH = 'run.finish("DONE", "All <well>.")'


def make(make_notebook: Maker, *cells: str) -> Path:
    return make_notebook("n", "# Title", START, *cells, parameters=PARAMETERS)


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("template 'index.html.j2' not found")


def test_a_broken_template_costs_no_run(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = make(make_notebook, FINISH)
    steps = [runner.Step("a", notebook)]
    with monkeypatch.context() as patch:
        patch.setattr(pages, "to_html", broken)
        (problem,) = runner.run(steps, tmp_path, keep_finished=False)
        assert problem.startswith("a: its page could not be made (RuntimeError: template ")
        assert "'index.html.j2' not found). A plain page stands in." in problem
        assert main(["run", str(notebook), "--name", "a", "--reports", str(tmp_path)]) == 5
        (folder,) = (tmp_path / "runs").iterdir()
        html = (folder / "report.html").read_text()
        assert html.count("<h1>") == 1 and "All &lt;well&gt;." in html and "so far" in html
        assert "run_all.sh pages" in html and external_requests(html) == []
        patch.setattr(report, "write_atomic", broken_disk)
        assert "Nor could a plain one be written" in str(report._page(folder, RunRecord("n", "")))
    assert main(["pages", "--reports", str(tmp_path)]) == 0
    assert "run_all.sh pages" not in (folder / "report.html").read_text()
    monkeypatch.setattr(report, "index", broken)
    (problem,) = runner.run(steps, tmp_path, keep_finished=False)
    assert problem.startswith("the index could not be made: RuntimeError")


def broken_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_plain_page_has_the_cells_and_says_what_pictures_show() -> None:
    alt = {"image/png": {"alt": "A <chair>"}}
    picture = nbformat.v4.new_output("display_data", {"image/png": "AAAA"}, metadata=alt)
    error = nbformat.v4.new_output("error", ename="E", evalue="<e>", traceback=["line <1>"])
    cells = [
        nbformat.v4.new_markdown_cell("# T"),
        nbformat.v4.new_code_cell("x < 1", outputs=[picture]),
        nbformat.v4.new_code_cell("", outputs=[error]),
    ]
    record = RunRecord("n", "crashed", error="It broke.", params={"a": "<b>"}, reasons=("<why>",))
    html = _html.plain_page(record, {"cells": cells}, "no room.")
    assert "[A &lt;chair&gt;]" in html and "AAAA" not in html and "x &lt; 1" in html
    assert html.index("It broke.") < html.index("E: &lt;e&gt;") < html.index("line &lt;1&gt;")
    assert "&lt;b&gt;" in html and "&lt;why&gt;" in html and "no room." in html


@pytest.mark.parametrize(
    ("cell", "kind", "status", "words"),
    [
        ("raise KeyError", "cell_error", 1, "Code cell 3 stopped with KeyError"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "kernel_died", 4,
         "in the middle of code cell 3: it ran out of memory, or it was killed from outside"),
        ("import os\nos.abort()", "kernel_died", 4, "it was ended by the signal SIGABRT"),
        ("import os\nos._exit(7)", "kernel_died", 4, "it left with the exit status 7"),
        ("raise OSError(28, 'No space left on device')", "disk_full", 6, "The disk is full. Code"),
        ("1", "no_verdict", 1, "ended without a verdict"),
    ],
)  # fmt: skip
def test_how_a_run_failed_is_said_in_words_and_by_the_exit_status(
    make_notebook: Maker, tmp_path: Path, cell: str, kind: str, status: int, words: str
) -> None:
    notebook = make(make_notebook, cell, *["'never'"] * (kind != "no_verdict"))
    assert main(["run", str(notebook), "--reports", str(tmp_path)]) == status
    (folder,) = (tmp_path / "runs").iterdir()
    record = RunRecord.read(folder)
    assert record.failure is not None and record.failure["kind"] == kind
    assert record.error is not None and words in record.error
    html = (folder / "report.html").read_text()
    assert html.index("stopped" if "stopped" in words else words[:12]) < html.index("so far")
    assert ("Code, 1 line, not run" in html) == (kind != "no_verdict")
    assert ("Traceback" in html) == (kind != "no_verdict") and "papermill-error" not in html
    assert f"runs/{folder.name}/report.html" in (tmp_path / "index.html").read_text()
    assert not (folder / ".ballast").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a kernel listens at ports")
def test_a_run_starts_where_others_take_the_ports_that_were_free(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = make(make_notebook, FINISH)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(LocalPortCache, "find_available_port", lambda *_: port)
        assert report.run(notebook, None, "n", tmp_path).record.error is None


def test_a_kernel_that_never_answers_is_said_not_to_have_started(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(self: execution.NotebookClient) -> None:  # as jupyter_client ends its wait
        raise RuntimeError(f"Kernel didn't respond in {self.startup_timeout} seconds")

    monkeypatch.setattr(execution.NotebookClient, "async_start_new_kernel_client", silent)
    late = report.run(make(make_notebook, FINISH), None, "n", tmp_path)
    assert "did not start: it gave no answer for 300 s" in str(late.record.error)
    assert late.record.failure == {"kind": "not_started", "cell": None}


def test_a_run_that_takes_too_long_is_interrupted_then_killed(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = (
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('sa' + 'ved')"
    )
    heeds = make_notebook("heeds", "# T", wait, "print('ne' + 'ver')", parameters=PARAMETERS)
    done = report.run(heeds, None, "heeds", tmp_path, cell_timeout_s=1.0)
    assert done.exit_status == 124 and done.record.failure["kind"] == "timed_out"
    assert done.record.error == "A cell took longer than the 1 s it was given in code cell 2."
    html = done.report.read_text()
    assert "saved" in html and "never" not in html

    monkeypatch.setattr(execution, "GRACE_S", 0.5)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('de' + 'af')\n"
    notebook = make_notebook("deaf", "# T", deaf + "time.sleep(60)", parameters=PARAMETERS)
    done = report.run(notebook, None, "deaf", tmp_path, timeout_s=4.0)
    assert done.exit_status == 124 and "The run took longer than the 4 s" in done.record.error
    assert "deaf" in done.report.read_text() and done.record.duration_s < 20


def test_what_ran_is_on_disk_while_it_runs_and_progress_shows_the_kernels_bar(
    make_notebook: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(execution, "AUTOSAVE_S", 0.2)
    cell = f"""\
import time
from pathlib import Path
from typing import Any
from tqdm import tqdm as text
from tqdm.auto import tqdm
print("half" + " way", flush=True)
for _ in tqdm(range(4), desc="widgets"):
    time.sleep(0.3)
for _ in text(range(4), desc="letters"):
    time.sleep(0.3)
until = time.monotonic() + 30
while not any("half way" in p.read_text() for p in Path({str(tmp_path)!r}).glob("runs/*/*.ipynb")):
    assert time.monotonic() < until
    time.sleep(0.05)"""
    notebook = make(make_notebook, cell, FINISH)
    done = report.run(notebook, None, "n", tmp_path, progress=True, label="L")
    assert not done.crashed, done.record.error
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    for bar in ("widgets:", "letters:"):
        shown = [line for line in lines if bar in line]
        assert any(line.startswith("L · ") and "/4 [" in line for line in shown)
    # which of them tqdm draws is a matter of time
    assert {line[:1] for line in re.findall(r"\d+/6 cells", " ".join(lines))} > {"0"}


def test_a_full_disk_still_gives_the_report(make_notebook: Maker, tmp_path: Path) -> None:
    """On a small disk of its own, which only exists for the processes started here."""
    unshare = shutil.which("unshare")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    private = [str(unshare), "--user", "--map-root-user", "--mount"]
    probe = [*private, "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if unshare is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a small disk")
    fill = f"""\
with open({str(disk / "filler")!r}, "wb") as file:
    while True:
        file.write(b"0" * (1 << 16))"""
    notebook = make(make_notebook, fill)
    # the disk goes with its last process: what is on it is copied before that
    script = f"""\
mount -t tmpfs -o size=24m none "$1" && {sys.executable} -m fresnel run "$2" --reports "$1/r"
status=$?; cp -r "$1/r" "$3"; exit $status"""
    command = [*private, "bash", "-c", script, "bash", str(disk), str(notebook), str(kept)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 6, done.stderr + done.stdout
    (folder,) = (kept / "runs").iterdir()
    assert RunRecord.read(folder).failure == {"kind": "disk_full", "cell": 3}
    html = (folder / "report.html").read_text()
    assert html.index("The disk is full.") < html.index("so far")
    assert "plain one" not in html, "the room kept for it was enough for the real page"


KILLED = [signal.SIGKILL]


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM], KILLED])
def test_a_stopped_run_leaves_its_report(
    make_notebook: Maker, tmp_path: Path, signals: list[signal.Signals]
) -> None:
    """A cell that does not heed Ctrl-C is given time; the second signal ends it at once.  After
    SIGKILL the next index makes the page, and nothing else is left."""
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" * (len(signals) - 1)
    begun = f"import time\nopen({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(60)"
    notebook = make(make_notebook, deaf + begun)
    words = [str(notebook), "--reports", str(tmp_path)]
    fork = multiprocessing.get_context("fork")
    if signals == [signal.SIGINT]:  # by the shell's script, as people do
        env = {**os.environ, "FRESNEL_PYTHON": sys.executable}
        process: Any = subprocess.Popen(["./run_all.sh", *words], cwd=ROOT, env=env)
        code, join = process.poll, process.wait
    else:
        process = fork.Process(target=lambda: sys.exit(main(["run", *words])))
        process.start()
        code, join = lambda: process.exitcode, process.join
    while not (tmp_path / "begun").exists() and code() is None:
        time.sleep(0.05)
    for number in signals[:-1]:
        os.kill(process.pid, number)
        time.sleep(1.0)
        assert code() is None, "the kernel is given time to save a checkpoint"
    os.kill(process.pid, signals[-1])
    ended = time.monotonic()
    join(60)
    (folder,) = (tmp_path / "runs").iterdir()
    if signals == KILLED:
        while RunRecord.read(folder).status == "running" and time.monotonic() - ended < 30:
            time.sleep(0.3)  # until the kernel has seen it
            report.try_index(tmp_path)
        record = RunRecord.read(folder)
        assert record.badge == "DIED" in (tmp_path / "index.html").read_text()
        assert (record.name, record.failure) == ("n", {"kind": "died", "cell": None})
        assert "so far" in (folder / "report.html").read_text()
        assert {path.name for path in folder.iterdir()} == PRODUCTS
        return
    assert code() == 130
    assert time.monotonic() - ended < execution.GRACE_S
    record = RunRecord.read(folder)
    assert record.badge == "STOPPED" and "stopped from outside" in (record.error or "")
    for page in (folder / "report.html", tmp_path / "index.html"):
        assert "STOPPED" in page.read_text() and "CRASHED" not in page.read_text()
    assert "so far" in (folder / "report.html").read_text()
