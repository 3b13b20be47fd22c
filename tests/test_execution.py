"""A report comes out whatever happens: errors, kills, time-outs, full disks, broken templates."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import external_requests

from fresnel.cli import main
from fresnel.report import engine as execution
from fresnel.report import html as _html
from fresnel.report import index as overview
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
FINISH = 'run.finish("DONE", "All <well>.")'


def make(make_notebook: Maker, *cells: str) -> Path:
    return make_notebook("n", "# Title", START, *cells, parameters=PARAMETERS)


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("template 'index.html.j2' not found")


def test_a_broken_template_costs_no_run(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = "from IPython.display import display\nfrom PIL import Image\n"
    drawn += 'display(Image.new("RGB", (2, 2)), metadata={"image/png": {"alt": "A black square"}})'
    notebook = make(make_notebook, drawn, FINISH)
    steps = [runner.Step("a", notebook), runner.Step("b", notebook)]
    with monkeypatch.context() as patch:
        patch.setattr(pages, "to_html", broken)
        problems = runner.run(steps, tmp_path, keep_finished=False)
        assert [problem.split(":")[0] for problem in problems] == ["a", "b"]
        assert "'index.html.j2' not found). A plain page stands in." in problems[0]
        assert main(["run", str(notebook), "--name", "a", "--reports", str(tmp_path)]) == 5
    folders = sorted((tmp_path / "runs").iterdir())
    for folder in folders:
        html = (folder / "report.html").read_text()
        assert html.count("<h1>") == 1 and "All &lt;well&gt;." in html and "so far" in html
        assert 'alt="A black square"' in html and external_requests(html) == []
        assert "run_all.sh pages" in html
    assert main(["pages", "--reports", str(tmp_path)]) == 0
    assert all("run_all.sh pages" not in (f / "report.html").read_text() for f in folders)
    monkeypatch.setattr(overview, "index", broken)
    (problem,) = runner.run(steps[:1], tmp_path, keep_finished=False)
    assert problem.startswith("the index could not be made: RuntimeError")


def test_a_plain_page_without_pictures_has_their_description() -> None:
    output = nbformat.v4.new_output(
        "display_data", {"image/png": "AAAA"}, metadata={"image/png": {"alt": "A <chair>"}}
    )
    cell = nbformat.v4.new_code_cell("x < 1", outputs=[output])
    error = nbformat.v4.new_output("error", ename="E", evalue="<e>", traceback=["line <1>"])
    cells = [
        nbformat.v4.new_markdown_cell("# T"),
        cell,
        nbformat.v4.new_code_cell("", outputs=[error]),
    ]
    record = RunRecord("n", "crashed", error="It broke.", params={"a": "<b>"})
    html = _html.plain_page(record, {"cells": cells}, "no room.", pictures=False)
    assert "[A &lt;chair&gt;]" in html and "AAAA" not in html and "x &lt; 1" in html
    assert html.index("It broke.") < html.index("E: &lt;e&gt;") < html.index("line &lt;1&gt;")
    assert "<b>" not in html


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


def test_a_run_that_takes_too_long_is_interrupted_then_killed(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = (
        "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('sa' + 'ved')"
    )
    heeds = make_notebook("heeds", "# T", wait, "print('ne' + 'ver')", parameters=PARAMETERS)
    done = report.run(heeds, None, "heeds", tmp_path, timeout_s=5.0)
    assert done.exit_status == 124 and done.record.failure["kind"] == "timed_out"
    assert done.record.error == "The run took longer than the 5 s it was given in code cell 2."
    html = done.report.read_text()
    assert "saved" in html and "never" not in html

    monkeypatch.setattr(execution, "GRACE_S", 0.5)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('de' + 'af')\n"
    notebook = make_notebook("deaf", "# T", deaf + "time.sleep(60)", parameters=PARAMETERS)
    done = report.run(notebook, None, "deaf", tmp_path, cell_timeout_s=1.0)
    assert done.exit_status == 124 and "A cell took longer than the 1 s" in done.record.error
    assert "deaf" in done.report.read_text()


def test_what_ran_is_on_disk_while_it_runs(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "AUTOSAVE_S", 0.2)
    wait = f"""\
import time
from pathlib import Path
print("half" + " way", flush=True)
until = time.monotonic() + 30
while time.monotonic() < until:
    if any("half way" in p.read_text() for p in Path({str(tmp_path)!r}).glob("runs/*/*.ipynb")):
        break
    time.sleep(0.05)
else:
    raise TimeoutError"""
    assert not report.run(make(make_notebook, wait, FINISH), None, "n", tmp_path).crashed


def test_progress_shows_the_cell_and_the_kernels_bar(
    make_notebook: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bars = """\
import sys, time
from tqdm import tqdm as text
from tqdm.auto import tqdm
for _ in tqdm(range(4), desc="widgets"):
    time.sleep(0.3)
