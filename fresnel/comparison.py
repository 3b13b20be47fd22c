"""Arms and seeds of a study compared: means with their spread, differences paired by object."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fresnel.evaluate import AZIMUTH_BINS, format_rows, paired_difference

Study = Mapping[str, Mapping[int, dict[str, Any]]]
"""Arm -> seed -> the newest finished run's record."""


def study_runs(reports: str | Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The finished runs named 03-ARM-sSEED below a reports folder (`fresnel.driver`)."""
    study: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(Path(reports).glob("**/results.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            name = re.fullmatch(r"03-(.+)-s(\d+)", record["name"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if name is None or record.get("status") != "finished" or record["verdict"] == "REFUSED":
            continue
        seeds = study.setdefault(name[1], {})
        before = seeds.get(int(name[2]))
        if before is None or record["started_utc"] > before["started_utc"]:
            seeds[int(name[2])] = {**record, "folder": str(path.parent)}
    return {name: dict(sorted(seeds.items())) for name, seeds in sorted(study.items())}


def difference(
    ours: Mapping[int, dict[str, Any]],
    theirs: Mapping[int, dict[str, Any]],
    azimuth_bin: str,
    against: str = "",
) -> tuple[float, float, float]:
    """PSNR of one arm minus another's in a bin, paired by object, means over seeds: mean, interval.

    Args:
        against: take this predictor of `theirs` (such as "decoder render"), not its own model.
    """
    return paired_difference(_objects(ours, azimuth_bin), _objects(theirs, azimuth_bin, against))


def _objects(
    seeds: Mapping[int, dict[str, Any]], azimuth_bin: str, which: str = ""
) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in seeds.values():
        found = run["metrics"]["psnr_by_object"].get(which or run["params"]["model"], {})
        for name, value in found.get(azimuth_bin, {}).items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: mean(found) for name, found in values.items()}


def arms_table(study: Study, *, reference: str = "oracle") -> str:
    """PSNR by bin, light and area of every arm, means over seeds with their spread (Markdown).

    The last two columns: all azimuths, paired by object, against the reference arm, and against
    the decoder's own render in the same run.
    """
    rows = []
    for arm, seeds in study.items():
        runs = list(seeds.values())
        model = runs[0]["params"]["model"]
        row = {"arm": arm, "seeds": str(len(runs))}
        for name in (*(name for name, _ in AZIMUTH_BINS), "all"):
            row[f"dB, {name}"] = _spread([in_bin(run, model, name, "psnr") for run in runs], 1)
        for metric in ("luminance_ratio", "coverage_ratio"):
            row[metric.replace("_", " ")] = _spread([in_bin(r, model, "all", metric) for r in runs])
        row["train s"] = _spread([run["metrics"]["train_duration_s"] for run in runs], 0)
        there = reference in study and arm != reference
        row[f"- {reference}, dB"] = (
            _interval(difference(seeds, study[reference], "all")) if there else "-"
        )
        row["- decoder render, dB"] = _interval(difference(seeds, seeds, "all", "decoder render"))
        rows.append(row)
    return format_rows(rows) or "No arm has run yet: notebooks/params/study_arms.yaml."


def loss_table(study: Study) -> str:
    """The eight cells of the loss side, means over seeds (Markdown)."""
    rows = []
    for data, mask, network in itertools.product(
        ("original", "corrected"), ("laplacian", "alpha"), ("onestep", "consistency")
    ):
        runs = list(study.get(f"loss-{data}-{mask}-{network}", {}).values())
        row = {"data": data, "mask": mask, "network": network, "seeds": str(len(runs))}
        for metric, digits in (("luminance_ratio", 2), ("coverage_ratio", 2), ("psnr", 1)):
            values = [in_bin(run, "cvs", "all", metric) for run in runs]
            row[metric.replace("_", " ")] = _spread(values, digits) if runs else "-"
        rows.append(row)
    if not any(row["seeds"] != "0" for row in rows):
        return "No cell has run yet: notebooks/params/study_loss.yaml."
    return format_rows(rows)


def in_bin(run: Mapping[str, Any], model: str, azimuth_bin: str, metric: str) -> float:
    """A metric of one of a run's predictors in a bin; NaN where it was not measured."""
    summary = run["metrics"]["summaries"][model]
    value = next((entry[metric] for entry in summary if entry["bin"] == azimuth_bin), None)
    return math.nan if value is None else value


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def _spread(values: Sequence[float], digits: int = 2) -> str:
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def _interval(found: tuple[float, float, float]) -> str:
    gap, low, high = found
    if not math.isfinite(gap):
        return "-"
    return f"{gap:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "")
