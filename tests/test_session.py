"""Notebooks that no engine of ours runs: by plain papermill, and cell by cell as in JupyterLab."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from fresnel.report import run as report
from fresnel.report.record import RunRecord

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = 'steps = 3  # optimiser steps\nrate = 1.0e-4\nthen = "go on"\noutput_dir = ""'
START = 'from fresnel.report import session\nrun = session.start("tiny", globals())'
WORK = """\
from IPython.display import display
abstract = display("nothing " "yet", display_id=True)
with run.stage("work"):
    print("st" + "eps", steps)
    if then == "wait":
        import time
        open("begun", "w").close()
        time.sleep(60)
    assert then != "fail", "as <asked>"
abstract.update("all " "said")"""
FINISH = 'run.metric("psnr", 21.5)\ndone = run.finish("PASS", f"All <{steps}> steps.")'


@pytest.fixture
def tiny(tmp_path: Path, make_notebook: Callable[..., Path]) -> Path:
    """In notebooks/ of a folder that stands for the project."""
    made = make_notebook(
        "tiny", "# Does it?", START, "## Work", WORK, FINISH, parameters=PARAMETERS
    )
    notebook = nbformat.read(made, 4)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "P", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "tiny.ipynb")
    return tmp_path / "notebooks" / "tiny.ipynb"


def runs_of(project: Path) -> list[tuple[RunRecord, Path]]:
    folders = sorted((project / "reports/runs").iterdir())
    return [(RunRecord.read(folder), folder) for folder in folders]


def test_plain_papermill_checks_its_parameters_and_leaves_a_page_and_says_what_crashed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import papermill

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def execute(**params: object) -> None:
        papermill.execute_notebook(str(tiny), "out.ipynb", params, progress_bar=False)

    with pytest.raises(papermill.PapermillExecutionError) as wrong:
        execute(step=3, rate="x")
    for words in (
        "no parameter 'step'; did you mean 'steps'?",
        "rate: got 'x' (a text), want a nu",
    ):
        assert words in str(wrong.value)
    assert "steps" not in str(nbformat.read("out.ipynb", 4).cells[-2].outputs), "it ran"
    assert not Path("reports").exists()

    execute(steps=5, rate=1)
    ((record, folder),) = runs_of(tmp_path)
    assert (record.badge, record.summary) == ("PASS", "All <5> steps.")
    assert record.params == {"steps": 5, "rate": 1.0, "then": "go on", "output_dir": ""}
    made = {"executed.ipynb", "report.html", "results.json"}
    assert {path.name for path in folder.iterdir()} == made
    page = (folder / "report.html").read_text()
    assert "<h1>Does it?</h1>" in page and "All &lt;5&gt; steps." in page and "steps 5" in page
    assert "all said" in page and "nothing yet" not in page, "what is displayed anew replaces"
    assert (
        ", not run" not in page and f"runs/{folder.name}" in Path("reports/index.html").read_text()
    )

    with pytest.raises(papermill.PapermillExecutionError, match="as <asked>"):
        execute(then="fail")
    record, folder = runs_of(tmp_path)[1]
    assert record.badge == "CRASHED" in Path("reports/index.html").read_text()
    assert record.error == "Code cell 3 stopped with AssertionError: as <asked>"
    page = (folder / "report.html").read_text()
    assert "as &lt;asked&gt;" in page and "steps 3" in page and "Code, 2 lines, not run" in page


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_plain_papermill_that_is_stopped_or_killed_is_said_to_be(
    tiny: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "papermill", str(tiny), "out.ipynb", "-p", "then", "wait"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "begun").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(60)
    until = time.monotonic() + 30
    while True:  # the kernel sees within a second that it is alone, and a busy one has no time
        report.try_index(tmp_path / "reports")
        if runs_of(tmp_path)[0][0].status != "running" or time.monotonic() > until:
            break
        time.sleep(0.3)
    ((record, folder),) = runs_of(tmp_path)
    badge = "STOPPED" if number == signal.SIGINT else "DIED"
    assert record.badge == badge in (tmp_path / "reports/index.html").read_text()
    page = (folder / "report.html").read_text()
    assert "<h1>Does it?</h1>" in page and badge in page
    assert ("steps 3" in page) == (number == signal.SIGINT)


class Lab:
    """A kernel that runs a notebook's cells in any order, as JupyterLab does."""

    def __init__(self, notebook: Path, cwd: Path) -> None:
        from jupyter_client.manager import start_new_kernel

        self.cells = {c.id: c.source for c in nbformat.read(notebook, 4).cells if "outputs" in c}
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JPY_SESSION_NAME": str(notebook)}
        self.manager, self.client = start_new_kernel(cwd=str(cwd), env=env)

    def run(self, *keys: str, **edited: str) -> str | None:
        """The last of these cells' error; all of them without any."""
        error = None
        for key in keys or tuple(self.cells):
            content = {"code": edited.get(key, self.cells[key]), "store_history": True}
            content["stop_on_error"] = False  # or what is sent right after an error is dropped
            session = self.client.session
            message = session.msg("execute_request", content, metadata={"cellId": key})
            self.client.shell_channel.send(message)
            reply = self.client._recv_reply(message["header"]["msg_id"], timeout=120)
            error = reply["content"].get("evalue")
        return error

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel()


