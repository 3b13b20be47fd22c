"""A study: seeds, needs, sharing between processes, going on after a stop."""

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
import torch
from safetensors.torch import save_file

from fresnel.cli import main
from fresnel.report import run as report
from fresnel.report.record import slug
from fresnel.report.run import Run
from fresnel.study import runner as studies
from fresnel.study.runner import Step, StudyError

PARAMS = Path(__file__).parent.parent / "notebooks" / "params"
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
    steps = {step.name: step for step in studies.load(study)}
    assert list(steps) == ["data", "decoder-s0", "decoder-s1", "arm-s1", "arm-s2"]
    assert steps["decoder-s1"].params == {
        "steps": 100, "size": "base", "seed": 1, "export_to": "runs/decoder-s1.safetensors",
    }  # fmt: skip
    assert steps["decoder-s1"].needs == ("data",)
    assert steps["arm-s1"].needs == ("data", "decoder-s1")
    assert steps["arm-s2"].needs == ("data", "decoder-s0", "decoder-s1")
    elsewhere = studies.load(study, runs="/tmp/x")[2].params["export_to"]
    assert elsewhere == "/tmp/x/decoder-s1.safetensors"


def test_one_file_is_a_study_of_either_domain(study: Path) -> None:
    steps = [
        {"name": "decoder", "notebook": "x", "domain": "objects"},
        {"name": "arm", "notebook": "x", "needs": "decoder", "params": {"a": "{of}, {domain}"}},
    ]
    texts = {"objects": {"of": "{runs}/furniture"}, "faces": {"of": "heads"}}
    study.write_text(json.dumps({"domains": texts, "stages": {"": steps}}))
    decoder, arm = studies.load(study, domain="objects", runs="r")
    assert (decoder.name, arm.needs) == ("decoder", ("decoder",))
    assert arm.params == {"a": "r/furniture, objects"}
    (arm,) = studies.load(study, domain="faces")
    assert arm.needs == () and arm.params == {"a": "heads, faces"}
    study.write_text(json.dumps({"domains": {"faces": 3}, "stages": {"": steps}}))
    with pytest.raises(studies.StudyError, match="each domain in 'domains'"):
        studies.load(study)


def test_a_stage_does_all_steps_of_a_seed_before_those_of_the_next(study: Path) -> None:
    rows = (("a", [0, 1], []), ("b", [0, 1], "a"), ("all", [], "b"), ("c", [0], "all"))
    rows = [
        dict(zip(("name", "seeds", "needs"), r, strict=True)) for r in (*rows, ("free", [], []))
    ]
    study.write_text(json.dumps([{**row, "notebook": "x"} for row in rows]))
    names = [step.name for step in studies.load(study)]
    assert names == ["free", "a-s0", "b-s0", "a-s1", "b-s1", "all", "c-s0"]


