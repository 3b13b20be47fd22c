"""A run is computed again exactly when something that it depends on has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def rewrite(path: Path, text: str) -> None:
    """Change a file in a way that its size and modification time do not tell."""
    before = path.stat()
    assert len(text) == before.st_size
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def reader(make_notebook: Maker, tmp_path: Path) -> Callable[..., report.Run]:
    """Runs a notebook that lists data/, reads data/a.txt, imports helping.py, writes made.txt."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one")
    (tmp_path / "helping.py").write_text("def answer(text):\n    return len(text)\n")
    body = f"""\
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
import helping
folder = Path({str(tmp_path / "data")!r})
print([path.name for path in folder.iterdir()], helping.answer((folder / "a.txt").read_text()))
Path({str(tmp_path / "made.txt")!r}).write_text("made")
scratch = folder.parent / "scratch.txt"
scratch.write_text("gone at the end")
scratch.read_text()
scratch.unlink()"""
    notebook = make_notebook(
        "reads", START, body, "run.finish(verdict, 'so')", parameters=PARAMETERS
    )

    def run(fresh: bool = False, **params: object) -> report.Run:
        return report.run(notebook, params, "r", tmp_path / "reports", fresh=fresh)

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

    last = [again]

    def computed(**params: object) -> bool:
        """Whether the next run is computed; the one after it must be found."""
        done = reader(**{"verdict": "FAIL", **params})
        last.append(done)
        return not done.reused

    assert computed(fresh=True) and not computed(), "--fresh ignores the cache, and fills it"
    assert computed(data="other") and not computed(), "a changed parameter, and back"
    rewrite(tmp_path / "data" / "a.txt", "two")
    assert computed() and not computed(), "changed data, though of the same size and time"
    (tmp_path / "data" / "b.txt").write_text("new")
    assert computed() and not computed(), "a new file in a folder that was listed"
    (tmp_path / "helping.py").write_text("def answer(text):\n    return 2 * len(text)\n")
    assert computed() and not computed(), "a changed module"
    (tmp_path / "made.txt").unlink()
    assert computed() and (tmp_path / "made.txt").exists(), "what the run made is gone"
    (last[-1].directory / "results.json").write_text("{")
    assert computed(), "a damaged record"
    monkeypatch.setattr(cache, "code_hash", lambda: "other code")
    assert computed(), "changed code"


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


def test_files_that_worker_processes_read_count(make_notebook: Maker, tmp_path: Path) -> None:
    RunRecord("x", "finished", "DONE", "one").write(tmp_path / "results.json")
    body = f"""\
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
with ProcessPoolExecutor(1, get_context("spawn")) as pool:
    print(pool.submit(record.RunRecord.read, {str(tmp_path / "results.json")!r}).result().summary)
run.finish("DONE", "")"""
    notebook = make_notebook("pool", START, body, parameters=PARAMETERS)

    def run() -> bool:
        return report.run(notebook, None, "p", tmp_path / "r").reused

    assert [run(), run()] == [False, True]
    found = RunRecord.read(tmp_path).replace(cached={
        "reused_utc": "", "computed_utc": "", "commit": None, "dirty": None,
    })  # fmt: skip
    found.write(tmp_path)
    assert run(), "that another run was found in the cache changes nothing in it"
    found.replace(summary="two").write(tmp_path)
    assert not run()


def test_a_file_that_changes_while_it_is_read_keeps_a_run_out(
    make_notebook: Maker, tmp_path: Path
) -> None:
    (tmp_path / "shifting.txt").write_text("a")
    body = f"""\
import subprocess
print(open({str(tmp_path / "shifting.txt")!r}).read())
subprocess.run(["sh", "-c", "echo b > {tmp_path / "shifting.txt"}"], check=True)
run.finish("DONE", "")"""
    notebook = make_notebook("shift", START, body, parameters=PARAMETERS)
    assert not report.run(notebook, None, "p", tmp_path / "r").reused
    assert not report.run(notebook, None, "p", tmp_path / "r").reused


def test_the_code_hash_is_of_what_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "report/page.py", "report/templates/page.css"
    for name in (*shown, "training/loop.py", "assets/a.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(cache, "PACKAGE", tmp_path)
    before = cache.code_hash()
    for name in (*shown, "training/loop.py", "assets/a.bin"):
        (tmp_path / name).write_text("b")
        assert (cache.code_hash() == before) == (name in shown), name
        before = cache.code_hash()
    for name in cache._SHOWS_ONLY | cache.NOT_TRAINING:
        assert (ROOT / "fresnel" / name).exists(), name


def test_a_state_is_told_by_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert cache.state(str(path)) == ["none", None, None]
    path.write_text("abc")
    before = cache.state(str(path))
    rewrite(path, "abd")
    assert cache.state(str(path), before)[-1] != before[-1], "looked at right after it was written"
    settled = cache.state(str(path))
    settled[1][4] = True
    assert cache.state(str(path), settled) is settled, "not read again"
    path.touch()
    assert cache.state(str(path), settled)[-1] == settled[-1], "read again, and the same"
    listed = cache.state(str(tmp_path))
    (tmp_path / ".hidden").touch()
    assert cache.state(str(tmp_path)) == listed
    (tmp_path / "seen").touch()
    assert cache.state(str(tmp_path)) != listed


def test_a_second_holder_of_a_lock_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "locks" / "a.lock"
    code = "import sys, time\nfrom pathlib import Path\nfrom fresnel.host import files\n"
    code += f"with files.locked(Path({str(lock)!r})):\n    print('held', flush=True)\n"
    code += "    sys.stdin.read()\n"
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "held\n"
        other.kill()  # the lock goes with its holder
        other.wait()
    with files.locked(lock, "waiting"):
        pass
    assert capsys.readouterr().err == ""


def test_a_found_report_needs_no_torch(make_notebook: Maker, tmp_path: Path) -> None:
    notebook = make_notebook("t", START, "run.finish('DONE', '')", parameters=PARAMETERS)
    report.run(notebook, None, "t", tmp_path)
    code = f"""\
import sys
from fresnel.cli import main
status = main(["run", {str(notebook)!r}, "--name", "t", "--reports", {str(tmp_path)!r}])
slow = {{"torch", "papermill", "matplotlib", "numba"}} & set(sys.modules)
print(status, sorted(slow))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    cached = json.loads((folder / "results.json").read_text())["cached"]
    assert cached["computed_utc"] and "unchanged" in done.stdout