def test_cells_of_a_finished_notebook_run_again_in_any_order(tmp_path: Path) -> None:
    """01 with tiny settings, in one kernel."""
    notebook = tmp_path / "notebooks" / "01_validate_data.ipynb"
    notebook.parent.mkdir()
    source = nbformat.read(ROOT / "notebooks" / notebook.name, 4)
    nbformat.write(source, notebook)
    lab = Lab(notebook, notebook.parent)
    try:
        first, setup, *middle, last = lab.cells
        assert "dataset_dir" in lab.cells[first] and "validate" in lab.cells["01-15"]
        small = {"images = 16 ": "images = 4 ", "image_size = 64 ": "image_size = 32 "}
        for was, now in {**small, 'dataset_dir = ""': 'dataset_dir = "set"'}.items():
            lab.cells[first] = lab.cells[first].replace(was, now)
        assert lab.run() is None
        reports = tmp_path / "notebooks" / "reports"
        ((record, folder),) = runs_of(tmp_path / "notebooks")
        assert record.badge == "PASS" and record.params["images"] == 4
        page = (folder / "report.html").read_text()
        assert "Is this data fit to train on?" in page and "4 of 4 records" in page
        assert "The first 4 input images" in page and ", not run" not in page

        for key in ("01-19", *middle[::-2], "01-06", "01-12", *middle[1:3]):
            assert lab.run(key) is None, key
        assert RunRecord.read(folder) == record, "as it was, until the last cell runs again"
        assert lab.run("01-13", **{"01-13": "nothing_of_this_name"}) is not None
        assert RunRecord.read(folder).badge == "PASS", "whoever sits before it mends it"
        assert (
            lab.run("01-04", last, **{"01-04": lab.cells["01-04"] + "\nprint('ed' + 'ited')"})
            is None
        )
        again, page = RunRecord.read(folder), (folder / "report.html").read_text()
        assert again.badge == "PASS" and again.duration_s > record.duration_s
        stages = [stage.name for stage in again.stages]
        assert sorted(stages) == sorted(stage.name for stage in record.stages)
        assert "edited" in page and "nothing_of_this_name" in page

        assert lab.run(setup) is None and lab.run(setup) is None
        (_, (other, new)) = runs_of(tmp_path / "notebooks")
        assert other.badge == "RUNNING" and new != folder, "one run, however often it is begun"
    finally:
        lab.close()
    assert RunRecord.read(new).badge == "STOPPED"
    report.try_index(reports)
    assert "shut down before" in (new / "report.html").read_text()
