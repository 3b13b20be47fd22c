"""Targets, timeline and costs against a study whose figures are known, and notebook 04 over it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import synthetic

from fresnel.analysis import claims as autopsy
from fresnel.analysis import comparison, limits, targets, timeline
from fresnel.analysis.comparison import BINS, Estimate
from fresnel.analysis.targets import Target
from fresnel.report import run as report
from fresnel.show import charts as figures_study
from fresnel.show import style as figures
from fresnel.study import runner as driver

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "04_analyze_negative_results.ipynb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study")
    synthetic.write_study(path)
    return path


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    return comparison.newest_runs(folder)


def found(runs: dict[str, Any], **changed: Any) -> dict[str, targets.Target]:
    study = comparison.study_runs(runs) | changed
    listed = targets.targets(study, runs, autopsy.roles(runs))
    return {target.text: target for target in listed}


def test_a_known_study_gets_its_verdicts(runs: dict[str, Any]) -> None:
    by_text = found(runs)
    verdicts = {text: target.verdict for text, target in by_text.items()}
    assert len(verdicts) == 12
    assert verdicts["the decoder: copying the input + 3 dB"] == "met"  # 19.8 + 0.1 - 16
    assert verdicts["the decoder's aim: + 4 dB"].startswith("missed (over white: every bin")
    assert verdicts["the gated bootstrap within 0.5 dB of true views"] == "met"
    assert verdicts["the same, the decoder saw 50 objects"].startswith("missed")
    assert verdicts["above the truth alone where that is scarce"] == "met"
    best = next(t for text, t in by_text.items() if text.startswith("the best CVS"))
    assert best.who == "oracle-any - decoder render" and best.verdict == "met"
    assert all(v == "met" for text, v in verdicts.items() if "control" in text or "gate" in text)
    gap = by_text["the gated bootstrap within 0.5 dB of true views"].rows["over white"]["60-90"]
    assert gap.mean == pytest.approx(-0.3, abs=1e-3) and gap.low <= -0.3 <= gap.high
    assert gap.sd == pytest.approx(0.0, abs=1e-3) and len(gap.seeds) == 3
    table = targets.targets_table(list(by_text.values()))
    assert table.count("3 seeds") == 12 and "chosen as best" in table
    assert targets.detail_table(list(by_text.values())).count("over white, dB") == 6


def test_a_missed_target_says_what_an_experiment_found(
    runs: dict[str, Any], tmp_path: Path
) -> None:
    study, reached = comparison.study_runs(runs), list(found(runs).values())
    # without the benchmarks the study itself says why a bootstrap falls behind
    alone = limits.table(study, reached, tmp_path)
    assert alone.count("\n") == 2 and "by decoder-A50, +2.7 to +2.7 dB above" in alone
    row = {"seeds": 3, "psnr": [3.0, 3.1, 3.2, 3.3]}
    more = {"seeds": 3, "psnr": [3.5, 3.5, 3.5, 3.5]}
    best = reached[1].who.partition(" - ")[0]
    rows = {f"{best}, each alone": row, f"{best}, their mean": more}
    (tmp_path / "decoder_spread.json").write_text(json.dumps({"128": {"rows": rows}}))
    text = limits.table(study, reached, tmp_path)
    assert "+3.5 / +3.5 / +3.5 / +3.5 dB above" in text and "alone +3.0 / +3.1" in text
    twins = {
        "twins, each alone": row,
        "the mean of these 3": {"psnr": [3.01, 3.11, 3.2, 3.3]},
        "the twin that ships": {"light": [0.9, 0.85], "encoded": [1.0, 1.1]},
        "true views, blurred by 1 px": {"light": [0.88, 0.88], "encoded": [1.0, 1.0]},
    }
    (tmp_path / "twin_limits.json").write_text(json.dumps({"rows": twins}))
    missed = Target("the best CVS, one step", "twin - decoder render", *_missed())
    dark = Target("light: 0.9 to 1.1", "twin", *_missed())
    text = limits.table(study, [missed, dark], tmp_path)
    assert "the views of 3 gains 0.00 to 0.01 dB" in text and "theirs gains 0.20 to 0.50" in text
    assert "holds 1.00 to 1.10 of the truth, in linear light 0.85 to 0.90" in text
    assert "blurred by 1 px hold 1.00 and 0.88" in text
    (tmp_path / "twin_limits.json").write_text("{")
    with pytest.raises(ValueError, match=r"twin_limits\.json: no JSON"):
        limits.table(study, [missed], tmp_path)


def _missed() -> tuple[dict[str, dict[str, Estimate]], dict[str, tuple[float, float]]]:
    return {"": dict.fromkeys(BINS, Estimate(0.0, (0.0,)))}, dict.fromkeys(BINS, (1.0, 2.0))


def test_a_target_is_missed_where_one_bin_is(runs: dict[str, Any]) -> None:
    band = dict.fromkeys(BINS, (-0.5, math.inf))
    level = dict.fromkeys(BINS, Estimate(0.0, (0.0, 0.1), -0.2, 0.2))
    target = targets.Target("t", "a - b", {"over white": level}, band)
    assert target.verdict == "met" and target.certain and target.seeds == 2
    below = {**level, "60-90": Estimate(-0.6, (-0.6,), -0.7, -0.4)}
    target = targets.Target("t", "a - b", {"over white": level, "over black": below}, band)
    assert target.verdict == "missed (over black: 60-90)" and target.seeds == 1
    assert "-0.60 [-0.70," in targets.targets_table([target])
    unsure = {**level, "0-30": Estimate(-0.4, (-0.4, -0.4), -0.8, 0.1)}
    target = targets.Target("t", "a - b", {"over white": unsure}, band)
    assert target.verdict == "met" and not target.certain
    assert "its intervals reach beyond" in targets.targets_table([target])
    unknown = dict.fromkeys(BINS, Estimate(math.nan))
    assert targets.Target("t", "a - b", {"": unknown}, band).verdict == "not run"


def test_without_runs_no_target_is_met() -> None:
    listed = targets.targets({}, {}, {})
    assert {target.verdict for target in listed[:6]} == {"not run"}
    assert {target.verdict for target in listed} == {"not run"}
    assert targets.targets_table(listed).count("**not run**") == 12
    assert timeline.stages_table({}) == "No run has finished."


def test_a_control_that_the_gate_let_through_was_not_refused(runs: dict[str, Any]) -> None:
    through = {**runs, "01-original-B-s1": {**runs["01-original-B-s1"], "verdict": "PASS"}}
    assert found(through)["the gate refuses it in seconds"].verdict != "met"


def test_the_study_file_has_what_the_analysis_looks_for() -> None:
    names = {step.name for step in driver.load(NOTEBOOK.parent / "params" / "study.yaml")}
    runs = {name: {"name": name} for name in names}
    study = comparison.study_runs(runs)
    arms = {arm for arm in study if not arm.startswith("loss-")}
    assert arms == set(comparison.ARMS), "each arm is described, and each described one is run"
    for cell in itertools.product(
        ("original", "corrected"), ("laplacian", "alpha"), ("onestep", "consistency")
    ):
        assert len(comparison.loss_cell(study, *cell)) == 3, cell
    assert all(autopsy.roles(runs).values()), (
        "a run of the study stands in for each of the main job"
    )
    assert set(synthetic.LEVELS) == set(study), "the made-up study is this one"


def test_study_runs_speak_where_the_main_job_has_not(runs: dict[str, Any]) -> None:
    roles = autopsy.roles(runs)
    assert roles["03-control"] and roles["03-control"]["name"] == "03-original-s0"
    assert "01-corrected (01-bootstrap-B-s0)" in autopsy.runs_table(roles)
    main = {**runs, "x-03-control": {**runs["03-original-s0"], "name": "x-03-control"}}
    chosen = autopsy.roles(main, "x-")["03-control"]
    assert chosen and chosen["name"] == "x-03-control"


def test_pictures_are_shown_where_they_are(runs: dict[str, Any], tmp_path: Path) -> None:
    roles = autopsy.roles(runs)
    assert set(autopsy.pictures(roles, "views", 3)) == {"01-original", "01-corrected"}
    sheet = autopsy.pictures(roles, "held_out", 1)["03-control"]
    assert sheet.shape == (24 + 134, 900, 3)
    alone = {role: run and {**run, "folder": str(tmp_path)} for role, run in roles.items()}
    assert autopsy.pictures(alone, "views", 3) == {}, "a results.json alone"


def test_the_timeline_ends_at_the_gate(runs: dict[str, Any]) -> None:
    roles = autopsy.roles(runs)
    stop = timeline.first_stop(roles)
    assert stop["hours"] * 3600 == pytest.approx(72.9) and stop["usd_saved"] == 6.0
    table = timeline.timeline_table(roles)
    assert (
        table.splitlines()[2].endswith("stops it after 73\N{NO-BREAK SPACE}s |")
        and table.count("stops") == 1
    )
    assert timeline.spans()[-1]["ended"] == 5.25, "the report's rows sum to less than its total"
    assert math.isnan(timeline.first_stop({})["hours"])
    text = timeline.describe_timeline(roles)
    assert "73 s after its start" in text and "Cloud training (150 epochs): 2.5 h, $5" in text
    ours = timeline.ours(roles)
    assert list(ours.values()) == [460.0, 460.0]
    for hours in (stop["hours"], math.nan):
        figure = figures_study.timeline(timeline.spans(), hours, ours)
        words = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert any("73 s" in word for word in words) == math.isfinite(hours)
        assert figures.to_png(figure, 40)


def test_costs_are_summed_and_priced(runs: dict[str, Any]) -> None:
    table = timeline.cost_table(autopsy.roles(runs), runs)
    total = table.splitlines()[-1]
    seconds = 108 * 360 + 6 * 60 + 6 * 40
    assert "5.5 h, $6" in total and "460 s, $0.46" in total
    assert f"{seconds / 3600:.1f} h, ${seconds / 1000:.2f}" in total
    dearer = timeline.cost_table(autopsy.roles(runs), runs, 36.0).splitlines()[-1]
    assert f"${seconds / 100:.2f}" in dearer
    stages = timeline.stages_table(runs)
    train = next(line for line in stages.splitlines() if "| train |" in line)
    assert train == "| 03_full_train | train | 108 | 8.6 h | 31.10 |"


def test_arms_stand_beside_what_needs_no_training(runs: dict[str, Any]) -> None:
    study = comparison.study_runs(runs)
    rows = comparison.by_bin(study, "psnr")
    assert list(rows)[-4:] == list(comparison.BASELINES.values())
    assert rows["gated"]["0-30"].mean == pytest.approx(19.7) and rows["gated"]["0-30"].low < 19.7
    assert rows["black image"]["0-30"].low < 13.0 < rows["black image"]["0-30"].high
    assert rows["copy the input"]["90-180"].mean == pytest.approx(16.0 - 3 * 0.8)
    figure = figures_study.dots(rows, label="dB", apart=tuple(comparison.BASELINES.values()))
    assert len(figure.axes) == len(BINS) and figures.to_png(figure, 40)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert "9.1" in words, "what lies far from the rest stands at the edge with its value"
    gaps = comparison.contrasts(study)
    assert len(gaps) == len(comparison.CONTRASTS)
    assert gaps["rest50-gated - A50-only"]["all"].mean == pytest.approx(0.9, abs=1e-3)
    assert comparison.contrasts({"gated": study["gated"]}).keys() == {
        "gated - decoder's own render"
    }
    steps = comparison.steps_table({"gated": study["gated"]}).replace("\N{NO-BREAK SPACE}", " ")
    assert "+0.20 ± 0.00" in steps and "+0.40 ± 0.00" in steps


def test_notebook_04_tells_the_whole_story(folder: Path, tmp_path: Path) -> None:
    parameters = {
        "reports_dir": str(folder), "attribution_objects": 2, "attribution_size": 32,
        "price_per_hour_usd": 3.6,
    }  # fmt: skip
    done = report.run(NOTEBOOK, parameters, "04", tmp_path, progress=False)
    assert not done.crashed, done.record.error
    assert done.record.verdict == "DONE" and done.record.metrics["missing_runs"] == []
    assert "10 met, 2 missed, 0 not run" in done.record.summary
    assert "open" not in done.record.metrics["claims"].values()
    gap = done.record.metrics["differences_db"]["gated - oracle"]["all"]
    assert gap["mean"] == pytest.approx(-0.3, abs=1e-3)
    page = done.report.read_text()
    for text in ("@software", "check-fresnel-gate-validate", "Objects pictured", "Chair"):
        assert text in page


def test_runs_that_share_a_machine_cost_its_time_once() -> None:
    def run(minute: int, duration_s: float, machine: str) -> dict[str, Any]:
        return {
            "started_utc": f"2026-01-01T00:{minute:02}:00+00:00", "duration_s": duration_s,
            "price_per_hour_usd": 3.6, "provenance": {"gpu": machine},
        }  # fmt: skip

    shared = {"a": run(0, 300, "x"), "b": run(1, 120, "x"), "c": run(4, 120, "x")}
    assert timeline.occupied(shared).endswith("machine for 540 s; as they shared it, it was held "
                                              "for 360 s, at $0.36.")  # fmt: skip
    apart = {**shared, "d": run(2, 100, "y")}
    assert "held for 460 s, at $4.60" in timeline.occupied(apart, 36.0)


def test_decoders_stand_by_what_they_learned_from(runs: dict[str, Any]) -> None:
    study = comparison.study_runs(runs)
    lines = comparison.decoders_table(study, runs["03-gated-s0"]).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| decoder-A", "| decoder-A50", "| decoder-train", "| decoder-many", "| decoder-shapes-A",
        "| decoder-shapes-A50", "| decoder-shapes", "| the one that ships",
    ]  # fmt: skip
    assert lines[0].count("+3.90") == 8, "four bins, over black and over white"
    assert "430 objects" in lines[-1] and "+3.80" in lines[-1]
    assert len(comparison.decoders_table(study, None).splitlines()) == 9
    assert comparison.decoders_table({}, None).startswith("No decoder")
    own = comparison.by_bin(study, "psnr")["decoder's own render"]
    assert own["0-30"].mean == pytest.approx(19.9), "not that of the control's decoder"
