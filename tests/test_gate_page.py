"""The verdict as a page, and the exit status of `python -m fresnel validate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from boxes import views_of

from fresnel import __main__ as command
from fresnel import faults
from fresnel.data import dataset
from fresnel.data.dataset import MultiViewDataset
from fresnel.gate import verdict as gate
from fresnel.report import gate_page
from fresnel.report.html import external_requests


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    path = tmp_path_factory.mktemp("page") / "clean"
    return dataset.write(path, [views_of(i, size=24) for i in range(6)], meta={})


def page_of(data: MultiViewDataset, path: Path) -> tuple[str, gate.Verdict]:
    verdict = gate.validate(data, progress=False)
    text = gate_page.write(path, data, verdict).read_text()
    assert external_requests(text) == [] and "default-src &#39;none&#39;" in text
    return text, verdict


def test_a_pass_shows_its_evidence(clean: MultiViewDataset, tmp_path: Path) -> None:
    text, _ = page_of(clean, tmp_path / "page.html")
    assert "PASS" in text and "No check failed." in text
    assert text.count("data:image/png;base64,") == 3  # records, roses, cameras
    assert "8 cameras stand" in text


@pytest.mark.parametrize("fault", ["darken", "pivot_offset", "duplicated_objects", "cropped"])
def test_a_failure_names_its_cause_and_shows_the_worst(
    clean: MultiViewDataset, tmp_path: Path, fault: str
) -> None:
    bad = faults.apply(clean, fault, 1.0, tmp_path / "<bad> & worse")
    text, verdict = page_of(bad, tmp_path / "page.html")
    assert f"<b>{verdict.reasons[0].code}</b>" in text and "FAIL" in text
    assert "&lt;bad&gt; &amp; worse" in text and "<bad>" not in text
    assert ("The worst views" in text) == (fault in ("darken", "cropped"))


def test_the_worst_records_come_first(clean: MultiViewDataset, tmp_path: Path) -> None:
    records = [clean[i] for i in range(6)]
    moved = list(faults.corrupt(records, "pivot_offset", 0.5))
    worse = list(faults.corrupt(records, "pivot_offset", 1.0))
    data = dataset.write(tmp_path / "set", [*moved[:4], *worse[4:]], meta={})
    verdict = gate.validate(data, progress=False)
    assert set(gate_page._worst_records(data, verdict)[:2]) == {4, 5}


def test_records_that_cannot_be_read_leave_a_page(clean: MultiViewDataset, tmp_path: Path) -> None:
    data = dataset.write(tmp_path / "set", [clean[i] for i in range(3)], meta={})
    for picture in data.path.rglob("view_00*/rgb.png"):
        picture.write_bytes(b"no picture")
    text, verdict = page_of(data, tmp_path / "page.html")
    assert verdict.reasons[0].code == "unreadable" and "no picture" not in text
    assert "<b>unreadable</b>" in text and "data:image/png" not in text


def test_exit_status(
    clean: MultiViewDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validate = ["validate", str(clean.path), "--json"]
    assert command.main([*validate, "--html", str(tmp_path / "a.html")]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] and (tmp_path / "a.html").is_file()
    assert command.main([*validate, "--against", str(clean.path)]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["reasons"][0]["code"] == "split_leak"
    empty = faults.apply(clean, "empty_views", 1.0, tmp_path / "empty")
    assert command.main(["validate", str(empty.path), "--fix", str(tmp_path / "fixed")]) == 1
    assert "not mended" in capsys.readouterr().err
    assert command.main(["validate", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "notes.txt").write_text("no data")
    assert command.main(["validate", str(tmp_path / "notes.txt")]) == 2

    def breaks(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(gate, "validate", breaks)
    capsys.readouterr()
    assert command.main(["validate", str(clean.path)]) == 2
    assert "broke down (KeyError" in capsys.readouterr().err
