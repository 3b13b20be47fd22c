"""Claims against runs: every verdict follows from figures, and none from a run that is missing."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fresnel.analysis import claims as autopsy
from fresnel.analysis import comparison
from fresnel.evaluation import metrics as evaluate

BINS = [name for name, _ in evaluate.AZIMUTH_BINS]


def summary(psnr: float, light: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"bin": name, "psnr": psnr - i, "luminance_ratio": light, "coverage_ratio": 1.0}
        for i, name in enumerate([*BINS, "all"])
    ]


def arm(psnr: float, *, model: str = "cvs", spread: float = 0.0, copy: float = 15.0) -> dict:
    objects = {f"o{i}": psnr + 3 * (i % 3) + spread * (-1) ** i for i in range(9)}
    render = {name: value - 1.0 for name, value in objects.items()}
    flat = [{**entry, "psnr": copy} for entry in summary(copy)]
    return {
        "params": {"model": model},
        "metrics": {
            "summaries": {model: summary(psnr), "copy_input": flat},
            "psnr_by_object": {
                model: dict.fromkeys([*BINS, "all"], objects),
                "decoder render": dict.fromkeys([*BINS, "all"], render),
            },
            "train_duration_s": 300.0,
            **{"luminance_ratio": 1.0, "coverage_ratio": 1.0, "psnr": psnr, "loss_fall": 9.0},
        },
    }


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def said(rows: list[dict[str, str]]) -> dict[str, str]:
    return {row["id"]: row["verdict"] for row in rows}


def split(**shares: float) -> dict[str, Any]:
    def entry(share: float) -> dict[str, float]:
        return {
            "share": share, "share_low": share - 0.04, "share_high": share + 0.04, "alone": share,
        }  # fmt: skip

    cell = {"cell": "1010", "light": 0.9, "codes": ["out_of_frame"]}
    factors = {name: entry(share) for name, share in shares.items()}
    return {"light": {"factors": factors}, "cells": [cell]}


def test_without_runs_all_is_open_but_what_a_formula_says() -> None:
    rows = autopsy.claims({})
    verdicts = said(rows)
    assert len(rows) == 10 and all(row["test"] and row["measured"] for row in rows)
    mask = verdicts.pop("mask")
    assert mask == "refuted" and set(verdicts.values()) == {"open"}
    measured = next(row["measured"] for row in rows if row["id"] == "mask")
    assert "0.73" in measured and "edge 0.00" in measured
    assert autopsy.claims_table(rows).count("**open**") == 9


def test_the_attribution_decides_on_decoder_and_exposure() -> None:
    found = split(path=0.9, decoder=0.05, position=0.04, exposure=0.01)
    rows = autopsy.claims({}, found)
    assert "still objects to: out_of_frame" in rows[0]["measured"], "bright is not good"
    verdicts = said(rows)
    assert verdicts["decoder"].startswith("refuted") and verdicts["exposure"] == "refuted"
    found = split(path=0.1, decoder=0.7, position=0.0, exposure=0.2)
    verdicts = said(autopsy.claims({}, found))
    assert verdicts["decoder"] == "confirmed" and verdicts["exposure"] == "open"
    unsure = split(path=0.52, decoder=0.48, position=0.0, exposure=0.0)
    assert said(autopsy.claims({}, unsure))["decoder"] == "open"
    for entry in found["light"]["factors"].values():
        entry |= {"share_low": math.nan, "share_high": math.nan}
    assert said(autopsy.claims({}, found))["exposure"] == "open", "one object decides nothing"


def test_the_arms_decide_on_external_data_frontal_views_and_the_loss() -> None:
    study = {
        "gated": {0: arm(20.0, spread=0.2), 1: arm(20.2)},
        "oracle": {0: arm(20.3), 1: arm(20.3)},
        "decoder-frontal": {0: arm(18.0, model="decoder-frontal")},
        "loss-corrected-laplacian-onestep": {0: arm(15.0)},
        "loss-corrected-alpha-consistency": {0: arm(19.0)},
    }
    verdicts = said(autopsy.claims({}, None, study))
    assert verdicts["external"] == "refuted", "the bootstrap is within half a dB"
    scarce = {**study, "rest50-gated": {0: arm(19.0)}, "rest50-oracle": {0: arm(20.0)}}
    external = said(autopsy.claims({}, None, scarce))["external"]
    assert external == "refuted where the decoder has seen enough"
    assert verdicts["viable"] == "refuted for light and area"
    assert verdicts["frontal"] == "confirmed" and verdicts["cvs"] == "refuted in part"
    study["oracle"] = {0: arm(23.0)}
    assert said(autopsy.claims({}, None, study))["external"] == "confirmed"


def test_the_main_jobs_runs_decide_on_the_rest() -> None:
    gate = {"verdict": "FAIL", "reasons": ["the pivot"], "duration_s": 20.0, "summary": ""}
    runs = {
        "01-original": {**gate, "metrics": {"gate_duration_s": 0.7}},
        "02-control": {
            "verdict": "NO-GO", "duration_s": 9.0, "reasons": ["empty targets"], "summary": "",
        },
        "03-control": {"metrics": {"loss_fall": 22.0, "luminance_ratio": 0.2}},
        "03-corrected": {"metrics": {"luminance_ratio": 0.9, "coverage_ratio": 1.0, "psnr": 23.0}},
    }  # fmt: skip
    verdicts = said(autopsy.claims(runs))
    assert verdicts["loss"] == "confirmed, and misleading"
    assert verdicts["epochs"] == "refuted" and verdicts["early"] == "confirmed"
    assert verdicts["viable"] == "refuted for light and area"
    assert autopsy.summary(runs, None, {}, []).endswith("Targets: 0 met, 0 missed, 0 not run.")


def test_arms_are_compared_by_seed_and_object(tmp_path: Path) -> None:
    for name, psnr, started in (
        ("03-gated-s0", 20.0, "2026-01-01"), ("03-gated-s0", 21.0, "2026-01-02"),
        ("03-gated-s1", 22.0, "2026-01-01"), ("03-oracle-s0", 22.0, "2026-01-01"),
    ):  # fmt: skip
        folder = tmp_path / "runs" / f"{started}-{name}"
        folder.mkdir(parents=True)
        record = {
            "name": name, "status": "finished", "verdict": "PASS", "started_utc": started,
            **arm(psnr),
        }  # fmt: skip
        (folder / "results.json").write_text(json.dumps(record))
    (folder / "results.json").with_name("broken").mkdir()
    (folder / "broken" / "results.json").write_text("{")
    study = comparison.study_runs(comparison.newest_runs(tmp_path))
    assert {name: list(seeds) for name, seeds in study.items()} == {"gated": [0, 1], "oracle": [0]}
    gap = comparison.difference(study["gated"], study["oracle"], "0-30")
    assert (gap.mean, gap.low, gap.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert gap.seeds == pytest.approx((-1.0,)), "only seed 0 has both"
    render = comparison.difference(study["gated"], study["gated"], "0-30", against="decoder render")
    assert render.mean == pytest.approx(1.0)
    table = plain(comparison.arms_table(study))
    assert "17.5 ± 0.7" in table and table.count("bootstrap on B") == 1  # "all" is the fifth bin
    assert comparison.arms_table({}).startswith("No arm has run yet")


def test_the_loss_side_is_a_table_of_eight_cells() -> None:
    assert comparison.loss_table({}).startswith("No cell has run yet")
    two = {0: arm(17.0), 1: arm(18.0)}
    table = comparison.loss_table({"loss-original-alpha-onestep": two})
    assert table.count("\n") == 9 and "13.5 ± 0.7" in plain(table)


def test_two_loss_cells_are_arms() -> None:
    study = {"original": {0: arm(9.0)}, "ungated": {0: arm(19.0)}}
    table = comparison.loss_table(study)
    assert table.count("| 1 |") == 2
    assert comparison.loss_cell(study, "corrected", "alpha", "consistency") == study["ungated"]
    assert comparison.loss_cell(study, "original", "laplacian", "onestep") == study["original"]
    own = {**study, "loss-original-laplacian-onestep": {0: arm(8.0)}}
    assert comparison.loss_cell(own, "original", "laplacian", "onestep") != study["original"]


def test_every_lesson_leads_to_a_check_that_exists() -> None:
    page = autopsy.enforcement()
    for _, function, _ in autopsy.LESSONS:
        module, _, name = function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name)), function
        assert f"def {name}(" in page, "the page holds the check's code"
    links = set(re.findall(r"\(#([^)]+)\)", autopsy.lessons_table()))
    assert links == set(re.findall(r"id='([^']+)'", page)) and len(links) > 5
    assert autopsy.lessons_table().count("\n") == len(autopsy.LESSONS) + 1


def test_the_citation_names_version_commit_and_date() -> None:
    text = autopsy.citation({"git": {"commit": "abcdef1234567890"}}, "2026-11-22T10:00:00+00:00")
    assert text.count("abcdef123456") == 2 and text.count("2026") == 2, "in words and as BibTeX"
    assert "month   = {11}" in text and text.count("{") == text.count("}")
    assert "unknown" in autopsy.citation({}) and "n.d." in autopsy.citation({})
