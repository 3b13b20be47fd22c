"""The arithmetic of the calibration's tables, and its harder conditions from end to end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import gate as calibration

from fresnel import faults
from fresnel.gate import validate


def row(fault: str, strength: float, codes: list[str], **more: Any) -> dict[str, Any]:
    known = {"source": "boxes", "condition": "", "fault": fault, "strength": strength}
    return {**known, "codes": codes, "passed": not codes, **more}


def test_tables_count_practical_strengths_and_unpaired_faults_apart() -> None:
    rows = [row(f, p, [code]) for f, (code, p) in faults.EXPECTED.items()]
    rows += [row("darken", 0.1, []), row("blur", 1.0, ["focal_length"]), row("blur", 1.0, [])]
    rows += [row("", 0.0, []), row("", 0.0, ["noisy"], condition="one record")]
    found = calibration.tables(rows)
    paired, unpaired = found["Faults"][1:3]
    count = len(faults.EXPECTED) - len(faults.UNPAIRED)
    assert paired[1].startswith(f"{count + 1}/{count + 2} ")
    assert paired[2].startswith(f"{count}/{count + 1} ")
    assert unpaired[1].startswith(f"{len(faults.UNPAIRED)}/{len(faults.UNPAIRED)} ")
    blur = next(line for line in found["By fault and strength"] if line[0] == "blur")
    assert blur[-2:] == ["1/2", "focal_length"]
    assert found["Healthy sets"][1][1].startswith("1/2 ")
    assert found["Healthy sets"][3][::2] == ["boxes: one record", "noisy"]


def test_intervals_are_wilsons() -> None:
    assert calibration.proportion([True] * 50 + [False] * 50) == "50/100 (40.4 to 59.6 %)"
    assert calibration.proportion([False] * 100) == "0/100 (0.0 to 3.7 %)"


@pytest.mark.parametrize("forward", [True, False])
def test_healthy_rooms_pass_whichever_way_they_face(forward: bool) -> None:
    pytest.importorskip("skimage")
    records = [calibration.room("blotches", [1, k], forward=forward, size=96) for k in range(2)]
    records[1] = calibration.rimmed(records[1], 0.05)
    said = validate(calibration.Sample(records), progress=False)
    assert said.passed, said.summary
