"""The analysis: tables of runs, statistics, and verdicts that follow the figures either way."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from fresnel.analysis import attribution, claims, costs, runs, stats
from fresnel.analysis.stats import BINS, Estimate
from fresnel.models.cvs import CVSConfig
from fresnel.show import charts, style
from fresnel.training.losses import pixel_weights

ROOT = Path(__file__).resolve().parent.parent
SAID = claims.load(ROOT / "notebooks" / "claims.yaml")
PLAN = yaml.safe_load((ROOT / "notebooks" / "params" / "study.yaml").read_text())["analysis"]
NOTEBOOK = nbformat.read(ROOT / "notebooks/04_analyze_negative_results.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
CLAIMED = [cell.source for cell in CODE if "claim" in cell.metadata.get("tags", ())]


def test_what_we_said_ourselves_stands_beside_what_a_run_measured(tmp_path: Path) -> None:
    rows = {"perceptual": 7.25, "ssim": 0.9, "edge_energy_ratio": 0.91, "luminance_ratio": 1.02}
    rows |= {"coverage_ratio": 0.98, "coarse_edge_energy_ratio": 0.95, "checkerboard_ratio": 0.8}
    names = ("cvs", "cvs, 2 steps", "cvs, 4 steps", "decoder render")
    metrics: dict[str, Any] = {"summaries": {name: [{}, rows] for name in names}}
    metrics["noise_left"] = {name: [0.5, 0.044, 0.013] for name in ("left", "ignoring", "linear")}
    place = ROOT / "notebooks" / "claims.yaml"
    study = [training(arm, db, 0) for arm, db in (("gated", 25.0), ("oracle", 24.0))]
    study += [training("scarce", 23.0, 0)]
    figures = runs.figures(table(tmp_path, *study))
    said = claims.ours(place, metrics, figures)
    assert [len(text) > 40 for text in said["why it was wrong"]] == [True] * 8
    first, calls, plan, third, edges, cells, bootstrap, mask = said["true now"]
    assert "leaves 0.044, of 0.5 0.013" in first
    assert "Edge energy 0.91" in third and "light 1.02" in third
    assert "at half the size 0.95" in edges
    assert "in PSNR +1.00" in bootstrap and "and -1.00" in bootstrap
    assert calls == cells == mask == "not measured in these runs"
    assert "From weights that denoise" in plan
    alone = runs.figures(table(tmp_path, *study[:2]))
    assert "is scarce (not measured)" in claims.ours(place, metrics, alone)["true now"][6]
    del metrics["noise_left"]
    assert claims.ours(place, metrics, figures)["true now"][0] == calls


def training(arm: str, db: float, seed: int, light: float = 1.0, area: float = 1.0) -> dict:
    """A training whose PSNR is `db` in every bin, and copying the input 20; objects differ."""
    spread = np.random.default_rng(1).normal(size=8)
    spread -= spread.mean()
    values = {"cvs": db + 0.01 * seed, "copy_input": 20.0, "decoder render": 20.0}
    ratios = {"luminance_ratio": light, "coverage_ratio": area}
    rows = {
        name: [{"bin": b, "psnr": x, **ratios} for b in (*BINS, "all")]
        for name, x in values.items()
    }
    objects = {
        name: {b: {f"o{i}": x + more for i, more in enumerate(spread)} for b in (*BINS, "all")}
        for name, x in values.items()
    }
    for summary in rows.values():
        for entry in summary:
            entry["perceptual"] = entry["psnr"]
    metrics = {"summaries": rows, "psnr_by_object": objects, "perceptual_by_object": objects}
    metrics |= {**ratios, "psnr": db, "loss_fall": 9.0, "train_duration_s": 10.0}
    metrics["loss_history"] = [[1, 1.0], [2, 0.1]]
    params = {"model": "cvs"}
    return {"name": f"03-{arm}-s{seed}", "notebook": "03", "params": params, "metrics": metrics}


def table(folder: Path, *records: dict) -> pd.DataFrame:
    """The runs as `read` returns them."""
    common = {
        "status": "finished", "started_utc": "2026-01-01T00:00:00+00:00", "duration_s": 60.0,
        "price_per_hour_usd": 3.6, "cost_usd": 0.06, "stages": [], "artifacts": {}, "reasons": [],
        "summary": "made up", "provenance": {}, "params": {}, "verdict": "PASS", "metrics": {},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({**common, **record}) for record in records]
    (folder / runs.TABLE).write_text("\n".join(lines))
    return runs.read(folder)


def test_the_main_jobs_runs_of_the_other_domain_are_left_out(tmp_path: Path) -> None:
    """Whatever is newer; the runs of a study and those of before the parameter count for both."""
    rows = [("01-original", "faces", 1), ("01-corrected", "objects", 1), ("02-control", "", 1)]
    rows += [("03-gated-s0", "objects", 1), ("01-corrected", "faces", 2)]
    table(tmp_path / "all", *(
        {"name": name, "params": {"domain": of}, "started_utc": f"2026-01-0{day}T00:00:00+00:00"}
        for name, of, day in rows
    ))  # fmt: skip
    told = {of: runs.roles(runs.read(tmp_path / "all", domain=of)) for of in ("faces", "objects")}
    assert [*told["faces"]] == ["01-original", "01-corrected", "02-control", "03-corrected"]
    assert told["faces"]["01-corrected"].params["domain"] == "faces"
    assert [*told["objects"]] == ["01-corrected", "02-control", "03-corrected"]
    assert told["objects"]["01-corrected"].params["domain"] == "objects"


def test_what_newer_runs_measured_is_read_and_older_ones_stay_as_they_were(tmp_path: Path) -> None:
    older = [training("gated", 25.0, seed) for seed in range(2)]
    figures = runs.figures(known := table(tmp_path / "older", *older))
    for record in older:
        for row in record["metrics"]["summaries"]["cvs"]:
            row |= {"perceptual": 3.0, "edge_energy_ratio": 0.5, "faces": None, "lpips": 0.2}
    figures = runs.figures(known := table(tmp_path / "newer", *older))
    assert stats.estimate(figures, "gated", metric="perceptual").mean == 3.0
    assert stats.estimate(figures, "gated", metric="lpips").mean == 0.2
    (row,) = stats.arms_table(figures, known, {"gated": ""}).to_dict("records")
    assert row["perceptual"].startswith("3.0") and row["edges"].startswith("0.50")
    assert "faces" not in row and row["dB"].startswith("25") and row["noise left"] == "-"
    for record in older:
        record["metrics"]["noise_left"] = {"left": [0.4, 0.04, 0.01, 0.0, 0.0]}
        every = record["metrics"]["summaries"]
        every["cvs, 4 steps"] = [{"bin": "all", "perceptual": 2.0, "ssim": 0.9}]
        every["cvs"][-1]["ssim"] = 0.8
    figures = runs.figures(known := table(tmp_path / "newest", *older))
    rivals = {"copy input": ("gated", "copy_input"), "none": ("nobody", runs.OWN)}
    shown = stats.arms_table(figures, known, {"gated": "x"}, rivals).set_index("arm")
    assert list(shown.index) == ["gated", "copy input"]
    assert shown["noise left"].tolist() == ["0.040\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.000", "-"]
    assert shown["dB"]["copy input"].startswith("20.0")
    (calls,) = stats.calls_table(figures, known, {"gated": "", "nobody": ""}).to_dict("records")
    assert list(calls) == ["calls", "perceptual, 1", "perceptual, 4", "SSIM, 1", "SSIM, 4"]
    assert calls["perceptual, 4"].startswith("2.0") and calls["SSIM, 1"].startswith("0.800")


KNOBS: dict[str, tuple[str, Any, Any]] = {
    "decoder": ("decoder", 0.9, 0.1),
    "exposure": ("exposure", 0.5, 0.0),
    "current": ("passed", 0.0, 1.0),
    "abandon": ("gated_area", 0.5, 1.0),
    "frontal_near": ("near", 22.0, 18.0),
    "frontal_far": ("far", 18.0, 22.0),
    "loss": ("fall", 9.0, 2.0),
    "mask": ("mask", 25.0, 30.0),
    "cvs": ("onestep", 25.0, 30.0),
    "epochs": ("control_light", 1.0, 0.1),
    "external": ("oracle", 20.0, 25.0),
    "external_scarce": ("scarce", 30.0, 21.0),
    "early": ("gate", "FAIL", "PASS"),
}
"""Claim -> what of the world it is about, where it holds, and where it does not."""


def world(folder: Path, knob: dict[str, Any]) -> dict[str, Any]:
    """What notebook 04 knows when it comes to the claims."""
    records = []
    levels = {"gated": 25.0, "original": 18.0}
    levels |= {name: knob[name] for name in ("oracle", "scarce", "mask", "onestep")}
    for seed in range(2):
        made = {arm: training(arm, db, seed) for arm, db in levels.items()}
        made["original"] = training("original", 18.0, seed, light=knob["control_light"])
        made["original"]["metrics"]["loss_fall"] = knob["fall"]
        made["gated"] = training("gated", 25.0, seed, area=knob["gated_area"])
        frontal, far = (training("decoder-frontal", knob[at], seed) for at in ("near", "far"))
        near = frontal["metrics"]["psnr_by_object"]["cvs"]
        near |= {b: far["metrics"]["psnr_by_object"]["cvs"][b] for b in BINS[1:]}
        rows = far["metrics"]["summaries"]["cvs"]
        rows[0] = frontal["metrics"]["summaries"]["cvs"][0]
        frontal["metrics"]["summaries"]["cvs"] = rows
        gate = {"name": f"01-original-B-s{seed}", "notebook": "01", "verdict": knob["gate"]}
        records += [*made.values(), frontal, {**gate, "metrics": {"gate_duration_s": 1.0}}]
    cells = {}
    shares = {"path": 0.1, "decoder": knob["decoder"], "position": 0.0}
    shares["exposure"] = knob["exposure"]
    for name in (f"{i:04b}" for i in range(16)):
        light = sum(share for bit, share in zip(name, shares.values(), strict=True) if bit == "1")
        verdict = "PASS" if name == attribution.PATH_ALONE and knob["passed"] else "FAIL"
        values = [light / sum(shares.values()) * (1 + 0.01 * i) for i in range(4)]
        cells[name] = {"light": values, "coverage": values, "verdict": verdict, "codes": []}
    return {
        "known": table(folder, *records),
        "cells": [{"objects": list("abcd"), "cells": cells, "truth": cells["1111"]}],
    }


def decide(claim: str, given: dict[str, Any]) -> str:
    """The verdict of a claim's own cell of notebook 04."""
    space = {
        "torch": torch, "CVSConfig": CVSConfig, "pixel_weights": pixel_weights, "math": math,
        "figures": runs.figures(given["known"]), "roles": runs.roles(given["known"]),
        "said": SAID, "measured": {}, "verdicts": {}, "attribution": attribution, "costs": costs,
        "runs": runs, "stats": stats, "charts": charts, "style": style, "claims": claims,
        "measures": ("psnr", "perceptual"),
        "split": attribution.attribute(given["cells"]), **given,
    }  # fmt: skip
    exec(next(source for source in CLAIMED if f'said["{claim}"]' in source), space)
    assert isinstance(space["measured"][claim], Estimate)
    return space["verdicts"][claim]


