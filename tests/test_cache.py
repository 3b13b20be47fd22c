"""A run is computed again exactly when something that it depends on has changed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fresnel.host import files
from fresnel.report import cache
from fresnel.report import run as report
from fresnel.report.record import RunRecord

ROOT = Path(__file__).resolve().parent.parent
Maker = Callable[..., Path]
START = """\
from fresnel.report import record
run = record.start("n", dict(data=data, helper=helper, verdict=verdict), output_dir)"""
PARAMETERS = 'data = ""  # a file\nhelper = ""\nverdict = "PASS"\noutput_dir = ""'


@pytest.fixture
def reader(make_notebook: Maker, tmp_path: Path) -> Callable[..., report.Run]:
    """Runs a notebook whose parameter names a file, which declares a folder and what it made."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one")
    (tmp_path / "named.txt").write_text("named")
    body = f"""\
from pathlib import Path
print(Path(data).read_text())
run.input({str(tmp_path / "data")!r})
Path({str(tmp_path / "made.txt")!r}).write_text("made")
run.input({str(tmp_path / "made.txt")!r})"""
    notebook = make_notebook(
        "reads", START, body, "run.finish(verdict, 'so')", parameters=PARAMETERS
    )

    def run(fresh: bool = False, **params: object) -> report.Run:
        given = {"data": str(tmp_path / "named.txt"), **params}
        return report.run(notebook, given, "r", tmp_path / "reports", fresh=fresh)

    return run


