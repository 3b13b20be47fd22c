"""A study that nobody ran: results.json of every step of notebooks/params/study.yaml, made up.

Written by the code that writes true ones (`record`, `evaluate`), so that their schema is the true
one.  Every figure is known beforehand: see `LEVELS`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fresnel.evaluation import metrics as evaluate
from fresnel.evaluation.metrics import AZIMUTH_BINS
from fresnel.report import record
from fresnel.study import results

BINS = [name for name, _ in AZIMUTH_BINS]
LEVELS = {
    "decoder-A": 19.8, "decoder-A50": 18.6, "decoder-frontal": 15.5,
    "original": 9.0, "ungated": 19.2, "gated": 19.6, "regression": 19.0, "oracle": 19.9,
    "oracle-any": 20.4, "A-only": 19.4, "render": 20.3,
    "refine": 20.35, "refine-B": 20.4, "A50-refine": 18.75, "refine-short": 20.15,
    "rest50-gated": 18.9, "rest50-oracle": 19.5, "A50-only": 18.0, "A50-render": 18.7,
    "loss-original-alpha-consistency": 10.0, "loss-original-laplacian-consistency": 9.5,
    "loss-original-alpha-onestep": 9.2, "loss-corrected-laplacian-onestep": 17.0,
    "loss-corrected-laplacian-consistency": 18.0, "loss-corrected-alpha-onestep": 18.4,
    "decoder-train": 19.75, "decoder-many": 19.7, "long-gated": 19.65, "long-oracle": 19.95,
    "long-refine": 20.25, "decoder-shapes-A": 19.85, "decoder-shapes": 19.88,
    "decoder-shapes-A50": 18.65, "shapes50-gated": 19.1, "twin": 20.38, "twin-shipped": 20.36,
}  # fmt: skip
"""Arm -> dB over black in the first bin; each further bin is 0.8 dB lower."""
COPY, MEAN, BLACK = 16.0, 14.3, 13.0
SEED_STEP = 0.1
"""dB by which seed 1 is above seed 0, and seed 2 above seed 1."""
OBJECTS = 10


def model_of(arm: str) -> str:
    if arm.startswith("decoder"):
        return "decoder-frontal" if arm == "decoder-frontal" else "decoder"
    if "refine" in arm:
        return "cvs-refine"
    if arm.startswith("twin"):
        return "cvs-twin"
    return "cvs-render" if arm.endswith("render") else "cvs"


def rows(level: float, light: float, seed: int) -> list[dict[str, Any]]:
    """What `evaluate.evaluate` returns, of a predictor at this level: each object has its own
    difficulty, the same for every predictor, and a little of its own."""
    difficulty = np.random.default_rng(0).normal(0, 1.5, OBJECTS)
    own = np.random.default_rng([seed, int(100 * level)]).normal(0, 0.2, OBJECTS)
    own -= own.mean()
    difficulty -= difficulty.mean()
    made = []
    for i in range(OBJECTS):
        for k, (name, upper) in enumerate(AZIMUTH_BINS):
            db = level - 0.8 * k + difficulty[i] + own[i] + SEED_STEP * seed
            made.append(
                {
                    "object": f"o{i}", "record": f"o{i}__0", "view": k, "azimuth_deg": upper,
                    "bin": name, "psnr": db, "psnr_white": db + 0.5, "psnr_foreground": db - 4,
                    "ssim": 0.8, "ssim_foreground": 0.6, "alpha_mae": 0.05,
                    "luminance": light * (1 + 0.1 * own[i]), "luminance_target": 1.0,
                    "coverage": min(1.0, 2 * light), "coverage_target": 1.0,
                }
            )  # fmt: skip
    return made


def training(arm: str, seed: int) -> dict[str, Any]:
    """The metrics of a training, as notebook 03 records them."""
    model, level = model_of(arm), LEVELS[arm]
    light = 0.03 if "original" in arm else 0.97
    measured = {model: rows(level, light, seed), "copy_input": rows(COPY, 1.0, 0)}
    measured |= {"mean_image": rows(MEAN, 1.0, 0), "black_image": rows(BLACK, 0.0, 0)}
    if not arm.startswith("decoder"):
        own = "decoder-A50" if "50" in arm else "decoder-A"
        measured["decoder render"] = rows(LEVELS[own], 1.0, seed)
        measured |= {f"cvs, {n} steps": rows(level + 0.1 * n, light, seed) for n in (2, 4)}
    summaries = {n: evaluate.summarise(found) for n, found in measured.items()}
    overall = summaries[model][-1]
    return {
        **{name: overall[name] for name in ("luminance_ratio", "coverage_ratio", "psnr", "ssim")},
        "loss_fall": 12.0 + seed, "loss_history": [[1, 0.5], [100, 0.1], [3000, 0.04]],
        "steps": 3000, "samples_per_s": 330.0, "train_duration_s": 300.0 + seed,
        "summaries": summaries, **results.psnr_by_object(measured),
        "credits": [
            {"title": "Chair", "author": "Somebody", "licence": "CC-BY-3.0", "source": "a place"}
        ],
    }  # fmt: skip


def write_study(folder: Path, *, seeds: int = 3) -> None:
    """All runs of the study below a reports folder; pictures are plain."""
    run = record.start("03_full_train", {"model": "cvs"}, str(folder / "one"), seed=0)
    run.finish("PASS", "synthetic")
    template = json.loads((folder / "one" / "results.json").read_text())
    (folder / "one" / "results.json").unlink()

    def write(name: str, notebook: str, verdict: str, duration_s: float, **more: Any) -> None:
        place = folder / "runs" / f"20260101T000000Z-{name}"
        place.mkdir(parents=True)
        stages = [
            {
                "name": "train" if notebook.startswith("03") else "make", "failed": False,
                "duration_s": 0.8 * duration_s, "peak_rss_bytes": 1, "peak_cuda_bytes": None,
            }
        ]  # fmt: skip
        changed = {
            "name": name, "notebook": notebook, "verdict": verdict, "summary": f"{name}: made up",
            "duration_s": duration_s, "price_per_hour_usd": 3.6, "stages": stages,
            "cost_usd": duration_s / 1000, "started_utc": "2026-01-01T00:00:00+00:00", **more,
        }  # fmt: skip
        pictures = changed.get("artifacts", {})
        for picture in pictures.values():
            Image.new("RGB", (900, 420), "#8899aa").save(place / picture)
        (place / "results.json").write_text(json.dumps({**template, **changed}))

    azimuths = [float(a) for a in range(-135, 181, 45)]
    for seed in range(seeds):
        for arm in LEVELS:
            params = {"model": model_of(arm), "seed": seed}
            write(
                f"03-{arm}-s{seed}", "03_full_train", "FAIL" if "original" in arm else "PASS",
                360.0, params=params, metrics=training(arm, seed),
                artifacts={"held_out": "held_out.png"},
            )  # fmt: skip
        for kind, light in (("original", 0.1), ("bootstrap", 0.95)):
            bad = kind == "original"
            profile = {"azimuth_deg": azimuths, "frame_luminance_ratio": [light] * 8}
            metrics = {
                "profile": profile, "frame_luminance_ratio": light, "gate_duration_s": 0.9,
                "gate_codes": ["pivot_offset"] if bad else [],
            }  # fmt: skip
            reasons = ["the pivot is 2.3 units from the object"] if bad else []
            write(
                f"01-{kind}-B-s{seed}", "01_validate_data", "FAIL" if bad else "PASS", 60.0,
                metrics=metrics, reasons=reasons, artifacts={"views": "views.png"},
            )  # fmt: skip
            write(
                f"02-{kind}-B-s{seed}", "02_smoke_train", "NO-GO" if bad else "GO", 40.0,
                reasons=["the targets are empty"] if bad else [],
            )  # fmt: skip
