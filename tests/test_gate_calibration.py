"""The arithmetic of the calibration report, and one of its sets from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import gate as calibration
import gate_report

from fresnel import faults
from fresnel.report import record


def row(fault: str, strength: float, codes: list[str], **more: Any) -> dict[str, Any]:
    base = {"source": "boxes", "scene": "black", "opaque": False, "shape": False, "seconds": 1.0}
    own = {"key": f"{fault} {strength} {codes}", "fault": fault, "strength": strength}
    return {**base, **own, "codes": codes, "passed": not codes, **more}


def rows() -> list[dict[str, Any]]:
    made = []
    for fault, (code, practical) in faults.EXPECTED.items():
        made += [row(fault, s, [code] if s >= practical else []) for s in gate_report.STRENGTHS]
    return made + [row("", 0.0, [], source="vases", shape=True) for _ in range(120)]


def test_intervals_are_wilsons() -> None:
    assert gate_report.wilson(0, 100) == pytest.approx([0.0, 0.0370], abs=1e-4)
    assert gate_report.wilson(50, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert gate_report.wilson(0, 0) == [0.0, 1.0]


def test_figures_count_practical_strengths_only() -> None:
    result = gate_report.summarise(rows(), {"records": 10, "seed": 0})
    assert result["recall"]["share"] == result["correct_cause"]["share"] == 1.0
    assert result["false_alarms"]["hits"] == 0 and gate_report.shortcomings(result) == []
    some = [*rows(), *(row("darken", 1.0, []) for _ in range(9))]
    some += [row("", 0.0, ["noisy"]) for _ in range(3)]
    some += [row("blur", 1.0, ["focal_length"]) for _ in range(20)]
    result = gate_report.summarise(some, {"records": 10, "seed": 0})
    assert [text.split(":")[0] for text in gate_report.shortcomings(result)] == [
        "recall", "correct cause", "false alarms",
    ]  # fmt: skip
    line = next(r for r in gate_report.faults_rows(result) if r["fault"] == "darken")
    assert line["1"] == "**10%**" and line["0.75"] == "0%"
    blur = next(r for r in gate_report.faults_rows(result) if r["fault"] == "blur")
    assert blur["else"] == "focal_length"


def test_the_report_is_a_run_that_the_index_finds(tmp_path: Path) -> None:
    run = record.start("gate_calibration", {"seed": 0}, tmp_path / "gate")
    result = gate_report.summarise(rows(), {"records": 10, "seed": 0})
    page = gate_report.publish(run, result)
    assert "**100%**" in page.read_text()
    assert record.RunRecord.read(tmp_path / "gate").verdict == "PASS"
    assert json.loads((tmp_path / "gate" / "gate.json").read_text())["recall"]["share"] == 1.0
    from fresnel.report.index import index

    assert "gate_calibration" in index(tmp_path).read_text()


def test_a_set_of_shapes_goes_through() -> None:
    said = calibration.trial(calibration.Task("symmetric", 0, seed=1))
    assert said["passed"] and said["shape"] and said["source"] == "symmetric"
