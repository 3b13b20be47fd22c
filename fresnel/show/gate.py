"""What the gate measured, as a reader sees it: figures by azimuth, the findings, the worst views.

Functions that describe return a figure's alternative text, from the numbers that it draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fresnel.data.dataset import MultiViewDataset
from fresnel.gate.verdict import Verdict
from fresnel.show.pictures import on_ground

_RATIOS = ["coverage_ratio", "luminance_ratio", "frame_luminance_ratio"]


def _measured(verdict: Verdict) -> pd.DataFrame:
    """A row a view. ``frame_luminance_ratio`` is the light of the whole picture before black
    (covered area times its luminance), so an empty view has 0 of it; ``luminance_ratio`` is that of
    covered pixels only, which empty views do not have."""
    columns = ["object", "view", "azimuth_deg", "empty", *_RATIOS[:2]]
    rows = pd.DataFrame(verdict.measurements, columns=columns).astype(
        dict.fromkeys(columns[2:], float)
    )
    rows = rows.replace([np.inf, -np.inf], np.nan)
    return rows.assign(frame_luminance_ratio=rows.coverage_ratio * rows.luminance_ratio.fillna(0))


def azimuth_profile(verdict: Verdict) -> dict[str, list[float]]:
    """Coverage and light by azimuth in 45 degree steps, as ratios to the inputs'."""
    rows = _measured(verdict)
    at = 180 - (180 - 45 * (rows.azimuth_deg / 45).round()) % 360
    near, steps = rows.groupby(at), [float(a) for a in range(-135, 181, 45)]
    means = near[_RATIOS].mean().reindex(steps)
    views = near.size().reindex(steps, fill_value=0).astype(float)
    return {"azimuth_deg": steps, **means.to_dict("list"), "views": views.tolist()}


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
    rows = _measured(verdict)
    return (
        f"Inputs beside their views: {rows['empty'].sum():.0f} of {len(rows)} views are empty; on "
        f"average a view shows {rows.coverage_ratio.mean():.2f} of the area that its input shows."
    )


def worst_views(
    data: MultiViewDataset, verdict: Verdict, count: int = 8
) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Pictures, captions and records' names of the views with the least of their input's light."""
    rows = _measured(verdict).sort_values("frame_luminance_ratio", kind="stable")[:count]
    seen = [
        (data[data.names.index(name)], view)
        for name, view in zip(rows.object, rows.view, strict=True)
    ]
    pictures = [on_ground(record.rgb[view], record.alpha[view]) for record, view in seen]
    captions = [
        f"{azimuth:+.0f}\N{DEGREE SIGN}, {area:.2f}"
        for azimuth, area in zip(rows.azimuth_deg, rows.coverage_ratio, strict=True)
    ]
    return pictures, captions, rows.object.tolist()


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
    return rows + [{"rank": "-", "finding": "note", "what": note} for note in verdict.notes]


def gate_metrics(verdict: Verdict) -> dict[str, Any]:
    """The gate's key figures for results.json."""
    rows = _measured(verdict)
    return {
        **{name: float(rows[name].mean()) for name in _RATIOS},
        "empty_views": float(rows["empty"].mean()),
        "views_seen": len(rows),
        "gate_duration_s": verdict.duration_s,
        "gate_figures": verdict.figures,
        "gate_codes": [reason.code for reason in verdict.reasons],
    }
