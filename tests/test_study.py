"""A study: seeds, needs, sharing between processes, going on after a stop."""

from __future__ import annotations

import errno
import fcntl
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fresnel.cli import main
from fresnel.report import run as report
from fresnel.report.record import slug
from fresnel.report.run import Run
from fresnel.study import runner as study_runner
from fresnel.study.runner import Step, StudyError

SHIPPED = Path(__file__).parent.parent / "notebooks" / "params" / "study.yaml"
STUDY = """
anchors:
  long: &long {steps: 100, size: base}
stages:
  decoders:
    - {name: data, notebook: notebooks/01_validate_data.ipynb}
    - name: decoder
      notebook: notebooks/03_full_train.ipynb
      seeds: [0, 1]
      needs: data
      params: {<<: *long, export_to: "{runs}/decoder-s{seed}.safetensors"}
  arms:
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
    steps = {step.name: step for step in study_runner.load(study)}
    assert list(steps) == ["data", "decoder-s0", "decoder-s1", "arm-s1", "arm-s2"]
    assert steps["decoder-s1"].params == {
        "steps": 100, "size": "base", "seed": 1, "export_to": "runs/decoder-s1.safetensors",
    }  # fmt: skip
    assert steps["decoder-s1"].needs == ("data",)
    assert steps["arm-s1"].needs == ("data", "decoder-s1")
    assert steps["arm-s2"].needs == ("data", "decoder-s0", "decoder-s1")
    elsewhere = study_runner.load(study, runs="/tmp/x")[2].params["export_to"]
    assert elsewhere == "/tmp/x/decoder-s1.safetensors"


def test_a_stage_does_all_steps_of_a_seed_before_those_of_the_next(study: Path) -> None:
    line = "{{name: {}, notebook: notebooks/03_full_train.ipynb, seeds: {}, needs: {}}}"
    study.write_text(
        "\n- ".join(
            [
                "- " + line.format("a", [0, 1], []),
                line.format("b", [0, 1], "a"),
                line.format("all", [], "b"),
                line.format("c", [0], "all"),
                line.format("free", [], []),
            ]
        )
    )
    names = [step.name for step in study_runner.load(study)]
    assert names == ["free", "a-s0", "b-s0", "a-s1", "b-s1", "all", "c-s0"]


def test_a_rehearsal_overrides_what_the_notebooks_have(study: Path) -> None:
    steps = study_runner.override(study_runner.load(study), {"steps": "4", "images": "8"})
    assert steps[0].params == {"images": 8}
    assert [step.params["steps"] for step in steps[1:]] == [4] * 4
    assert steps[1].params["size"] == "base" and steps[1].name == "decoder-s0"
    for wrong in ({"stepz": "4"}, {"seed": "1"}, {"steps": "many"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            study_runner.override(steps, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{}", "lists of them in 'stages'"),
        ("stages: {a: 3}", "lists of them in 'stages'"),
        ("stages: {a: []}", "lists of them in 'stages'"),
        ("- {name: a}", "missing required field `notebook`"),
        ("- {name: a, notebook: x, parms: {}}", "unknown field `parms`"),
        ("- {name: a, notebook: x, needs: b}", "a needs b, no step before it"),
        ("- {name: a, notebook: x}\n- {name: a, notebook: x}", "two steps have the same name"),
        ("- {", "not valid YAML"),
    ],
)
def test_what_is_no_study_is_said(study: Path, change: str, message: str) -> None:
    study.write_text(change)
    with pytest.raises(StudyError, match=message):
        study_runner.load(study)


class Runner:
    """Stands for `report.run`: writes what it leaves, and remembers what it was asked."""

    def __init__(self, reports: Path) -> None:
        self.reports, self.ran, self.params = reports, list[str](), dict[str, Any]()
        self.failing, self.refused = set[str](), set[str]()
        self.during: Callable[[str], None] = lambda name: None

    def __call__(self, notebook: Path, params: Any, name: str, *_: Any, **options: Any) -> Run:
        self.ran.append(name)
        self.params[name] = params
        self.during(name)
        folder = self.reports / "runs" / f"2026Z-{slug(name)}-{len(self.ran)}"
        folder.mkdir(parents=True)
        crashed = name in self.failing
        verdict = "REFUSED" if name in self.refused else "PASS"
        record = report.RunRecord(
            notebook.stem, "crashed" if crashed else "finished", None if crashed else verdict,
            name=name, params={**params, "device": "auto"}, error="it broke" if crashed else None,
            started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        record.write(folder)
        return Run(record, folder)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    made = Runner(tmp_path / "reports")
    monkeypatch.setattr(report, "run", made)
    monkeypatch.setattr(study_runner, "_WAIT_S", 0.01)
    return made


def test_steps_run_once_in_the_order_of_their_needs(study: Path, runner: Runner) -> None:
    steps = study_runner.load(study)
    assert study_runner.run(steps, runner.reports) == []
    assert runner.ran == ["data", "decoder-s0", "decoder-s1", "arm-s1", "arm-s2"]
    assert study_runner.run(steps, runner.reports) == [] and len(runner.ran) == 5
    text = study.read_text().replace("steps: 100", "steps: 200")
    study.write_text(text)
    assert study_runner.run(study_runner.load(study), runner.reports, only=["decoder"]) == []
    assert runner.ran[5:] == ["decoder-s0", "decoder-s1"], "other parameters are another run"
    study_runner.run(study_runner.load(study), runner.reports, only=["data"], fresh=True)
    assert runner.ran[7:] == ["data"]


def test_a_crash_stops_only_what_needs_it(study: Path, runner: Runner) -> None:
    runner.failing = {"decoder-s0"}
    problems = study_runner.run(study_runner.load(study), runner.reports)
    assert runner.ran == ["data", "decoder-s0", "decoder-s1", "arm-s1"]
    assert problems == [
        "decoder-s0 crashed: it broke",
        "arm-s2 was left out: it needs decoder-s0.",
    ]
    for results in runner.reports.glob("runs/*/results.json"):
        results.write_text(re.sub(r"\d{4}-\d\d-\d\dT", "2000-01-01T", results.read_text()))
    study_runner.run(study_runner.load(study), runner.reports)
    assert runner.ran[4:] == ["decoder-s0"], "a later call tries again"


def test_a_crash_today_outweighs_what_finished_before(study: Path, runner: Runner) -> None:
    steps = study_runner.load(study)
    assert study_runner.run(steps, runner.reports) == []
    runner.failing = {"decoder-s0"}
    problems = study_runner.run(steps, runner.reports, fresh=True)
    assert problems[-1] == "arm-s2 was left out: it needs decoder-s0."
    assert runner.ran[5:] == ["data", "decoder-s0", "decoder-s1", "arm-s1"]


def test_what_crashed_twice_or_was_refused_beside_is_left_alone(
    study: Path, runner: Runner
) -> None:
    steps = study_runner.load(study)
    runner.failing, runner.refused = {"decoder-s0"}, {"decoder-s1"}
    alone = [replace(step, needs=()) for step in steps]

    def meanwhile(name: str) -> None:
        if name == "data":
            study_runner.run(alone, runner.reports, only=["decoder"])
            study_runner.run(alone, runner.reports, only=["decoder-s0"])

    runner.during = meanwhile
    problems = study_runner.run(steps, runner.reports)
    assert runner.ran == ["data", "decoder-s0", "decoder-s1", "decoder-s0"]
    assert problems == [
        "arm-s1 was left out: it needs decoder-s1.",
        "arm-s2 was left out: it needs decoder-s0, decoder-s1.",
    ]


def test_an_unexpected_verdict_or_an_error_of_the_driver_stops_nothing(
    study: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [
        replace(step, expect="FAIL" if step.name == "data" else None)
        for step in study_runner.load(study)
    ]

    def run(notebook: Path, params: Any, name: str, *given: Any, **options: Any) -> Run:
        if name == "decoder-s0":
            raise OSError("no room")
        return runner(notebook, params, name, *given, **options)

    monkeypatch.setattr(report, "run", run)
    assert study_runner.run(steps, runner.reports) == [
        "data ended with PASS, but FAIL was expected.",
        "decoder-s0: OSError: no room",
        "arm-s2 was left out: it needs decoder-s0.",
    ]
    assert runner.ran == ["data", "decoder-s1", "arm-s1"]


def test_what_a_step_makes_ready_comes_before_what_follows(study: Path, runner: Runner) -> None:
    """Another process finishes decoder-s1 while this one computes data; arm-s1 then comes first."""
    steps = {step.name: step for step in study_runner.load(study)}
    order = [steps["data"], steps["decoder-s1"], steps["arm-s1"], steps["decoder-s0"]]

    def meanwhile(name: str) -> None:
        if name == "data":
            runner.during = lambda name: None
            study_runner.run([replace(order[1], needs=())], runner.reports)

    runner.during = meanwhile
    assert study_runner.run(order, runner.reports) == []
    assert runner.ran == ["data", "decoder-s1", "arm-s1", "decoder-s0"]


def test_two_processes_share_the_steps(study: Path, runner: Runner) -> None:
    """While the first computes decoder-s0, the second finds all other work, and waits for none."""
    steps = study_runner.load(study)
    second = list[str]()

    def meanwhile(name: str) -> None:
        if name == "decoder-s0" and not second:
            second.append("began")
            before = len(runner.ran)
            assert study_runner.run(steps, runner.reports, only=["decoder-s1", "arm-s1"]) == []
            second.extend(runner.ran[before:])
            study_runner.run(steps, runner.reports, only=["decoder-s0"], stop_after_s=0.05)

    runner.during = meanwhile
    assert study_runner.run(steps, runner.reports) == []
    assert second == ["began", "decoder-s1", "arm-s1"]
    assert sorted(runner.ran) == ["arm-s1", "arm-s2", "data", "decoder-s0", "decoder-s1"]


def test_time_that_is_up_leaves_the_rest_for_the_next_call(
    study: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study_runner.run(study_runner.load(study), runner.reports, stop_after_s=0.0) == []
    assert runner.ran == [] and "left for the next call: data" in capsys.readouterr().out


def test_unknown_parameters_and_steps_are_found_before_anything_runs(
    study: Path, runner: Runner
) -> None:
    steps = study_runner.load(study)
    with pytest.raises(StudyError, match="no step named nothing"):
        study_runner.run(steps, runner.reports, only=["nothing"])
    bad = Step("bad", steps[0].notebook, {"stepz": 3})
    with pytest.raises(StudyError, match="stepz"):
        study_runner.run([*steps, bad], runner.reports)
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
    assert "decoder-s1 crashed: it broke" in capsys.readouterr().err
    assert main(["study", "gone.yaml"]) == 2


def test_a_profile_goes_on_after_a_crash_and_asks_the_cache_of_every_step(
    make_notebook: Callable[..., Path], runner: Runner, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    uses = str(make_notebook("uses", "print(folder)", parameters='folder = ""  # of a run'))
    file = tmp_path / "profile.yaml"
    entries = [
        {"name": "the control", "notebook": uses, "expect": "FAIL"},
        {"name": "broken", "notebook": uses},
        {"name": "after", "notebook": uses, "needs": "broken"},
        {
            "name": "story",
            "notebook": uses,
            "params": {"folder": "{run:the control}"},
            "expect": "GO",
        },
    ]
    file.write_text(json.dumps(entries))
    steps = study_runner.load(file)
    runner.failing = {"broken"}
    problems = study_runner.run(steps, runner.reports, keep_finished=False)
    assert problems == [
        "the control ended with PASS, but FAIL was expected.",
        "broken crashed: it broke",
        "story ended with PASS, but GO was expected.",
        "after was left out: it needs broken.",
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line[:5] for line in lines] == ["[1/4]", "[2/4]", "[4/4]", "[3/4]"]
    (folder,) = (runner.reports / "runs").glob("*-the-control-*")
    assert runner.params["story"]["folder"] == str(folder.resolve())
    assert study_runner.finished(steps[0], runner.reports), "a name with a space"
    assert (runner.reports / "index.html").is_file()
    ran = len(runner.ran)
    problems = study_runner.run(steps, runner.reports, only=["story"], keep_finished=False)
    assert problems == ["story ended with PASS, but GO was expected."]
    assert runner.ran[ran:] == ["story"], "what it refers to is looked up"
    again = study_runner.run(steps, runner.reports, only=["the control", "story"])
    assert again == [] and runner.ran[ran + 1 :] == [], "a study keeps what is finished"


def test_a_folder_that_cannot_lock_is_an_error_not_an_endless_wait(
    study: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="lock"):
        study_runner.run(study_runner.load(study), runner.reports)


def test_the_studies_that_ship_name_real_parameters() -> None:
    steps = study_runner.load(SHIPPED)
    for step in steps:
        report.check_parameters(report.read_parameters(step.notebook), step.params)
        assert step.expect in {"PASS", "FAIL", "GO", "NO-GO", "DONE", None}
    json.dumps([dict(step.params) for step in steps])


def test_the_study_that_ships_needs_whatever_it_reads() -> None:
    """Weights and data of a step are made by a step that it needs, directly or not."""
    steps = {step.name: step for step in study_runner.load(SHIPPED)}
    made = {step.params.get("export_to"): name for name, step in steps.items()}
    made |= {
        s.params["dataset_dir"]: n
        for n, s in steps.items()
        if s.params.get("preset", "none") != "none"
    }
    made |= {s.params["source"]: n for n, s in steps.items() if s.params.get("preset") == "none"}

    def needed(name: str) -> set[str]:
        return {name}.union(*(needed(need) for need in steps[name].needs))

    for name, step in steps.items():
        for parameter in ("decoder_weights", "dataset_dir", "truth_source", "source"):
            if step.params.get(parameter):
                assert made[step.params[parameter]] in needed(name), (name, parameter)
        if name.startswith("03-") and step.params["model"].startswith("cvs"):
            smoked = {steps[need].params["dataset_dir"] for need in needed(name) if "02-" in need}
            assert step.params["dataset_dir"] in smoked, name
        if name.startswith("02-"):  # where the gate is in force: see `cvs` in the file
            control = name.startswith("02-original")
            assert step.params.get("allow_failed_gate", False) == control
