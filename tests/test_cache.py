"""A run is computed again exactly when something that it depends on has changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fresnel.report import cache
from fresnel.report import run as report
from fresnel.report.provenance import digest
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
    assert computed(), "a file that a parameter names"
    (tmp_path / "data" / "a.txt").write_text("two")
    (tmp_path / "data" / "b.txt").write_text("new")
    assert computed() and not computed(), "a file in a folder that the notebook declared"
    (tmp_path / "made.txt").unlink()
    assert computed() and (tmp_path / "made.txt").exists(), "what the run made is gone"
    (last[-1].directory / "executed.ipynb").unlink()
    assert not computed(), "an earlier run of the same kind is as good"
    (last[-1].directory / "results.json").write_text("{")
    monkeypatch.setattr(cache, "code_hash", lambda: "other code")
    assert computed(), "changed code"


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


@pytest.mark.parametrize(
    ("ends", "limit_s"),
    [("1 / 0", None), ("run.finish('REFUSED', 'no')\n1 / 0", None), ("time.sleep(9)", 0.5)],
)
def test_what_did_not_finish_is_computed_again(
    make_notebook: Maker, tmp_path: Path, ends: str, limit_s: float | None
) -> None:
    notebook = make_notebook("ends", START, f"import time\n{ends}", parameters=PARAMETERS)
    once = report.run(notebook, None, "n", tmp_path, timeout_s=limit_s)
    assert once.crashed or once.record.verdict == "REFUSED"
    found = cache.find(tmp_path, once.record.provenance["identity"], "n", None)
    assert found is None


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