for _ in text(range(4), desc="letters"):
    time.sleep(0.3)"""
    done = report.run(
        make(make_notebook, bars, FINISH), None, "n", tmp_path, progress=True, label="L"
    )
    assert not done.crashed, done.record.error
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    for bar in ("widgets:", "letters:"):
        shown = [line for line in lines if bar in line]
        assert any(line.startswith("L · ") and "/4 [" in line for line in shown)
    # which of them tqdm draws is a matter of time
    assert {line[:1] for line in re.findall(r"\d+/6 cells", " ".join(lines))} > {"0"}


FULL = f"""\
mount -t tmpfs -o size=24m none "$1" && exec {sys.executable} -m fresnel run "$2" --reports "$1/r"
"""


def test_a_full_disk_still_gives_the_report(make_notebook: Maker, tmp_path: Path) -> None:
    """On a small disk of its own, which only exists for the processes started here."""
    unshare = shutil.which("unshare")
    disk = tmp_path / "disk"
    disk.mkdir()
    private = [str(unshare), "--user", "--map-root-user", "--mount"]
    probe = [*private, "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if unshare is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a small disk")
    kept = tmp_path / "kept"
    fill = f"""\
import shutil
with open({str(disk / "filler")!r}, "wb") as file:
    while True:
        file.write(b"0" * (1 << 16))"""
    notebook = make(make_notebook, fill)
    # the disk goes with its last process: what is on it is copied before that
    script = FULL.replace("exec ", "") + 'status=$?; cp -r "$1/r" "$3"; exit $status'
    command = [*private, "bash", "-c", script, "bash", str(disk), str(notebook), str(kept)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 6, done.stderr + done.stdout
    (folder,) = (kept / "runs").iterdir()
    record = RunRecord.read(folder)
    assert record.failure == {"kind": "disk_full", "cell": 3}
    html = (folder / "report.html").read_text()
    assert html.index("The disk is full.") < html.index("so far")
    assert "plain one" not in html, "the room kept for it was enough for the real page"


def test_a_page_that_fits_nowhere_goes_to_the_temporary_folder(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = report.write_atomic

    def full(path: Path, text: str) -> None:
        if Path(path).name == report.REPORT_NAME:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, text)

    monkeypatch.setattr(report, "write_atomic", full)
    monkeypatch.setattr(pages, "to_html", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = report.run(make(make_notebook, FINISH), None, "n", tmp_path / "r")
    (page,) = tmp_path.glob("*-report.html")
    assert done.problem is not None and str(page) in done.problem and done.exit_status == 5
    assert "All &lt;well&gt;." in page.read_text()


TRAINING = """\
import os, signal
import torch
from pathlib import Path
from types import SimpleNamespace
from fresnel.report import params
from fresnel.study.data import train_dir
from fresnel.gate import receipts
from fresnel.training.loop import fit
from fresnel.training.task import TrainConfig

folder = Path(marker).parent
data = SimpleNamespace(content_hash="sha256:" + "0" * 64, names=("ball",), path=folder)

class Line:
    batch_size, data, config, hot = 2, data, {}, {}
    model = torch.nn.Linear(2, 1)

    def phase(self, progress):
        return None

    def batch(self, step, generator):
        if step == 5 and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": torch.randn(2, 2, generator=generator)}

    def loss(self, batch, **_):
        return {"loss": self.model(batch["x"]).square().mean()}

    def validation(self, model):
        return {"loss": 1.0}

    def preview(self, model, generator):
        return torch.zeros(2, 2, 3, dtype=torch.uint8).numpy()
"""
FIT = """\
receipt = receipts.write_receipt(data, "gate", True, "fine")
config = TrainConfig(steps=8, warmup_steps=0, log_every=1, snapshot_every=2, validate_every=0)
place = folder / train_dir("line", data, params.parameters_of(globals())).name
result = fit(Line(), receipt=receipt, config=config, run_dir=place, resume=resume)
starts = [line for line in open(place / "log.jsonl") if '"start"' in line]
run.metrics({"samples_per_s": result.samples_per_s, "start": starts[-1]})
run.finish("DONE", "")"""


def test_a_training_that_died_goes_on_from_its_checkpoint(
    make_notebook: Maker, tmp_path: Path
) -> None:
    parameters = f'{PARAMETERS}\nresume = True\nmarker = "{tmp_path / "marker"}"'
    notebook = make_notebook("t", START, TRAINING, FIT, parameters=parameters)
    died, resumed, fresh = (
        report.run(notebook, None, "t", tmp_path / "r", fresh=fresh) for fresh in (0, 0, 1)
    )
    assert died.record.failure is not None and died.record.failure["kind"] == "kernel_died"
    assert not resumed.crashed, resumed.record.error
    start = json.loads(resumed.record.metrics["start"])
    assert (start["resumed"], start["step"]) == (True, 4)
    assert resumed.record.resources["samples_per_s"] > 0
    assert json.loads(fresh.record.metrics["start"])["resumed"] is False
    assert report.run(notebook, None, "t", tmp_path / "r").directory == fresh.directory


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_stopped_run_leaves_its_report(
    make_notebook: Maker, tmp_path: Path, signals: list[signal.Signals]
) -> None:
    """A cell that does not heed Ctrl-C is given time; the second signal ends it at once."""
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" * (len(signals) - 1)
    begun = f"import time\nopen({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(60)"
    notebook = make(make_notebook, deaf + begun)
    command = [sys.executable, "-m", "fresnel", "run", str(notebook), "--reports", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "begun").exists() and process.poll() is None:
            time.sleep(0.05)
        for number in signals[:-1]:
            process.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.0)  # the kernel is given time to save a checkpoint
        process.send_signal(signals[-1])
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (folder,) = (tmp_path / "runs").iterdir()
    record = RunRecord.read(folder)
    assert record.badge == "STOPPED" and "stopped from outside" in (record.error or "")
    assert "so far" in (folder / "report.html").read_text()
