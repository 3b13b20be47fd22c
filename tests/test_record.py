from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from fresnel import provenance, record
from fresnel.record import RecordError, RunRecord


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_run_leaves_what_the_issue_asks_for(tmp_path: Path) -> None:
    run = record.start("01_x.ipynb", {"seed": 3, "lr": 1e-4}, tmp_path, price_per_hour_usd=3600.0)
    with run.stage("outer"), run.stage("inner"):
        time.sleep(0.02)
    run.metric("psnr", np.float32(21.5))
    run.metrics({"bins": np.arange(3), "name": "x"})
    done = run.finish("PASS", "All well.", ["because"])
    data = read(tmp_path)
    wanted = "notebook status verdict params metrics provenance stages cost_usd schema_version"
    assert set(wanted.split()) <= data.keys()
    assert (data["notebook"], data["status"], data["verdict"]) == ("01_x", "finished", "PASS")
    assert data["metrics"] == {"psnr": 21.5, "bins": [0, 1, 2], "name": "x"}
    assert [stage["name"] for stage in data["stages"]] == ["outer", "inner"]
    assert all(s["duration_s"] >= 0.02 and s["peak_rss_bytes"] > 1 << 20 for s in data["stages"])
    assert data["cost_usd"] == pytest.approx(data["duration_s"])
    assert data["provenance"]["seed"] == 3
    assert data["provenance"]["packages"]["numpy"] == np.__version__
    assert done.badge == "PASS"


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    run = record.start("x", {"a": [1, 2]}, tmp_path)
    with run.stage("s"):
        pass
    done = run.finish("NO-GO", "No.", ["r1", "r2"])
    assert RunRecord.read(tmp_path) == done


def test_the_dataset_is_named_by_its_hash(tmp_path: Path) -> None:
    class Data(list):
        path, content_hash = tmp_path / "d", "sha256:ab"

    run = record.start("x", {}, tmp_path)
    run.dataset(Data("abc"))
    run.dataset(Data("abc"))
    entry = {"content_hash": "sha256:ab", "path": str(tmp_path / "d"), "objects": 3}
    assert read(tmp_path)["provenance"]["datasets"] == [entry]


def test_nan_and_infinity_become_null_with_a_note(tmp_path: Path) -> None:
    run = record.start("x", {}, tmp_path)
    run.metric("a", {"b": [1.0, float("nan")]})
    run.metric("c", np.float64("inf"))
    run.finish("DONE", "")
    data = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert data["metrics"] == {"a": {"b": [1.0, None]}, "c": None}
    assert any("metrics.a.b[1] was nan" in note for note in data["notes"])
    assert any("metrics.c was inf" in note for note in data["notes"])


def test_a_run_that_dies_leaves_its_finished_stages(tmp_path: Path) -> None:
    run = record.start("x", {}, tmp_path)
    with pytest.raises(ZeroDivisionError), run.stage("bad"):
        raise ZeroDivisionError
    data = read(tmp_path)
    assert data["status"] == "running" and data["verdict"] is None
    assert data["stages"][0]["failed"] is True


def test_a_finished_record_is_closed(tmp_path: Path) -> None:
    run = record.start("x", {}, tmp_path)
    with pytest.raises(ValueError, match=r"verdict: got 'MAYBE', want one of PASS"):
        run.finish("MAYBE", "")
    run.finish("GO", "")
    with pytest.raises(RecordError, match="already finished"):
        run.metric("late", 1)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (6, 8, 4)])
def test_thumbnail(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from PIL import Image

    run = record.start("x", {}, tmp_path)
    path = run.thumbnail(np.full(shape, 0.5, np.float32), longest_px=4)
    with Image.open(path) as picture:
        assert picture.size == (4, 3)
    assert run.record.artifacts["thumbnail"] == "thumbnail.png"
    with pytest.raises(ValueError, match=r"image: got shape \(2, 3, 5\)"):
        run.thumbnail(np.zeros((2, 3, 5)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"notebook": "x"}', "'status' is missing"),
        ('{"notebook": "x", "status": "odd"}', "status is 'odd'"),
        ('{"notebook": "x", "status": "finished", "metrics": 3}', "'metrics' must be an object"),
        ('{"notebook": "x", "status": "finished", "stages": [1]}', "wrong type"),
        ('{"notebook": "x", "status": "finished", "schema_version": 99}', "newer than"),
    ],
)
def test_damaged_records_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RecordError, match=message):
        RunRecord.read(tmp_path)


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "f.txt"
    record.write_atomic(target, "old")
    monkeypatch.setattr(record.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        record.write_atomic(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_run_folders_never_collide(tmp_path: Path) -> None:
    folders = {record.new_run_dir(tmp_path, "a b/c") for _ in range(5)}
    assert len(folders) == 5
    assert all("a-b-c" in folder.name for folder in folders)


def test_git_state_ignores_products() -> None:
    state = provenance.git_state()
    assert state.keys() == {"commit", "dirty", "changed"}
    assert not [path for path in state["changed"] if path.startswith(("reports", "runs"))]