def test_unchanged_is_found_and_marked_and_all_else_computed(
    reader: Callable[..., report.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reader(verdict="FAIL")
    assert first.record.verdict == "FAIL" and not first.reused
    again = reader(verdict="FAIL")
    assert again.reused and again.directory == first.directory
    mark = again.record.cached
    assert mark is not None and mark["computed_utc"] == first.record.started_utc
    assert mark["commit"] == first.record.provenance["git"]["commit"]
    assert RunRecord.read(first.directory).cached == mark
    assert again.record.replace(cached=None) == first.record
    assert len(list((tmp_path / "reports" / "runs").iterdir())) == 1
    assert not list((tmp_path / "reports").rglob("*.pkl")), "no cache has anything to unpickle"

    last = [again]

    def computed(**params: object) -> bool:
        """Whether the next run is computed; the one after it must be found."""
        last.append(reader(**{"verdict": "FAIL", **params}))
        return not last[-1].reused

    assert computed(fresh=True) and not computed(), "--fresh ignores the cache, and fills it"
    assert computed(helper="other") and not computed(), "a changed parameter, and back"
    (tmp_path / "named.txt").write_text("other")
    assert computed() and not computed(), "a file that a parameter names"
    (tmp_path / "data" / "a.txt").write_text("two")
    assert computed(), "a file in a folder that the notebook declared"
    (tmp_path / "data" / "b.txt").write_text("new")
    assert computed() and not computed(), "a new file in it"
    (tmp_path / "made.txt").unlink()
    assert computed() and (tmp_path / "made.txt").exists(), "what the run made is gone"
    (last[-1].directory / "executed.ipynb").unlink()
    assert not computed(), "an earlier run of the same kind is as good"
    (last[-1].directory / "results.json").write_text("{")
    monkeypatch.setattr(cache, "code_hash", lambda: "other code")
    assert computed(), "changed code"


def test_a_dataset_counts_by_its_content_hash(make_notebook: Maker, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    manifest = folder / "manifest.json"
    manifest.write_text('{"content_hash": "sha256:1", "note": "a"}')
    body = f"""\
class Data(list):
    path, content_hash = {str(folder)!r}, "sha256:1"
run.dataset(Data())
run.finish("PASS", "")"""
    notebook = make_notebook("d", START, body, parameters=PARAMETERS)

    def reused() -> bool:
        return report.run(notebook, None, "d", tmp_path / "r").reused

    assert [reused(), reused()] == [False, True]
    manifest.write_text('{"content_hash": "sha256:1", "note": "b"}')
    assert reused()
    manifest.write_text('{"content_hash": "sha256:2"}')
    assert not reused()


def test_other_runs_count_by_their_results(make_notebook: Maker, tmp_path: Path) -> None:
    """As for an analysis, whose own run lies among those that it reads."""
    runs = tmp_path / "r" / "runs"
    other = RunRecord("x", "finished", "DONE", "one")
    (runs / "other").mkdir(parents=True)
    other.write(runs / "other")
    body = f"run.input({str(runs)!r})\nrun.finish('DONE', '')"
    notebook = make_notebook("story", START, body, parameters=PARAMETERS)

    def reused() -> bool:
        return report.run(notebook, None, "story", tmp_path / "r").reused

    assert [reused(), reused()] == [False, True]
    mark = {"reused_utc": "", "computed_utc": "", "commit": None, "dirty": None}
    other.replace(cached=mark).write(runs / "other")
    (runs / "other" / "report.html").write_text("a new page")
    assert reused(), "that another run was found again, and its page, is no news about it"
    other.replace(summary="two").write(runs / "other")
    assert not reused()


def test_what_did_not_finish_is_computed_again(make_notebook: Maker, tmp_path: Path) -> None:
    died = make_notebook("died", START, "1 / 0", parameters=PARAMETERS)
    refused = make_notebook(
        "no", START, "run.finish('REFUSED', 'no')\n1 / 0", parameters=PARAMETERS
    )
    slow = make_notebook("slow", START, "import time\ntime.sleep(60)", parameters=PARAMETERS)
    for notebook, limit in ((died, None), (refused, None), (slow, 2.0)):
        once, twice = (
            report.run(notebook, None, "n", tmp_path / "r", timeout_s=limit) for _ in range(2)
        )
        assert once.directory != twice.directory and not twice.reused


def test_the_code_hash_is_of_what_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "report/page.py", "report/templates/page.css", "cli.py"
    for name in (*shown, "training/loop.py", "assets/a.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    before = cache.code_hash()
    for name in (*shown, "training/loop.py", "assets/a.bin"):
        (tmp_path / name).write_text("b")
        assert (cache.code_hash() == before) == (name in shown), name
        before = cache.code_hash()
    for name in cache.NOT_TRAINING:
        assert (ROOT / "fresnel" / name).exists(), name


def test_a_second_holder_of_a_lock_waits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "locks" / "a.lock"
    code = f"""\
import sys
import threading
from pathlib import Path
from fresnel.host.files import locked
with locked(Path({str(lock)!r})):
    print("held", flush=True)
    sys.stdin.read()"""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with files.lock_if_free(lock) as mine:
            assert not mine
        got = threading.Event()

        def take() -> None:
            with files.locked(lock, "waiting for it"):
                got.set()

        thread = threading.Thread(target=take)
        thread.start()
        assert not got.wait(0.5), "it waits while the other holds the lock"
        other.kill()  # the lock goes with its holder
        assert got.wait(30)
        thread.join()
    assert "waiting for it" in capfd.readouterr().err
    with files.lock_if_free(lock) as mine:
        assert mine


def test_a_found_report_needs_no_torch(make_notebook: Maker, tmp_path: Path) -> None:
    notebook = make_notebook("t", START, "run.finish('DONE', '')", parameters=PARAMETERS)
    report.run(notebook, None, "t", tmp_path)
    code = f"""\
import sys
import threading
from fresnel.cli import main
status = main(["run", {str(notebook)!r}, "--name", "t", "--reports", {str(tmp_path)!r}])
slow = {{"torch", "papermill", "matplotlib", "numba"}} & set(sys.modules)
print(status, sorted(slow))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    cached = json.loads((folder / "results.json").read_text())["cached"]
    assert cached["computed_utc"] and "unchanged" in done.stdout
