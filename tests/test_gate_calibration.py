"""The arithmetic of the calibration's tables, and its harder conditions from end to end."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import gate as calibration

from fresnel import faults
from fresnel.gate import validate


def row(fault: str, strength: float, codes: list[str], **more: Any) -> dict[str, Any]:
    known = {"source": "boxes", "condition": "10 records", "fault": fault, "strength": strength}
    return {**known, "codes": codes, "passed": not codes, **more}


def test_tables_count_practical_strengths_and_unpaired_faults_apart() -> None:
    rows = [row(f, p, [code]) for f, (code, p) in faults.EXPECTED.items()]
    rows += [row("darken", 0.1, []), row("blur", 1.0, ["focal_length"]), row("blur", 1.0, [])]
    rows += [row("rolled_off_centre", 1.0, ["principal_point"], condition="1 record")]
    rows += [row("", 0.0, []), row("", 0.0, ["noisy"], condition="1 record")]
    found = calibration.tables(rows)
    lines = {line[0]: line[1:] for line in found["By condition"]}
    every, paired = len(faults.EXPECTED), len(faults.EXPECTED) - len(faults.UNPAIRED)
    assert lines["all"][2].startswith(f"{every + 2}/{every + 3} ")
    assert lines["all"][3].startswith(f"{every + 1}/{every + 2} ")
    assert lines["all"][0].startswith("1/2 ") and lines["boxes: 1 record"][1] == "noisy 1"
    assert lines["boxes: 1 record"][3].startswith("1/1 ")
    mended = next(v for k, v in lines.items() if k.startswith("faults whose inverse"))
    assert mended[2].startswith(f"{paired + 1}/{paired + 2} ")
    blur = next(line for line in found["By fault"] if line[0] == "blur")
    assert blur[-3:] == ["2/3", "1/2", "focal_length 1"]


def test_every_fault_meets_every_condition_that_can_have_it(tmp_path: Path) -> None:
    for source in ("things", "things, decoded"):
        for views in ("8", "64"):
            (tmp_path / source / views).mkdir(parents=True)
    folders = [str(tmp_path / "things"), str(tmp_path / "things, decoded")]
    tasks = list(calibration.tasks_of(folders, 3, 1.0))
    assert tasks == list(calibration.tasks_of(folders, 3, 1.0))
    met = {(task.fault, task.condition) for task in tasks if task.source in ("things, decoded", "")}
    for condition in ("10 records", "100 records"):
        assert {fault for fault, at in met if at == condition} == {*faults.EXPECTED, ""}
    assert ("split_leak", "1 of 100") not in met and ("darken", "1 of 100") in met
    assert ("others_poses", "1 record") not in met and ("darken", "400 views") not in met


def test_intervals_are_wilsons() -> None:
    assert calibration.proportion([True] * 50 + [False] * 50) == "50/100 (40.4 to 59.6 %)"
    assert calibration.proportion([False] * 100) == "0/100 (0.0 to 3.7 %)"


@pytest.mark.parametrize("forward", [True, False])
def test_healthy_rooms_pass_whichever_way_they_face(forward: bool) -> None:
    pytest.importorskip("skimage")
    records = [calibration.room("blotches", [1, k], forward=forward, size=96) for k in range(2)]
    records = [calibration.rimmed(r, k1) for r, k1 in zip(records, (0.005, 0.05), strict=True)]
    said = validate(calibration.Sample(records, {}), progress=False)
    assert said.passed, said.summary
