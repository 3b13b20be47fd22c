"""A run is computed again exactly when something that it depends on has changed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fresnel.report import provenance
from fresnel.report import run as report
from fresnel.report.provenance import digest
from fresnel.report.record import RunRecord
from fresnel.study import data as training_data

ROOT = Path(__file__).resolve().parent.parent
Maker = Callable[..., Path]
START = """\
from pathlib import Path
from fresnel.report import record
run = record.start("n", dict(data=data, resume=resume), output_dir)"""
PARAMETERS = 'data = ""  # a file\nhelper = ""\nresume = True\noutput_dir = ""'


def test_unchanged_is_found_and_marked_and_all_else_computed(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter names a file; the notebook declares a folder, and what it made."""
    monkeypatch.setattr(provenance, "code_hash", lambda: "code")  # which takes its time
    (tmp_path / "data").mkdir()
    named, read, made = (tmp_path / name for name in ("named", "data/a.txt", "made.txt"))
    named.write_text("named")
    read.write_text("one")
    body = f"""\
print(Path(data).read_text())
run.input({str(tmp_path / "data")!r})
Path({str(made)!r}).write_text("made")
run.input({str(made)!r})"""
    cells = START, body, "run.finish('FAIL', 'so')"
    notebook = make_notebook("reads", *cells, parameters=PARAMETERS)

    def run(**options: object) -> report.Run:
        return report.run(notebook, {"data": str(named)}, "r", tmp_path / "reports", **options)

    def found(**params: object) -> bool:
        given = {"data": str(named), **params}
        return report._Job(notebook, given, "r", tmp_path / "reports").found() is not None

    assert not found()
    first, again = run(), run()
    assert first.record.verdict == "FAIL" and not first.record.cached
    assert again.record.cached and again.directory == first.directory
    mark = again.record.cached
    assert mark is not None and mark["computed_utc"] == first.record.started_utc
    assert mark["commit"] == first.record.provenance["git"]["commit"]
    assert RunRecord.read(first.directory).cached == mark
    assert again.record.replace(cached=None) == first.record
    assert not list((tmp_path / "reports").rglob("*.pkl")), "no cache has anything to unpickle"
    fresh = run(fresh=True)
    assert fresh.record.params["resume"] is False, "and it trains from the first step"
    assert fresh.directory != first.directory == again.directory and run().record.cached

    assert not found(helper="other"), "a changed parameter"
    for path, what in (
        (named, "a file that a parameter names"),
        (read, "a file in a folder that the notebook declared"),
        (made, "what the run made"),
        (fresh.directory / "executed.ipynb", ""),
        (fresh.directory / "results.json", ""),
    ):
        before = path.read_bytes()
        path.write_text("{other")
        assert found() is (not what), what or "an earlier run of the same kind is as good"
        path.unlink()
        assert found() is (not what), what
        path.write_bytes(before)
        assert found()
    (tmp_path / "data" / "b.txt").write_text("new")
    assert not found(), "a new file in the folder"
    (tmp_path / "data" / "b.txt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "code_hash", lambda: "other code")
        assert not found(), "changed code"
    for change in ({"status": "crashed"}, {"verdict": "REFUSED"}, {"status": "running"}):
        for run_again in (first, fresh):
            run_again.record.replace(**change).write(run_again.directory)
        assert not found(), "what did not finish"


def test_datasets_count_by_their_hash_and_other_runs_by_their_results(tmp_path: Path) -> None:
    """As for an analysis, whose own run lies among those that it reads."""
    manifest = tmp_path / "set" / "manifest.json"
    manifest.parent.mkdir()
    other, one = tmp_path / "runs" / "other", RunRecord("x", "finished", "DONE", "one")
    other.mkdir(parents=True)
    mine = tmp_path / "runs" / "mine"
    mark = {"reused_utc": "", "computed_utc": "", "commit": None, "dirty": None}
    data, runs = [], []
    for number in (1, 1, 2):
        manifest.write_text(f'{{"content_hash": "sha256:{number}", "note": {len(data)}}}')
        data.append(digest(manifest.parent))
    for record in (one, one.replace(cached=mark), one.replace(summary="two")):
        record.write(other)
        (other / "report.html").write_text(f"page {len(runs)}, which is no news about it")
        mine.mkdir(exist_ok=True)
        RunRecord("x", "finished", "DONE", f"{len(runs)}").write(mine)
        runs.append(digest(tmp_path / "runs", mine))
    for first, same, changed in (data, runs):
        assert first == same != changed
    assert data[0] == "sha256:1"
    named = {"here": str(mine), "set": str(manifest.parent), "text": "no file", "reports_dir": ""}
    assert provenance.inputs_of(named, mine).get(str(manifest.parent)) == "sha256:2"
    assert str(mine) not in provenance.inputs_of(named, mine), "its own folder is no input"


def test_the_exit_status_of_what_finished() -> None:
    refused, passed = (RunRecord("n", "finished", verdict) for verdict in ("REFUSED", "PASS"))
    assert [report.Run(record, Path()).exit_status for record in (refused, passed)] == [3, 0]
    assert report.Run(passed, Path(), "a plain page").exit_status == 5


def test_the_code_hash_is_of_what_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "report/page.py", "report/templates/page.css", "cli.py"
    files = *shown, "training/loop.py", "assets/a.bin"
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    for name in files:
        before = provenance.code_hash()
        (tmp_path / name).write_text("b")
        assert (provenance.code_hash() == before) == (name in shown), name
    for name in provenance.NOT_TRAINING:
        assert (ROOT / "fresnel" / name).exists(), name


def test_a_training_finds_its_checkpoint_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has no part in it: its report's folder, what is compared and kept."""
    data = SimpleNamespace(content_hash="sha256:0123456789")
    monkeypatch.setattr(training_data, "code_hash", lambda apart: "code")
    place = training_data.train_dir("cvs", data, {"steps": 8})
    assert place.name.startswith("cvs-01234567-")
    for same in ({"output_dir": "elsewhere"}, {"resume": False}, {"keep_every": 3}):
        assert training_data.train_dir("cvs", data, {"steps": 8, **same}) == place
    assert training_data.train_dir("cvs", data, {"steps": 9}) != place
    monkeypatch.setattr(training_data, "code_hash", lambda apart: "other code")
    assert training_data.train_dir("cvs", data, {"steps": 8}) != place


def test_a_found_report_needs_no_torch(make_notebook: Maker, tmp_path: Path) -> None:
    notebook = make_notebook("t", START, "run.finish('DONE', '')", parameters=PARAMETERS)
    report.run(notebook, None, "t", tmp_path)
    code = f"""\
import sys
from fresnel.cli import main
status = main(["run", {str(notebook)!r}, "--name", "t", "--reports", {str(tmp_path)!r}])
print(status, sorted({{"torch", "papermill", "matplotlib", "numba"}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert RunRecord.read(folder).cached and "unchanged" in done.stdout
