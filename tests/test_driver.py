"""A study: seeds, needs, sharing between processes, going on after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fresnel import driver, report
from fresnel.__main__ import main
from fresnel.profiles import ProfileError, Step
from fresnel.report import Run

STUDY = """
anchors:
  long: &long {steps: 100, size: base}
steps:
  - {name: data, notebook: notebooks/01_validate_data.ipynb}
  - name: decoder
    notebook: notebooks/03_full_train.ipynb
    seeds: [0, 1]
    needs: data
    params: {<<: *long, export_to: "runs/decoder-s{seed}.safetensors"}
  - name: arm
    notebook: notebooks/03_full_train.ipynb
    seeds: [1, 2]
    needs: [data, decoder]
    params: {<<: *long, decoder_weights: runs/decoder-s0.safetensors}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return path


def test_seeds_become_steps_that_need_their_own_kind(study: Path) -> None:
    steps = {step.name: step for step in driver.load(study)}
    assert list(steps) == ["data", "decoder-s0", "decoder-s1", "arm-s1", "arm-s2"]
    assert steps["decoder-s1"].params == {
        "steps": 100, "size": "base", "seed": 1, "export_to": "runs/decoder-s1.safetensors",
    }  # fmt: skip
    assert steps["decoder-s1"].needs == ("data",)
    assert steps["arm-s1"].needs == ("data", "decoder-s1")
    assert steps["arm-s2"].needs == ("data", "decoder-s0", "decoder-s1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{}", "a mapping with 'steps'"),
        ("- {name: a}", "needs 'name' and 'notebook'"),
        ("- {name: a, notebook: x.ipynb, needs: b}", "no step before it"),
    ],
)
def test_what_is_no_study_is_said(study: Path, change: str, message: str) -> None:
    study.write_text(change)
    with pytest.raises(ProfileError, match=message):
        driver.load(study)


class Runner:
    """Stands for `report.run`: writes what it leaves, and remembers what it was asked."""

    def __init__(self, reports: Path) -> None:
        self.reports, self.ran, self.failing = reports, list[str](), set[str]()
        self.during: Callable[[str], None] = lambda name: None

    def __call__(self, notebook: Path, params: Any, name: str, *_: Any, **options: Any) -> Run:
        self.ran.append(name)
        self.during(name)
        folder = self.reports / "runs" / f"2026Z-{name}-{len(self.ran)}"
        folder.mkdir(parents=True)
        crashed = name in self.failing
        record = report.RunRecord(
            notebook.stem, "crashed" if crashed else "finished", None if crashed else "PASS",
            name=name, params={**params, "device": "auto"}, error="it broke" if crashed else None,
        )  # fmt: skip
        record.write(folder)
        return Run(record, folder)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    made = Runner(tmp_path / "reports")
    monkeypatch.setattr(report, "run", made)
    monkeypatch.setattr(driver, "_WAIT_S", 0.01)
    return made


def test_steps_run_once_in_the_order_of_their_needs(study: Path, runner: Runner) -> None:
    steps = driver.load(study)
    assert driver.run(steps, runner.reports) == []
    assert runner.ran == ["data", "decoder-s0", "decoder-s1", "arm-s1", "arm-s2"]
    assert driver.run(steps, runner.reports) == [] and len(runner.ran) == 5
    text = study.read_text().replace("steps: 100", "steps: 200")
    study.write_text(text)
    assert driver.run(driver.load(study), runner.reports, only=["decoder"]) == []
    assert runner.ran[5:] == ["decoder-s0", "decoder-s1"], "other parameters are another run"
    driver.run(driver.load(study), runner.reports, only=["data"], fresh=True)
    assert runner.ran[7:] == ["data"]


def test_a_crash_stops_only_what_needs_it(study: Path, runner: Runner) -> None:
    runner.failing = {"decoder-s0"}
    problems = driver.run(driver.load(study), runner.reports)
    assert runner.ran == ["data", "decoder-s0", "decoder-s1", "arm-s1"]
    assert problems == [
        "decoder-s0: it broke",
        "left out, as what they need is not finished: arm-s2",
    ]


def test_two_processes_share_the_steps(study: Path, runner: Runner) -> None:
    """While the first computes decoder-s0, the second finds all other work, and waits for none."""
    steps = driver.load(study)
    second = list[str]()

    def meanwhile(name: str) -> None:
        if name == "decoder-s0" and not second:
            second.append("began")
            before = len(runner.ran)
            assert driver.run(steps, runner.reports, only=["decoder-s1", "arm-s1"]) == []
            second.extend(runner.ran[before:])
            with driver._mine(runner.reports, "decoder-s0") as mine:
                assert not mine

    runner.during = meanwhile
    assert driver.run(steps, runner.reports) == []
    assert second == ["began", "decoder-s1", "arm-s1"]
    assert sorted(runner.ran) == ["arm-s1", "arm-s2", "data", "decoder-s0", "decoder-s1"]


def test_time_that_is_up_leaves_the_rest_for_the_next_call(
    study: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert driver.run(driver.load(study), runner.reports, stop_after_s=0.0) == []
    assert runner.ran == [] and "left for the next call: data" in capsys.readouterr().out


def test_unknown_parameters_and_steps_are_found_before_anything_runs(
    study: Path, runner: Runner
) -> None:
    steps = driver.load(study)
    with pytest.raises(ProfileError, match="no step named nothing"):
        driver.run(steps, runner.reports, only=["nothing"])
    bad = Step("bad", steps[0].notebook, {"stepz": 3})
    with pytest.raises(ProfileError, match="stepz"):
        driver.run([*steps, bad], runner.reports)
    assert runner.ran == []


def test_the_command_lists_runs_and_reports_trouble(
    study: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(study), "--reports", str(runner.reports)]
    assert main(["study", *common, "--only", "data"]) == 0
    assert main(["study", *common, "--list"]) == 0
    printed = capsys.readouterr().out
    assert "data\t01_validate_data.ipynb\tfinished" in printed and "arm-s2\t" in printed
    runner.failing = {"decoder-s1"}
    assert main(["study", *common]) == 1
    assert "decoder-s1: it broke" in capsys.readouterr().err
    assert main(["study", "gone.yaml"]) == 2


def test_the_studies_that_ship_name_real_parameters() -> None:
    folder = Path(__file__).parent.parent / "notebooks" / "params"
    studies = sorted(folder.glob("study_*.yaml"))
    assert studies
    for path in studies:
        steps = driver.load(path)
        for step in steps:
            report.check_parameters(report.read_parameters(step.notebook), step.params)
            assert step.expect in {"PASS", "FAIL", "GO", "NO-GO", "DONE", None}
        assert yaml.safe_load(path.read_text()) and json.dumps([dict(s.params) for s in steps])
