"""The analysis: tables of runs, statistics, and verdicts that follow the figures either way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import synthetic
import torch
import yaml

from fresnel.analysis import attribution, claims, costs, runs, stats
from fresnel.analysis.stats import BINS, Estimate
from fresnel.report import run as report

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "04_analyze_negative_results.ipynb"
PUBLISHED = ROOT / "reports" / "published" / "study"
SAID = claims.load(ROOT / "notebooks" / "claims.yaml")
PLAN = yaml.safe_load((ROOT / "notebooks" / "params" / "study.yaml").read_text())["analysis"]
CELLS = [
    cell
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells
    if "claim" in cell.metadata.get("tags", ())
]


def training(arm: str, db: float, seed: int, light: float = 1.0, area: float = 1.0) -> dict:
    """A training whose PSNR is `db` in every bin, and copying the input 20; objects differ."""
    spread = np.random.default_rng(1).normal(size=8)
    spread -= spread.mean()
    values = {"cvs": db + 0.01 * seed, "copy_input": 20.0, "decoder render": 20.0}

    def rows(level: float) -> list[dict[str, Any]]:
        ratios = {"luminance_ratio": light, "coverage_ratio": area}
        return [{"bin": b, "psnr": level, "psnr_white": level, **ratios} for b in (*BINS, "all")]

    objects = {
        name: {b: {f"o{i}": level + x for i, x in enumerate(spread)} for b in (*BINS, "all")}
        for name, level in values.items()
    }
    return {
        "name": f"03-{arm}-s{seed}",
        "notebook": "03_full_train",
        "verdict": "PASS",
        "params": {"model": "cvs"},
        "metrics": {
            "summaries": {name: rows(level) for name, level in values.items()},
            "psnr_by_object": objects,
            "psnr_white_by_object": objects,
            "luminance_ratio": light,
            "coverage_ratio": area,
            "psnr": db,
            "loss_fall": 9.0,
            "loss_history": [[1, 1.0], [2, 0.1]],
            "train_duration_s": 10.0,
        },
    }


def table(tmp_path: Path, records: list[dict]) -> pd.DataFrame:
    """The runs as `read` returns them."""
    common = {
        "status": "finished", "started_utc": "2026-01-01T00:00:00+00:00", "duration_s": 60.0,
        "price_per_hour_usd": 3.6, "cost_usd": 0.06, "stages": [], "artifacts": {}, "reasons": [],
        "summary": "made up", "provenance": {}, "params": {},
    }  # fmt: skip
    tmp_path.mkdir(exist_ok=True)
    lines = [json.dumps({**common, **record}) for record in records]
    (tmp_path / runs.TABLE).write_text("\n".join(lines))
    return runs.read(tmp_path)


KNOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "decoder": ({"decoder": 0.9}, {"decoder": 0.1}),
    "exposure": ({"exposure": 0.5}, {"exposure": 0.0}),
    "current": ({"passed": 0.0}, {"passed": 1.0}),
    "abandon": ({"gated_area": 0.5}, {"gated_area": 1.0}),
    "frontal_near": ({"near": 22.0}, {"near": 18.0}),
    "frontal_far": ({"far": 18.0}, {"far": 22.0}),
    "loss": ({"fall": 9.0}, {"fall": 2.0}),
    "mask": ({"laplacian": 25.0}, {"laplacian": 22.0}),
    "cvs": ({"onestep": 25.0}, {"onestep": 22.0}),
    "epochs": ({"control_light": 1.0}, {"control_light": 0.1}),
    "external": ({"oracle": 27.0}, {"oracle": 25.0}),
    "external_scarce": ({"rest50-oracle": 27.0}, {"rest50-oracle": 25.0}),
    "early": ({"gate": "FAIL"}, {"gate": "PASS"}),
}
"""Claim -> what the world is like where it holds, and where it does not."""


def world(tmp_path: Path, knob: dict[str, Any]) -> dict[str, Any]:
    """What notebook 04 knows when it comes to the claims."""
    records = []
    for seed in range(2):
        levels = {
            "gated": 25.0, "ungated": 25.0, "rest50-gated": 25.0, "original": 18.0,
            "oracle": knob["oracle"], "rest50-oracle": knob["rest50-oracle"],
            "loss-corrected-laplacian-consistency": knob["laplacian"],
            "loss-corrected-laplacian-onestep": knob["onestep"], "decoder-frontal": knob["near"],
        }  # fmt: skip
        for arm, db in levels.items():
            light = knob["control_light"] if arm == "original" else 1.0
            area = knob["gated_area"] if arm == "gated" else 1.0
            records.append(training(arm, db, seed, light, area))
        frontal, control = records[-1]["metrics"], records[-6]["metrics"]
        for b in BINS[1:]:
            objects = frontal["psnr_by_object"]["cvs"][b]
            shift = knob["far"] - knob["near"]
            frontal["psnr_by_object"]["cvs"][b] = {o: v + shift for o, v in objects.items()}
            next(r for r in frontal["summaries"]["cvs"] if r["bin"] == b)["psnr"] += shift
        assert control["luminance_ratio"] == knob["control_light"]
        control["loss_fall"] = knob["fall"]
        gate = {"name": f"01-original-B-s{seed}", "notebook": "01", "verdict": knob["gate"]}
        records.append({**gate, "metrics": {"gate_duration_s": 1.0}})
    known = table(tmp_path, records)
    cells = {}
    for name in ("".join(f"{i:04b}") for i in range(16)):
        share = {"path": 0.1, "decoder": knob["decoder"], "exposure": knob["exposure"]}
        light = sum(share.get(f, 0.0) for f, bit in zip(attribution.FACTORS, name, strict=True)
                    if bit == "1") / sum(share.values())  # fmt: skip
        verdict = "PASS" if name == attribution.PATH_ALONE and knob["passed"] else "FAIL"
        values = [light * (1 + 0.01 * i) for i in range(4)]
        cells[name] = {"light": values, "coverage": values, "verdict": verdict, "codes": []}
    measured = {"objects": list("abcd"), "cells": cells, "truth": cells["1111"]}
    return {"known": known, "cells": [measured], "split": attribution.attribute([measured])}


def decide(claim: str, given: dict[str, Any]) -> str:
    """The verdict of a claim's own cell of notebook 04."""
    from fresnel.models.cvs import CVSConfig
    from fresnel.show import charts, style
    from fresnel.training.losses import pixel_weights

    space = {
        "torch": torch, "CVSConfig": CVSConfig, "pixel_weights": pixel_weights,
        **given, "figures": runs.figures(given["known"]), "roles": runs.roles(given["known"]),
        "said": SAID, "measured": {}, "verdicts": {}, "attribution": attribution, "costs": costs,
        "runs": runs, "stats": stats, "charts": charts, "style": style, "math": math,
    }  # fmt: skip
    source = next(cell.source for cell in CELLS if f'said["{claim}"]' in cell.source)
    exec(source, space)
    assert isinstance(space["measured"][claim], Estimate)
    return space["verdicts"][claim]


