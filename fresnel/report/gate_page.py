"""A verdict as a page: what is wrong, and the pictures that show it.

`write` makes one HTML file that needs nothing else, for `python -m fresnel validate --html`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.gate.findings import GateConfig
from fresnel.gate.verdict import Verdict
from fresnel.report.sheet import Picture, Section
from fresnel.report.sheet import write as write_sheet

_SHOWN = 4
_TELLS = {
    "pivot_offset": "pivot_relative",
    "pose_mismatch": "mismatch",
    "pose_convention": "mismatch",
    "mirrored": "mismatch",
    "focal_length": "mismatch",
    "principal_point": "centroid_residual",
    "depth_mismatch": "stray",
    "input_pose": "input_miss",
    "frozen_views": "frozen",
    "colours_disagree": "photometric",
    "exposure_drift": "drift",
    "up_axis": "up_tilt_deg",
    "channels_swapped": "swapped",
    "identity_mismatch": "-identity_psnr",
}
"""The number of a record that says how much it shows a fault; a minus where low is bad."""
_OF_VIEWS = {
    "views_dark": "-luminance_ratio",
    "views_bright": "luminance_ratio",
    "views_empty": "-coverage_ratio",
    "billboard": "-coverage_ratio",
    "constant_frames": "constant",
    "out_of_frame": "border",
    "blurred": "-detail_ratio",
    "noisy": "grain",
    "clipped": "clipped",
}
"""The same of a view."""


def write(path: str | Path, data: Any, verdict: Verdict, config: GateConfig | None = None) -> Path:
    """Write the page; a picture that can't be drawn (a record that can't be read) is left out.

    Args:
        data: the `MultiViewDataset` that the verdict is about.
    """
    word = "PASS" if verdict.passed else "FAIL"
    seen = f"{verdict.examples_seen} of {verdict.examples_total} records"
    sections = [
        Section("What was found", _found(verdict), rows=_reasons(verdict)),
        *_evidence(data, verdict),
        Section("Figures", "Medians and shares over what was seen.", rows=_figures(verdict)),
        Section(
            "Not checked",
            "" if verdict.notes else "Every check could be made.",
            rows=[{"note": note} for note in verdict.notes],
        ),
        Section("Thresholds", rows=_thresholds(config or GateConfig())),
    ]
    return write_sheet(
        path,
        title=f"Is {data.path.resolve().name} fit to train on?",
        badge=word,
        kicker=f"{seen} · {verdict.duration_s:.1f} s · {verdict.dataset_hash[:19]}",
        summary=verdict.summary,
        sections=[part for part in sections if part.text or part.rows or part.pictures],
    )


def _found(verdict: Verdict) -> str:
    if verdict.passed:
        return "No check failed."
    return (
        "Most likely cause first, then what follows from it. The gate looks at ten examples, goes "
        "on while undecided, and passes a set only after all of it."
    )


def _reasons(verdict: Verdict) -> list[dict[str, str]]:
    return [
        {
            "rank": str(rank),
            "finding": f"**{reason.code}**",
            "what": reason.message,
            "what to do": reason.hint + ("; `--fix` mends it in a copy" if reason.mend else ""),
            "symptom of": reason.symptom_of or "",
        }
        for rank, reason in enumerate(verdict.reasons, 1)
    ]


def _figures(verdict: Verdict) -> list[dict[str, str]]:
    shown = {name: value for name, value in verdict.figures.items() if np.isfinite(value)}
    return [{"figure": name.replace("_", " "), "value": f"{v:.4g}"} for name, v in shown.items()]


def _thresholds(config: GateConfig) -> list[dict[str, str]]:
    return [
        {"threshold": name.replace("_", " "), "value": f"{value:g}"}
        for name, value in vars(config).items()
    ]


def _evidence(data: Any, verdict: Verdict) -> list[Section]:
    from fresnel.show import charts, pictures
    from fresnel.show import gate as evidence

    worst = _worst_records(data, verdict)
    sections = []
    sheet = _drawn(lambda: _sheet(data, worst), _alt_of_sheet(verdict, worst))
    sections.append(Section("The records that show it most", _how(verdict), sheet))
    views = _worst_views(verdict)
    if views:
        captions = [f"{row['azimuth_deg']:+.0f} deg" for row in views]
        alt = f"The worst views by {_key(verdict, _OF_VIEWS).lstrip('-').replace('_', ' ')}: "
        alt += "; ".join(f"{row['object']} view {row['view']}" for row in views)
        drawn = _drawn(
            lambda: pictures.contact_sheet(
                [[data[_at(data, row)].rgb[row["view"]].numpy() for row in views]],
                columns=captions,
                first_apart=False,
            ),
            alt + ".",
        )
        sections.append(Section("The worst views", alt + ".", drawn))
    profile = evidence.azimuth_profile(verdict)
    if np.isfinite(profile["coverage_ratio"]).any():
        rose = _drawn(
            lambda: charts.azimuth_rose(
                profile["azimuth_deg"],
                {
                    "coverage, views / input": profile["coverage_ratio"],
                    "luminance, views / input": profile["frame_luminance_ratio"],
                },
            ),
            evidence.describe_profile(profile),
        )
        text = "How much of the input's area and light each direction has; dashed: as much as it."
        sections.append(Section("By azimuth", text, rose))
    if worst:
        sections.append(_cameras(data, worst[0]))
    return [section for section in sections if section.pictures]


def _cameras(data: Any, index: int) -> Section:
    from fresnel.show import charts, widgets

    def frusta() -> Any:
        record = data[index]
        return charts.camera_frusta(
            record.cameras,
            record.input_camera,
            pivot=record.pivot.tolist(),
            content=widgets.content_points(record),
        )

    def words() -> str:
        record = data[index]
        return widgets.describe_geometry(record, widgets.content_points(record))

    text = f"Where the cameras of {data.names[index]} stand, look, and are said to turn about."
    return Section("Cameras and pivot", text, _drawn(frusta, words))


def _drawn(draw: Callable[[], Any], alt: str | Callable[[], str]) -> list[Picture]:
    """The picture as PNG; nothing where the data is too broken to draw."""
    from fresnel.show import style as figures

    try:
        return [Picture(figures.to_png(draw()), alt if isinstance(alt, str) else alt())]
    except (ValueError, OSError, RuntimeError, IndexError, np.linalg.LinAlgError):
        return []


def _key(verdict: Verdict, known: dict[str, str]) -> str:
    """What the first finding that is in `known` is measured by; "" if none is."""
    return next((known[r.code] for r in verdict.reasons[:1] if r.code in known), "")


def _sorted_by(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    sign, name = (1, key[1:]) if key.startswith("-") else (-1, key)
    known = [row for row in rows if np.isfinite(float(row.get(name, np.nan)))]
    return sorted(known, key=lambda row: sign * float(row[name]))


def _worst_views(verdict: Verdict, count: int = 8) -> list[dict[str, Any]]:
    key = _key(verdict, _OF_VIEWS)
    return _sorted_by(verdict.measurements, key)[:count] if key else []


def _worst_records(data: Any, verdict: Verdict) -> list[int]:
    """Places in the dataset of the records to show: what the first finding measures decides, then
    the views' light, then the order in which they were read."""
    rows = [row for row in verdict.objects if not row.get("error")]
    key = _key(verdict, _TELLS)
    if key:
        rows = _sorted_by(rows, key) or rows
    elif views := _worst_views(verdict, len(verdict.measurements)):
        order = list(dict.fromkeys(row["object"] for row in views))
        rows = sorted(
            rows, key=lambda row: order.index(row["name"]) if row["name"] in order else len(order)
        )
    return [list(data.names).index(row["name"]) for row in rows[:_SHOWN]]


def _at(data: Any, row: dict[str, Any]) -> int:
    return list(data.names).index(row["object"])


def _sheet(data: Any, worst: Sequence[int]) -> np.ndarray:
    from fresnel.show import pictures
    from fresnel.show import style as figures

    rows, azimuths, names = pictures.picture_rows(data.subset(list(worst)), limit=_SHOWN)
    columns = ["input", *figures.azimuth_labels(azimuths)]
    return pictures.contact_sheet([row[:13] for row in rows], columns=columns[:13], labels=names)


def _how(verdict: Verdict) -> str:
    key = _key(verdict, _TELLS) or _key(verdict, _OF_VIEWS)
    by = f", worst first by {key.lstrip('-').replace('_', ' ')}" if key else ""
    return f"The input, then its views by azimuth{by}."


def _alt_of_sheet(verdict: Verdict, worst: Sequence[int]) -> str:
    from fresnel.show import gate as evidence

    return f"{len(worst)} records. {evidence.describe_views(verdict)}"