@pytest.mark.parametrize("claim", SAID)
def test_a_claims_own_data_decide_on_it_both_ways_and_without_data_it_is_open(
    claim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fresnel.show.style.show", lambda picture, alt, **about: None)
    holds, fails = ({name: pair[side] for name, *pair in KNOBS.values()} for side in (0, 1))
    name, yes, no = KNOBS[claim]
    # all else the other way: a cell that reads another claim's figures is found out
    assert decide(claim, world(tmp_path / "a", {**fails, name: yes})) == "confirmed"
    assert decide(claim, world(tmp_path / "b", {**holds, name: no})) == "refuted"
    assert decide(claim, {"known": runs.read(tmp_path / "none"), "cells": []}) == "open"


@pytest.mark.parametrize("side", [0, 1])
def test_the_answer_follows_the_verdicts(side: int, tmp_path: Path) -> None:
    """Opposite figures, opposite sentences; a cause is named by its share alone."""
    shares = {"path": Estimate(0.9 - 0.8 * side), "decoder": Estimate(0.1 + 0.8 * side, (0.5,))}
    words = ("confirmed", "refuted")
    given = {claim: words[side if claim == "external" else 1 - side] for claim in SAID}
    metrics: dict[str, Any] = {}
    texts: list[str] = []
    space: dict[str, Any] = {
        "said": SAID, "verdicts": given, "measured": dict.fromkeys(SAID, Estimate(0.5, (0.5,))),
        "split": {"light": {"factors": {name: {"share": one} for name, one in shares.items()}}},
        "attribution": attribution, "math": math, "Markdown": str, "missing": [], "arms": {},
        "reached": pd.DataFrame(
            [("a", "b", "1.00", 3, ("met", "missed (b)")[side])],
            columns=["target", "at its worst", "measured", "seeds", "verdict"],
        ),
        "run": SimpleNamespace(
            metric=metrics.__setitem__, metrics=metrics.update, finish=lambda *said: None
        ),
        "answer": SimpleNamespace(update=texts.append),
        "wrong": SimpleNamespace(update=texts.append),
    }  # fmt: skip
    for cell in CODE:
        if "answer" in cell.metadata.get("tags", ()):
            exec(cell.source, space)
    answer, wrong = texts
    wanted = (
        ("The camera path", "disagree: its share is 10 %", "has the right", "at least a tenth"),
        (
            "The decoder's training",
            "figures agree.",
            "misses the right light",
            "level, within a tenth",
        ),
    )
    for words in wanted[side]:
        assert words in answer
    for words in wanted[1 - side]:
        assert words not in answer
    cause = ("the camera path", "the decoder's training")[side]
    assert metrics["headline"]["figure"] == "90 %" and cause in metrics["headline"]["of"]
    assert ("Missed: a. At its worst (b)" in wrong) == (side == 1)
    assert ("had first read" in wrong) == (side == 1)


def test_rows_of_a_forest_plot_are_sorted_and_few() -> None:
    rows = {f"a{i}": {"0-30": Estimate(i % 7 + i / 100), "30-60": Estimate()} for i in range(13)}
    parts = stats.ranked(rows | {"nothing": {"0-30": Estimate(), "30-60": Estimate()}})
    assert [len(part) for part in parts] == [10, 3]
    order = [row["0-30"].mean for part in parts for row in part.values()]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("claim", SAID.values(), ids=list(SAID))
def test_an_interval_that_reaches_beyond_its_band_decides_nothing(claim: claims.Claim) -> None:
    for band in (claim.confirmed, claim.refuted):
        assert band[0] <= band[1] and (band[0] > -math.inf or band[1] < math.inf)
        edge = band[0] if math.isinf(band[1]) else band[1]
        assert claim.decide(Estimate(edge, (edge,), edge - 1e6, edge + 1e6)) == "open"
        assert claim.decide(Estimate(edge)) == "open", "a mean without an interval"
    if claim.confirmed[0] == (edge := claim.refuted[1]):
        assert claim.decide(Estimate(edge, (edge,), edge, edge)) == "open", "both bands hold it"
    text = claim.heading() + claim.answer(Estimate())
    assert claim.quote in text and f"line {claim.line}" in text and "no run measured it" in text


def test_the_rule_names_both_bands_and_lessons_lead_to_code() -> None:
    rule = "confirmed if the whole interval is at least 0.5, refuted if it is at most 0.5"
    assert rule in SAID["decoder"].rule and "is 0, refuted if it is 1" in SAID["current"].rule
    assert "from 0.8 to 1.25" in SAID["epochs"].rule
    assert len(CLAIMED) == len(SAID) == 13
    for name in claims.lessons(ROOT / "notebooks" / "claims.yaml")["enforced by"]:
        assert f"def {name.rpartition('.')[2]}" in claims.source_of(name)


def for_target(entry: dict[str, Any], good: bool) -> list[dict]:
    """Runs that meet a target, or miss it by a little, and nothing else."""
    low, high = claims.band_of(entry, "90-180")
    if "run" in entry:
        value = (
            (low + min(high, low + 2)) / 2 if good else low - 1 if math.isinf(high) else high + 1
        )
        for word in reversed(entry["scalar"].split()):
            value = [value] * (int(word) + 1) if word.isdigit() else {word: value}
        run = {"name": f"{entry['run']}-s0", "notebook": "0", "verdict": "FAIL", "metrics": value}
        return [run]
    metric, model = entry.get("metric", "psnr"), "cvs"
    level = {"over": 20.0, "minus": 20.0}.get(
        next((w for w in ("over", "minus") if w in entry), "")
    )
    to = (low + (0.01 if good else -0.01)) if math.isinf(high) else high + (-0.01 if good else 0.01)
    value = to if level is None else level * to if "over" in entry else level + to
    made = []
    for arm in entry["of"]:
        rows = {model: value, **dict.fromkeys(stats.RIVALS, 20.0)}
        summaries = {
            name: [{"bin": b, metric: x} for b in (*BINS, "all")] for name, x in rows.items()
        }
        objects = {
            name: {b: dict.fromkeys("abc", x) for b in (*BINS, "all")} for name, x in rows.items()
        }
        metrics = {"summaries": summaries, f"{metric}_by_object": objects}
        made.append({"name": f"03-{arm}-s0", "notebook": "03", "params": {"model": model},
                     "metrics": metrics})  # fmt: skip
    other = entry.get("over", entry.get("minus", "copy_input"))
    if other not in stats.RIVALS:
        same = {"summaries": {model: [{"bin": b, metric: 20.0} for b in (*BINS, "all")]}}
        same[f"{metric}_by_object"] = {
            model: {b: dict.fromkeys("abc", 20.0) for b in (*BINS, "all")}
        }
        made.append({"name": f"03-{other}-s0", "notebook": "03", "params": {"model": model},
                     "metrics": same})  # fmt: skip
    return made


@pytest.mark.parametrize("entry", PLAN["targets"], ids=lambda entry: entry["text"])
def test_a_target_is_met_missed_or_not_run(entry: dict[str, Any], tmp_path: Path) -> None:
    for word, made in (
        ("met", for_target(entry, True)),
        ("missed", for_target(entry, False)),
        ("not run", []),
    ):
        known = table(tmp_path / word, *made)
        shown = claims.targets_table([entry], runs.figures(known), known).iloc[0]
        assert shown.verdict.split(" (")[0] == word
    assert shown.measured == "-" and shown.seeds == 0


def test_a_target_says_which_bin_is_missed(tmp_path: Path) -> None:
    entry = {"text": "t", "of": ["gated"], "minus": "oracle", "least": {"90-180": 0.5}}
    known = table(tmp_path, training("gated", 25.3, 0), training("oracle", 25.0, 0))
    verdict, where, one = claims.judge(entry, claims.target(entry, runs.figures(known), known))
    assert verdict == "missed (gated minus oracle: 90-180)" and where.endswith("90-180")
    assert one.mean == pytest.approx(0.3)
    entry = {"text": "t", "of": ["gated"], "over": "copy_input", "all": True, "band": [0, 1.2]}
    rows = claims.target(entry, runs.figures(known), known)
    assert rows["gated over copy input"]["all"].mean == pytest.approx(25.3 / 20)
    assert claims.judge(entry, rows)[0] == "missed (gated over copy input)"
    entry = next(e for e in PLAN["targets"] if e.get("refused"))
    (run,) = for_target(entry, True)
    known = table(tmp_path, run, {**run, "name": f"{entry['run']}-s1", "verdict": "PASS"})
    shown = claims.targets_table([entry], runs.figures(known), known).iloc[0]
    assert shown.verdict.startswith("missed") and shown.measured == "never", "it was let through"


def test_a_ratio_is_of_means_and_its_interval_is_paired(tmp_path: Path) -> None:
    made = [training(arm, db, seed) for arm, db in (("a", 10.0), ("b", 20.0)) for seed in range(3)]
    figures = runs.figures(table(tmp_path, *made))
    half = stats.estimate(figures, "a", over="b")
    assert half.mean == pytest.approx(0.5, abs=1e-3) and len(half.seeds) == 3
    wide = stats.estimate(figures, "a", over="copy_input")
    apart = stats.estimate(figures, "a")
    assert 0 < wide.high - wide.low < (apart.high - apart.low) / 10, "objects mostly cancel"
    assert math.isnan(stats.estimate(figures, "a", over="nobody").mean)


def test_the_newest_finished_run_of_a_name_is_read(tmp_path: Path) -> None:
    first, later, last = (
        {**training("gated", db, 0), "started_utc": f"2026-01-0{day}T00:00:00+00:00"}
        for day, db in ((1, 25.0), (2, 26.0), (3, 28.0))
    )
    refused, died = {**last, "verdict": "REFUSED"}, {**last, "status": "crashed"}
    known = table(tmp_path, later, first, refused, died)
    assert known.metrics["03-gated-s0"]["psnr"] == 26.0 and len(known) == 1
    file = tmp_path / "run" / "results.json"
    file.parent.mkdir()
    file.write_text(json.dumps({**later, "status": "finished", "metrics": {"psnr": 27.0}}))
    assert runs.read(tmp_path).metrics["03-gated-s0"]["psnr"] == 27.0, "a line has less of a run"
    file.write_text("{")
    assert len(runs.read(tmp_path)) == 1
    assert runs.read(tmp_path / "nowhere").empty


def test_the_main_job_speaks_and_the_study_stands_in(tmp_path: Path) -> None:
    main = {**training("gated", 25.0, 0), "name": "03-corrected"}
    alone = table(tmp_path / "a", main)
    assert alone.step["03-corrected"] == "03-gated", "its own run is the arm where no study is"
    both = table(tmp_path / "b", main, training("gated", 26.0, 0), training("original", 9.0, 0))
    roles = runs.roles(both)
    assert {role: run.name for role, run in roles.items()} == {
        "03-control": "03-original-s0", "03-corrected": "03-corrected",
    }  # fmt: skip
    assert stats.estimate(runs.figures(both), "gated").mean == 26.0


def test_differences_are_paired_and_seeds_widen_the_interval(tmp_path: Path) -> None:
    arms = (("gated", 25.0), ("oracle", 24.0))
    made = [training(arm, db, seed) for arm, db in arms for seed in range(3)]
    figures = runs.figures(table(tmp_path, *made))
    gap = stats.estimate(figures, "gated", "0-30", minus="oracle")
    assert gap.mean == pytest.approx(1.0) == gap.low == gap.high, "objects cancel"
    one = stats.estimate(figures, "gated", "0-30")
    assert one.mean == pytest.approx(25.01) and one.sd == pytest.approx(0.01)
    assert one.low < 24.9 and one.high > 25.1, "objects differ"
    assert stats.bins(figures, "gated", minus="copy_input")["90-180"].mean == pytest.approx(5.01)
    light = stats.estimate(figures, "gated", "all", "luminance_ratio")
    assert light.mean == 1.0 and light.seeds == (1.0, 1.0, 1.0)
    uneven = [training("gated", 25.0, seed, light) for seed, light in enumerate((0.8, 1.0, 1.2))]
    wide = runs.figures(table(tmp_path, *uneven)).fillna({"low": 0.9, "high": 1.1})
    light = stats.estimate(wide, "gated", "all", "luminance_ratio")
    assert light.high - light.mean > 0.45, "trainings that differ widen what objects leave open"
    assert math.isnan(stats.estimate(figures, "nobody").mean)
    assert stats.best(figures, ["oracle", "gated", "nobody"]) == "gated"
    assert stats.each([3.0, 1.0, math.nan]) == Estimate(2.0, (3.0, 1.0), 1.0, 3.0)
    text = Estimate(1.0, (0.9, 1.1), 0.5, 1.5).text(1, "+").replace("\N{NO-BREAK SPACE}", " ")
    assert text == "+1.0 ± 0.1 [+0.5, +1.5]"


@pytest.mark.parametrize(("seeds", "objects"), [(1, 8), (3, 8), (3, 16), (3, 78)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, objects: int) -> None:
    """Both objects and trainings vary; one training knows of its objects alone."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        values = rng.normal(size=objects) + 0.2 * rng.normal(size=(seeds, objects))
        if seeds > 1:
            values = values + 0.3 * rng.normal(size=(seeds, 1))
        low, high = stats.interval(values)
        held += low <= 0 <= high
    assert 0.93 <= held / 400 <= 0.99
    assert all(math.isnan(bound) for bound in stats.interval(np.ones((3, 1))))


def test_costs_and_the_hour_of_refusal(tmp_path: Path) -> None:
    spans = costs.spans()
    assert list(spans.ended) == [1.0, 1.75, 2.25, 4.75, 5.25] and spans.began[3] == 2.25
    gates = [{"gate_duration_s": 1.0, "verdict": verdict} for verdict in ("FAIL", "PASS")]
    # ten of 500 images in an hour, then the gate
    assert costs.refused_after_s(gates) == [pytest.approx(73.0), math.inf]

    def run(name: str, minute: int, cpu: str) -> dict[str, Any]:
        stages = [{"name": "train", "duration_s": 50.0}]
        started = f"2026-01-01T00:{minute:02}:00+00:00"
        return {
            "name": name, "notebook": "03_full_train", "provenance": {"cpu": cpu},
            "started_utc": started, "stages": stages, "duration_s": 120.0,
        }  # fmt: skip

    known = table(tmp_path, run("a", 0, "x"), run("b", 1, "x"), run("03-control", 1, "y"))
    assert costs.held_s(known) == 180 + 120, "what shares a machine costs its time once"
    assert costs.held_s(known[:0]) == 0
    shown = costs.table(known).set_index("notebook")
    assert shown.loc["in all", "all runs"] == "360 s, $0.36"
    assert shown.loc["03_full_train", "the control"] == "120 s, $0.12"
    dear = costs.table(known, 36.0).set_index("notebook")
    assert dear.loc["in all", "all runs"].endswith("$3.60")


def test_notebook_04_tells_the_whole_story_of_the_published_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which it reads where there are no runs of one's own, and says so."""
    shown: list[str] = []

    class Shown:
        def __init__(self, data: Any, **_: Any) -> None:
            self.update(data)

        def update(self, data: Any) -> None:
            shown.append(data["text/html"] if isinstance(data, dict) else data.data)

    monkeypatch.setattr("IPython.display.display", Shown)
    keys: list[str] = []

    def show(
        picture: Any, alt: str, *, caption: str = "", key: str = "", lead: bool = False
    ) -> None:
        shown.append(f"{alt} {caption}")
        keys.extend([key] * bool(key) + ["lead"] * lead)

    monkeypatch.setattr("fresnel.show.style.show", show)
    space: dict[str, Any] = {}
    for cell in CODE:
        exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", ()):
            space |= {"attribution_source": "recorded", "device": "cpu"}
            space |= {"output_dir": str(tmp_path / "runs" / "04")}
    found = json.loads((tmp_path / "runs" / "04" / "results.json").read_text())
    assert "finished runs, read from reports/published/study." in capsys.readouterr().out
    assert found["verdict"] == "DONE" and found["metrics"]["missing_runs"] == []
    gap = found["metrics"]["contrasts"]["gated : oracle"]["psnr"]
    assert gap["mean"] == pytest.approx(0.102, abs=1e-2) and len(gap["seeds"]) == 3
    assert set(found["metrics"]["claims"].values()) == {"confirmed", "refuted", "open"}
    assert found["metrics"]["claims"]["early"] == "confirmed"
    assert space["split"]["objects"] == 78 and space["split"]["seeds"] == 3
    text = "\n".join(shown)
    assert text.count("What would change our mind?") == len(SAID)
    for words in ("on the original report", "def validate", "object pictured", SAID["early"].quote):
        assert words in text
    assert keys.count("lead") == 1 and set(re.findall(r"#fig-([\w-]+)", text)) <= {*keys}
    assert "The camera path accounts for 97" in text and "and the figures disagree" in text
    for pair in PLAN["contrasts"]:
        assert {*pair} <= {*PLAN["arms"], *stats.RIVALS}