@pytest.mark.parametrize("claim", SAID)
def test_a_claims_own_data_decide_on_it_both_ways_and_without_data_it_is_open(
    claim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fresnel.show.style.show", lambda picture, alt: None)
    holds, fails = (
        {k: v for pair in KNOBS.values() for k, v in pair[side].items()} for side in (0, 1)
    )
    # all else the other way: a cell that reads another claim's figures is found out
    assert decide(claim, world(tmp_path / "a", {**fails, **KNOBS[claim][0]})) == "confirmed"
    assert decide(claim, world(tmp_path / "b", {**holds, **KNOBS[claim][1]})) == "refuted"
    nothing = {
        "known": runs.read(tmp_path / "none"),
        "cells": [],
        "split": attribution.attribute([]),
    }
    assert decide(claim, nothing) == "open"


@pytest.mark.parametrize("claim", SAID.values(), ids=list(SAID))
def test_an_interval_that_reaches_beyond_its_band_decides_nothing(claim: claims.Claim) -> None:
    inner = {
        word: min(max(0.3, band[0]), band[1]) + (0.1 if band[0] == 0.3 else 0.0)
        for word, band in (("confirmed", claim.confirmed), ("refuted", claim.refuted))
    }
    low, high = sorted(inner.values())
    assert claim.decide(Estimate(low, (low,), low - 1, high + 1)) == "open"
    assert claim.decide(Estimate(low)) == "open", "a mean without an interval"
    if claim.confirmed[0] == claim.refuted[1]:
        edge = claim.refuted[1]
        assert claim.decide(Estimate(edge, (edge,), edge, edge)) == "open", "both bands hold it"
    for band in (claim.confirmed, claim.refuted):
        assert band[0] <= band[1] and (band[0] > -math.inf or band[1] < math.inf)
    text = claim.heading() + claim.answer(Estimate())
    assert claim.quote in text and f"line {claim.line}" in text and "no run measured it" in text


def test_the_rule_names_both_bands_and_lessons_lead_to_code() -> None:
    assert "confirmed if the whole interval is at least 0.5, refuted if it is at most 0.5" in (
        SAID["decoder"].rule
    )
    assert "is 0, refuted if it is 1" in SAID["current"].rule
    assert "from 0.8 to 1.25" in SAID["epochs"].rule
    assert len(CELLS) == len(SAID) == 13
    rules = claims.lessons(ROOT / "notebooks" / "claims.yaml")
    for name in rules["enforced by"]:
        assert f"def {name.rpartition('.')[2]}" in claims.source_of(name)


def names(entry: dict[str, Any], key: str) -> str:
    return entry[key] if isinstance(entry[key], str) else entry[key][0]


def for_target(entry: dict[str, Any], good: bool) -> list[dict]:
    """Runs that meet a target, or miss it, and nothing else."""
    if "run" in entry:
        low, high = claims.band_of(entry, "all")
        value = (
            (low + min(high, low + 2)) / 2 if good else (low - 1 if math.isinf(high) else high + 1)
        )
        record = {"name": f"{entry['run']}-s0", "notebook": "0", "verdict": "FAIL"}
        return [{**record, "metrics": {entry["scalar"]: value}}]
    if "metric" in entry:
        value = float(np.mean(entry["band"])) if good else entry["band"][1] + 0.1
        both = {"light": value} if entry["metric"] == "luminance_ratio" else {"area": value}
        return [training("gated", 25.0, 0, **both)]
    least = max(claims.band_of(entry, b)[0] for b in BINS)
    level = 20.0 + least + (0.1 if good else -0.1)
    found = [training(names(entry, "ours"), level, 0)]
    if entry["theirs"] not in ("copy_input", "decoder render"):
        found.append(training(entry["theirs"], 20.0, 0))
    return found


@pytest.mark.parametrize("entry", PLAN["targets"], ids=lambda entry: entry["text"])
def test_a_target_is_met_missed_or_not_run(entry: dict[str, Any], tmp_path: Path) -> None:
    for place, records, wanted in (
        ("a", for_target(entry, True), "met"),
        ("b", for_target(entry, False), "missed"),
        ("c", [], "not run"),
    ):
        known = table(tmp_path / place, records)
        rows = claims.target(entry, runs.figures(known), known)
        assert claims.judge(entry, rows)[0].split(" (")[0] == wanted
    shown = claims.targets_table([entry], runs.figures(known), known).iloc[0]
    assert shown.verdict == "not run" and shown.measured == "-" and shown.seeds == 0


def test_a_gate_that_let_the_control_through_has_missed(tmp_path: Path) -> None:
    entry = next(e for e in PLAN["targets"] if e.get("refused"))
    records = for_target(entry, True)
    records += [{**records[0], "name": f"{entry['run']}-s1", "verdict": "PASS"}]
    known = table(tmp_path, records)
    shown = claims.targets_table([entry], runs.figures(known), known).iloc[0]
    assert shown.verdict.startswith("missed") and shown.measured == "never"


def test_a_target_says_which_bin_is_missed(tmp_path: Path) -> None:
    entry = {"text": "t", "ours": "gated", "theirs": "oracle", "least": {"90-180": 0.5}}
    known = table(tmp_path, [training("gated", 25.3, 0), training("oracle", 25.0, 0)])
    figures = runs.figures(known)
    rows = claims.target(entry, figures, known)
    verdict, where, one = claims.judge(entry, rows)
    assert verdict == (
        "missed (gated - oracle, over white: 90-180; gated - oracle, over black: 90-180)"
    )
    assert where.endswith("90-180") and one.mean == pytest.approx(0.3)
    best = claims.target({**entry, "ours": ["oracle", "gated"]}, figures, known)
    assert list(best) == list(rows), "of a list, the best"


def test_the_newest_finished_run_of_a_name_is_read(tmp_path: Path) -> None:
    first = {**training("gated", 25.0, 0), "started_utc": "2026-01-01T00:00:00+00:00"}
    later = {**training("gated", 26.0, 0), "started_utc": "2026-01-02T00:00:00+00:00"}
    refused = {**later, "verdict": "REFUSED", "started_utc": "2026-01-03T00:00:00+00:00"}
    died = {**later, "status": "crashed", "started_utc": "2026-01-03T00:00:00+00:00"}
    known = table(tmp_path, [later, first, refused, died])
    assert known.metrics["03-gated-s0"]["psnr"] == 26.0 and len(known) == 1
    broken = tmp_path / "run" / "results.json"
    broken.parent.mkdir()
    whole = {**later, "status": "finished", "metrics": {**later["metrics"], "psnr": 27.0}}
    broken.write_text(json.dumps(whole))
    assert runs.read(tmp_path).metrics["03-gated-s0"]["psnr"] == 27.0, "a line has less of a run"
    broken.write_text("{")
    assert len(runs.read(tmp_path)) == 1
    assert runs.read(tmp_path / "nowhere").empty


def test_the_main_job_speaks_and_the_study_stands_in(tmp_path: Path) -> None:
    main = {**training("gated", 25.0, 0), "name": "03-corrected"}
    alone = table(tmp_path / "a", [main])
    assert alone.step["03-corrected"] == "03-gated", "its own run is the arm where no study is"
    both = table(tmp_path / "b", [main, training("gated", 26.0, 0), training("original", 9.0, 0)])
    roles = runs.roles(both)
    assert [roles["03-control"].name, roles["03-corrected"].name] == [
        "03-original-s0",
        "03-corrected",
    ]
    assert stats.estimate(runs.figures(both), "gated").mean == 26.0


def test_differences_are_paired_and_seeds_widen_the_interval(tmp_path: Path) -> None:
    arms = [("gated", 25.0), ("oracle", 24.0)]
    records = [training(arm, db, seed) for arm, db in arms for seed in range(3)]
    figures = runs.figures(table(tmp_path, records))
    gap = stats.difference(figures, "gated", "oracle", "0-30")
    assert gap.mean == pytest.approx(1.0) == gap.low == gap.high, "objects cancel"
    one = stats.estimate(figures, "gated", "0-30")
    assert one.mean == pytest.approx(25.01) and one.sd == pytest.approx(0.01)
    assert one.low < 24.9 and one.high > 25.1, "objects differ"
    assert stats.gaps(figures, "gated", "copy_input")["90-180"].mean == pytest.approx(5.01)
    light = stats.estimate(figures, "gated", "all", "luminance_ratio")
    assert light.mean == 1.0 and light.seeds == (1.0, 1.0, 1.0)
    uneven = [training("gated", 25.0, seed, light) for seed, light in enumerate((0.8, 1.0, 1.2))]
    light = stats.estimate(
        runs.figures(table(tmp_path, uneven)).fillna({"low": 0.9, "high": 1.1}),
        *("gated", "all", "luminance_ratio"),
    )
    assert light.high - light.mean > 0.45, "trainings that differ widen what objects leave open"
    assert math.isnan(stats.estimate(figures, "nobody").mean)
    assert stats.best(figures, ["oracle", "gated", "nobody"]) == "gated"
    assert stats.each([3.0, 1.0, math.nan]) == Estimate(2.0, (3.0, 1.0), 1.0, 3.0)
    text = Estimate(1.0, (0.9, 1.1), 0.5, 1.5).text(1, "+").replace("\N{NO-BREAK SPACE}", " ")
    assert text == "+1.0 ± 0.1 [+0.5, +1.5]"


@pytest.mark.parametrize(("seeds", "objects"), [(1, 8), (3, 8), (3, 16), (3, 78)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, objects: int) -> None:
    """Both objects and trainings vary; one training knows of its objects alone."""
    rng = np.random.default_rng(0)
    held = 0
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
    seconds = costs.refused_after_s([{"gate_duration_s": 1.0, "verdict": "FAIL"}])
    assert seconds == [pytest.approx(73.0)], "ten of 500 images in an hour, then the gate"
    assert costs.refused_after_s([{"gate_duration_s": 1.0, "verdict": "PASS"}]) == [math.inf]

    def run(name: str, minute: int, cpu: str) -> dict[str, Any]:
        record = {"name": name, "notebook": "03_full_train", "verdict": "PASS", "metrics": {}}
        started = f"2026-01-01T00:{minute:02}:00+00:00"
        stages = [{"name": "train", "duration_s": 50.0}]
        more = {"provenance": {"cpu": cpu}, "started_utc": started, "stages": stages}
        return {**record, **more, "duration_s": 120.0}

    known = table(tmp_path, [run("a", 0, "x"), run("b", 1, "x"), run("03-control", 1, "y")])
    assert costs.held_s(known) == 180 + 120, "what shares a machine costs its time once"
    assert costs.held_s(runs.read(tmp_path / "none")) == 0
    shown = costs.table(known).set_index("notebook")
    assert shown.loc["in all", "all runs"] == "360 s, $0.36"
    assert shown.loc["03_full_train", "the control"] == "120 s, $0.12"
    assert (
        costs.table(known, 36.0).set_index("notebook").loc["in all", "all runs"].endswith("$3.60")
    )
    assert costs.stages(known).iloc[0].tolist() == ["03_full_train", "train", 3, "150 s"]
    assert costs.stages(known[:0]).empty


def test_the_published_table_holds_the_study() -> None:
    known = runs.read(PUBLISHED)
    figures = runs.figures(known)
    labelled = {*PLAN["arms"], *(a for a in figures.index.unique("arm") if a.startswith("loss-"))}
    assert set(figures.index.unique("arm")) - {"shipped", "shipped-twin"} <= labelled
    assert len(runs.of(known, "03-gated")) == 3 and len(runs.roles(known)) == 6
    gap = stats.extreme(stats.gaps(figures, "gated", "oracle"), -1)
    assert gap.text(2, "+").startswith("-0.09") and len(gap.seeds) == 3
    cells = runs.recorded(known, "attribution_cells")
    assert attribution.attribute(cells)["objects"] == 78
    for ours, theirs in PLAN["contrasts"]:
        assert {ours, theirs} <= {*PLAN["arms"], "decoder render", "copy_input"}


def test_notebook_04_tells_the_whole_story(tmp_path: Path) -> None:
    synthetic.write_study(tmp_path / "study", seeds=2)
    parameters = {"reports_dir": str(tmp_path / "study"), "attribution_source": ""}
    done = report.run(NOTEBOOK, parameters, "04", tmp_path, progress=False)
    assert not done.crashed, done.record.error
    found = done.record.metrics
    assert done.record.verdict == "DONE" and found["missing_runs"] == []
    assert {c for c in ("decoder", "exposure", "current") if found["claims"][c] == "open"} == {
        "decoder",
        "exposure",
        "current",
    }, "nothing was attributed"
    assert found["claims"]["abandon"] == "refuted" and found["claims"]["early"] == "confirmed"
    assert found["differences_db"]["gated - oracle"]["0-30"]["mean"] == pytest.approx(
        -0.3, abs=1e-3
    )
    page = done.report.read_text()
    assert page.count("What would change our mind?") == len(SAID)
    assert "<em>Written from the verdicts" not in page and "Of the original report" in page
    for text in ("@software", "def validate", "object pictured", "Chair", SAID["early"].quote):
        assert text in page