def test_a_rehearsal_overrides_what_the_notebooks_have(study: Path) -> None:
    steps = studies.override(studies.load(study), {"steps": "4", "images": "8"})
    assert steps[0].params == {"images": 8}
    assert [step.params["steps"] for step in steps[1:]] == [4] * 4
    assert steps[1].params["size"] == "base" and steps[1].name == "decoder-s0"
    for wrong in ({"stepz": "4"}, {"seed": "1"}, {"steps": "many"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            studies.override(steps, wrong)


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
        studies.load(study)


class Runner:
    """Stands for `report.run`: writes what it leaves, and remembers what it was asked."""

    def __init__(self, study: Path) -> None:
        self.study, self.reports = study, study.parent / "reports"
        self.ran, self.params = list[str](), dict[str, Any]()
        self.failing, self.refused = set[str](), set[str]()
        self.during: Callable[[str], None] = lambda name: None

    @property
    def steps(self) -> list[Step]:
        return studies.load(self.study)

    def go(self, steps: list[Step] | None = None, **options: Any) -> list[str]:
        """The problems of a call."""
        return studies.run(self.steps if steps is None else steps, self.reports, **options)

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
def runner(study: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    made = Runner(study)
    monkeypatch.setattr(report, "run", made)
    monkeypatch.setattr(studies, "_WAIT_S", 0.01)
    return made


def test_steps_run_once_in_the_order_of_their_needs(runner: Runner) -> None:
    assert runner.go() == runner.go() == []
    assert runner.ran == ["data", "decoder-s0", "decoder-s1", "arm-s1", "arm-s2"]
    runner.study.write_text(runner.study.read_text().replace("steps: 100", "steps: 200"))
    assert runner.go(only=["decoder"]) == []
    assert runner.ran[5:] == ["decoder-s0", "decoder-s1"], "other parameters are another run"
    runner.go(only=["data"], fresh=True)
    assert runner.ran[7:] == ["data"]


def test_a_crash_stops_only_what_needs_it(runner: Runner) -> None:
    runner.failing, left_out = {"decoder-s0"}, "arm-s2 was left out: it needs decoder-s0."
    assert runner.go() == ["decoder-s0 crashed: it broke", left_out]
    assert runner.ran == ["data", "decoder-s0", "decoder-s1", "arm-s1"]
    for results in runner.reports.glob("runs/*/results.json"):
        results.write_text(re.sub(r"\d{4}-\d\d-\d\dT", "2000-01-01T", results.read_text()))
    runner.failing = set()
    assert runner.go() == [] and runner.ran[4:] == ["decoder-s0", "arm-s2"], "tried again later"
    runner.failing = {"decoder-s0"}
    assert runner.go(fresh=True)[-1] == left_out, "today's crash outweighs what finished before"


def test_what_crashed_twice_or_was_refused_beside_is_left_alone(runner: Runner) -> None:
    alone = [replace(step, needs=()) for step in runner.steps]
    runner.failing, runner.refused = {"decoder-s0"}, {"decoder-s1"}

    def meanwhile(name: str) -> None:
        if name == "data":
            runner.go(alone, only=["decoder"])
            runner.go(alone, only=["decoder-s0"])

    runner.during = meanwhile
    assert runner.go() == [
        "arm-s1 was left out: it needs decoder-s1.",
        "arm-s2 was left out: it needs decoder-s0, decoder-s1.",
    ]
    assert runner.ran == ["data", "decoder-s0", "decoder-s1", "decoder-s0"]


def test_an_unexpected_verdict_or_an_error_of_the_driver_stops_nothing(runner: Runner) -> None:
    def during(name: str) -> None:
        if name == "decoder-s0":
            raise OSError("no room")

    runner.during = during
    assert runner.go([replace(runner.steps[0], expect="FAIL"), *runner.steps[1:]]) == [
        "data ended with PASS, but FAIL was expected.",
        "decoder-s0: OSError: no room",
        "arm-s2 was left out: it needs decoder-s0.",
    ]
    assert runner.ran == ["data", "decoder-s0", "decoder-s1", "arm-s1"]


def test_weights_made_with_the_very_parameters_are_not_trained_again(runner: Runner) -> None:
    place = runner.study.parent / "decoder-s0.safetensors"
    steps = studies.load(runner.study, runs=place.parent)
    same = {"steps": 100, "size": "base", "seed": 0, "device": "cuda"}
    for params, trained in ((same | {"seed": 1}, True), (None, True), (same, False)):
        header = {"fresnel": json.dumps({"kind": "decoder", "params": params})}
        save_file({"weights": torch.zeros(1)}, place, header)
        assert studies.finished(steps[1], runner.reports) != trained
    assert runner.go(steps) == []
    assert runner.ran == ["data", "decoder-s1", "arm-s1", "arm-s2"]
    place.write_bytes(b"damaged")
    assert not studies.finished(steps[1], runner.reports)


def test_what_a_step_makes_ready_comes_before_what_follows(runner: Runner) -> None:
    """Another process finishes decoder-s1 while this one computes data; arm-s1 then comes first."""
    data, first, second, arm, _ = runner.steps

    def meanwhile(name: str) -> None:
        runner.during = lambda name: None
        runner.go([replace(second, needs=())])

    runner.during = meanwhile
    assert runner.go([data, second, arm, first]) == []
    assert runner.ran == ["data", "decoder-s1", "arm-s1", "decoder-s0"]


def test_two_processes_share_the_steps(runner: Runner) -> None:
    """While the first computes decoder-s0, the second finds all other work, and waits for none."""
    second = list[str]()

    def meanwhile(name: str) -> None:
        if name == "decoder-s0" and not second:
            second.append("began")
            before = len(runner.ran)
            assert runner.go(only=["decoder-s1", "arm-s1"]) == []
            second.extend(runner.ran[before:])
            runner.go(only=["decoder-s0"], stop_after_s=0.05)

    runner.during = meanwhile
    assert runner.go() == []
    assert second == ["began", "decoder-s1", "arm-s1"]
    assert sorted(runner.ran) == ["arm-s1", "arm-s2", "data", "decoder-s0", "decoder-s1"]


def test_what_cannot_run_is_found_before_anything_runs(
    runner: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runner.go(stop_after_s=0.0) == []
    assert "left for the next call: data" in capsys.readouterr().out
    with pytest.raises(StudyError, match="no step named nothing"):
        runner.go(only=["nothing"])
    bad = Step("bad", runner.steps[0].notebook, {"stepz": 3})
    with pytest.raises(StudyError, match="stepz"):
        runner.go([*runner.steps, bad])

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="lock"):  # rather than an endless wait
        runner.go()
    assert runner.ran == []


def test_the_command_lists_runs_and_reports_trouble(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(runner.study), "--reports", str(runner.reports)]
    assert main(["study", *common, "--only", "data"]) == 0
    assert main(["study", *common, "--list"]) == 0
    printed = capsys.readouterr().out
    assert "data\t01_validate_data.ipynb\tfinished" in printed and "arm-s2\t" in printed
    runner.failing = {"decoder-s1"}
    assert main(["study", *common]) == 1
    assert "decoder-s1 crashed: it broke" in capsys.readouterr().err
    assert main(["study", "gone.yaml"]) == 2


def test_a_profile_goes_on_after_a_crash_and_asks_the_cache_of_every_step(
    make_notebook: Callable[..., Path], runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    uses = make_notebook("uses", "print(folder)", parameters='folder = ""  # of a run')
    steps = [
        Step("the control", uses, expect="FAIL"),
        Step("broken", uses),
        Step("after", uses, needs=("broken",)),
        Step("story", uses, {"folder": "{run:the control}"}, expect="GO"),
    ]
    runner.failing, wrong = {"broken"}, "story ended with PASS, but GO was expected."
    assert runner.go(steps, keep_finished=False) == [
        "the control ended with PASS, but FAIL was expected.",
        "broken crashed: it broke",
        wrong,
        "after was left out: it needs broken.",
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line[:5] for line in lines] == ["[1/4]", "[2/4]", "[4/4]", "[3/4]"]
    (folder,) = (runner.reports / "runs").glob("*-the-control-*")
    assert runner.params["story"]["folder"] == str(folder.resolve())
    assert studies.finished(steps[0], runner.reports), "a name with a space"
    assert (runner.reports / "index.html").is_file()
    assert runner.go(steps, only=["story"], keep_finished=False) == [wrong]
    assert runner.ran[3:] == ["story"], "what it refers to is looked up"
    assert runner.go(steps, only=["the control", "story"]) == []
    assert len(runner.ran) == 4, "a study keeps what is finished"


SHIPPED = pytest.mark.parametrize("domain", ["objects", "faces"])


@SHIPPED
def test_the_study_that_ships_names_real_parameters(domain: str) -> None:
    steps = studies.load(PARAMS / "study.yaml", domain=domain)
    for step in steps:
        report.check_parameters(report.read_parameters(step.notebook), step.params)
        assert step.expect in {"PASS", "FAIL", "GO", "NO-GO", "DONE", None}
    json.dumps([dict(step.params) for step in steps])


@SHIPPED
def test_the_study_that_ships_needs_whatever_it_reads(domain: str) -> None:
    """Weights and data of a step are made by a step that it needs, directly or not."""
    steps = {step.name: step for step in studies.load(PARAMS / "study.yaml", domain=domain)}
    assert ("03-decoder-A-s0" in steps) == (domain == "objects")
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
            given = step.params.get(parameter, "")
            if given and not given.startswith("fresnel/assets/"):
                assert made[step.params[parameter]] in needed(name), (name, parameter)
        if name.startswith("03-") and step.params["model"].startswith("cvs"):
            smoked = {steps[need].params["dataset_dir"] for need in needed(name) if "02-" in need}
            assert step.params["dataset_dir"] in smoked, name
        if name.startswith("02-"):  # where the gate is in force: see `cvs` in the file
            control = name.startswith("02-original")
            assert step.params.get("allow_failed_gate", False) == control
