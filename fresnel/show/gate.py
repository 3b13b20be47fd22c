"""What the gate measured, as a reader sees it: figures by azimuth, the findings, the worst views.

Functions that describe return a figure's alternative text, from the numbers that it draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fresnel.data.dataset import MultiViewDataset
from fresnel.gate.verdict import Verdict


def azimuth_profile(verdict: Verdict) -> dict[str, list[float]]:
    """Coverage and light by azimuth in 45 degree steps, as ratios to the inputs'.

    ``frame_luminance_ratio`` is the light of the whole picture before black (covered area times
    its luminance), so an empty view has 0 of it; ``luminance_ratio`` is that of covered pixels
    only, which empty views do not have.
    """
    azimuths = [float(a) for a in range(-135, 181, 45)]
    near = {azimuth: list[Mapping[str, Any]]() for azimuth in azimuths}
    for row in verdict.measurements:
        if math.isfinite(azimuth := row.get("azimuth_deg", math.nan)):
            near[180.0 - (180 - 45 * round(azimuth / 45)) % 360].append(row)
    ratios = {
        name: [_mean(row[name] for row in rows) for rows in near.values()]
        for name in ("coverage_ratio", "luminance_ratio")
    }
    light = [_mean(map(_light, rows)) for rows in near.values()]
    views = [float(len(rows)) for rows in near.values()]
    return {"azimuth_deg": azimuths, **ratios, "frame_luminance_ratio": light, "views": views}


def describe_profile(profile: Mapping[str, Sequence[float]]) -> str:
    """Alt text of the rose."""
    columns = (profile[n] for n in ("azimuth_deg", "coverage_ratio", "frame_luminance_ratio"))
    parts = [
        f"{azimuth:+.0f} degrees: {area:.2f} of the input's area, {light:.2f} of its light"
        for azimuth, area, light in zip(*columns, strict=True)
    ]
    return "Views against their input, by azimuth. " + "; ".join(parts) + "."


def describe_views(verdict: Verdict) -> str:
    """Alt text of a sheet of inputs beside their views."""
    empty = [row["empty"] for row in verdict.measurements]
    coverage = _mean(row["coverage_ratio"] for row in verdict.measurements)
    return (
        f"Inputs beside their views: {sum(empty)} of {len(empty)} views are empty; on "
        f"average a view shows {coverage:.2f} of the area that its input shows."
    )


def worst_views(
    data: MultiViewDataset, verdict: Verdict, count: int = 8
) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Pictures, captions and records' names of the views with the least of their input's light."""
    rows = sorted(verdict.measurements, key=_light)[:count]
    pictures = [data[data.names.index(row["object"])].rgb[row["view"]].numpy() for row in rows]
    captions = [f"{r['azimuth_deg']:+.0f}\N{DEGREE SIGN}, {r['coverage_ratio']:.2f}" for r in rows]
    return pictures, captions, [row["object"] for row in rows]


def reasons_rows(verdict: Verdict) -> list[dict[str, str]]:
    """The gate's findings for a table, most likely cause first; one row that says so of none."""
    rows = [
        {
            "rank": str(rank),
            "finding": reason.code,
            "what": reason.message,
            "what to do": reason.hint,
            "symptom of": reason.symptom_of or "",
        }
        for rank, reason in enumerate(verdict.reasons, 1)
    ] or [{"rank": "-", "finding": "none", "what": "No check failed.", "what to do": "-"}]
    return rows + [{"rank": "-", "finding": "not checked", "what": note} for note in verdict.notes]


def gate_metrics(verdict: Verdict) -> dict[str, Any]:
    """The gate's key figures for results.json."""
    rows = verdict.measurements
    return {
        "coverage_ratio": _mean(r["coverage_ratio"] for r in rows),
        "luminance_ratio": _mean(r["luminance_ratio"] for r in rows),
        "frame_luminance_ratio": _mean(map(_light, rows)),
        "empty_views": _mean(float(r["empty"]) for r in rows),
        "views_seen": len(rows),
        "gate_duration_s": verdict.duration_s,
        "gate_figures": verdict.figures,
        "gate_codes": [reason.code for reason in verdict.reasons],
    }


def _light(row: Mapping[str, Any]) -> float:
    """A view's light over its input's, of the whole picture before black."""
    return float(row["coverage_ratio"] * np.nan_to_num(row["luminance_ratio"]))


def _mean(values: Iterable[Any]) -> float:
    array = np.array(list(values), dtype=float)
    array = array[np.isfinite(array)]
    return float(array.mean()) if len(array) else float("nan")
