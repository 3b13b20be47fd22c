"""From verdicts and datasets to what a report shows: rows of pictures, profiles, captions.

The functions that describe return the alternative text of a figure: the finding in words, computed
from the same numbers that the figure draws.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fresnel.bootstrap import ORIGINAL, place
from fresnel.data.dataset import MultiViewDataset, ObjectViews, ViewTensors
from fresnel.evaluation import metrics as evaluate
from fresnel.gate.verdict import Verdict
from fresnel.scene.cameras import Cameras, relative_azimuth_deg
from fresnel.scene.gaussians import Gaussians
from fresnel.show import style as figures
from fresnel.show import widgets as exhibits
from fresnel.show.credits import show_credits as show_credits  # a line of the notebooks, like these
from fresnel.study import arms


def save_picture(path: Path, picture: Any) -> Path:
    """Write a figure or RGB array as PNG."""
    path.write_bytes(figures.to_png(picture))
    return path


def view_azimuths(record: ObjectViews) -> list[float]:
    """Azimuths of the views relative to the input camera, degrees in (-180, 180]."""
    cameras = Cameras(
        record.cameras.viewmats[None],
        record.cameras.Ks[None],
        record.cameras.width,
        record.cameras.height,
    )
    source = Cameras(
        record.input_camera.viewmats[None],
        record.input_camera.Ks[None],
        record.input_camera.width,
        record.input_camera.height,
    )
    azimuth = relative_azimuth_deg(cameras, source, record.pivot)[0]
    return [float(a) if a > -179.99 else 180.0 for a in azimuth]


def picture_rows(
    data: MultiViewDataset, limit: int = 6
) -> tuple[list[list[np.ndarray]], list[float], list[str]]:
    """Rows of [input, views ordered by azimuth], the azimuths of the first row, and the names."""
    rows: list[list[np.ndarray]] = []
    azimuths: list[float] = []
    names: list[str] = []
    for i in np.linspace(0, len(data) - 1, min(limit, len(data))).round().astype(int):
        record = data[int(i)]
        angles = view_azimuths(record)
        order = np.argsort(angles)
        rows.append([record.input_rgb.numpy(), *(record.rgb[int(k)].numpy() for k in order)])
        azimuths = azimuths or [angles[k] for k in order]
        names.append(record.name)
    return rows, azimuths, names


def describe_views(verdict: Verdict) -> str:
    """Alt text of a sheet of inputs beside their views."""
    empty = [row["empty"] for row in verdict.measurements]
    coverage = _mean(row["coverage_ratio"] for row in verdict.measurements)
    return (
        f"Inputs beside their novel views: {sum(empty)} of {len(empty)} views are empty; on "
        f"average a view shows {coverage:.2f} of the area that its input shows."
    )


def azimuth_profile(verdict: Verdict) -> dict[str, list[float]]:
    """Coverage and light by azimuth in 45 degree steps, as ratios to the inputs'.

    ``frame_luminance_ratio`` is the light of the whole picture before black (covered area times
    its luminance), so an empty view has 0 of it; ``luminance_ratio`` is that of covered pixels
    only, which empty views do not have.
    """
    rows = [row for row in verdict.measurements if np.isfinite(row.get("azimuth_deg", np.nan))]
    azimuths = [float(a) for a in range(-135, 181, 45)]
    nearest = [round(row["azimuth_deg"] / 45.0) * 45 for row in rows]
    profile: dict[str, list[float]] = {
        "azimuth_deg": azimuths,
        "coverage_ratio": [],
        "luminance_ratio": [],
        "frame_luminance_ratio": [],
        "views": [],
    }
    for azimuth in azimuths:
        chosen = [r for r, a in zip(rows, nearest, strict=True) if (a - azimuth) % 360 == 0]
        light = [r["coverage_ratio"] * np.nan_to_num(r["luminance_ratio"]) for r in chosen]
        profile["coverage_ratio"].append(_mean(r["coverage_ratio"] for r in chosen))
        profile["luminance_ratio"].append(_mean(r["luminance_ratio"] for r in chosen))
        profile["frame_luminance_ratio"].append(_mean(light))
        profile["views"].append(float(len(chosen)))
    return profile


def describe_profile(profile: Mapping[str, Sequence[float]]) -> str:
    """Alt text of the rose."""
    parts = [
        f"{a:+.0f} degrees: {c:.2f} of the input's area, {light:.2f} of its light"
        for a, c, light in zip(
            profile["azimuth_deg"],
            profile["coverage_ratio"],
            profile["frame_luminance_ratio"],
            strict=True,
        )
    ]
    return "Views against their input, by azimuth. " + "; ".join(parts) + "."


def content_points(record: ObjectViews, limit: int = 1500) -> np.ndarray:
    """Points on the object in the world, (P, 3), from the input's and the views' depth maps."""
    means, _, _ = _covered_pixels(record)
    return means[_evenly(len(means), limit)].numpy()


def pixel_gaussians(record: ObjectViews, limit: int = 16_000) -> Gaussians:
    """The covered pixels of a record as Gaussians in the world, each as large as its pixel.

    What a trainer is shown, in 3D, whoever made it; no Gaussians at all without depth."""
    means, colors, radii = _covered_pixels(record)
    kept = _evenly(len(means), limit)
    means, colors, radii = means[kept], colors[kept], radii[kept]
    quats = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(len(means), 4)
    scales = radii[:, None].expand(-1, 3).clamp_min(1e-6)
    return Gaussians(means, quats, scales, torch.full((len(means),), 0.95), colors)


def scene(record: ObjectViews, gaussians: Gaussians | None = None) -> exhibits.Scene | None:
    """A record to turn in 3D: these Gaussians of it, or else its pixels; None if it has neither."""
    found = pixel_gaussians(record) if gaussians is None else gaussians
    shown = exhibits.scene(found, record.cameras, record.input_camera, record.pivot)
    return shown if shown.gaussians.num else None


def held_out_scene(
    model: str,
    network: Any,
    truth: ViewTensors,
    *,
    original: bool,
    device: str,
    weights: str | Path = "",
) -> exhibits.Scene:
    """The first held-out object as the model's decoder makes it: its own where the model is one,
    the one it is compared with where it is a CVS; in the original's world for the original."""
    first = truth[[0]]
    inputs, cameras, pivots = first.inputs, first.cameras, first.pivots
    source = inputs.cameras
    if model.startswith("cvs"):
        network = arms.load_decoder("patch" if original else "pixel", device, weights)
    with torch.no_grad():
        if original or model == "decoder-frontal":
            found, _ = place(inputs, network, ORIGINAL)
            source, cameras, pivots = arms.original_camera_map(inputs, cameras)
        else:
            found = network.world(inputs)
    return exhibits.scene(found[0], cameras[0], source[0], pivots[0])


def identity_pair(data: MultiViewDataset, limit: int = 8) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs, and what was rendered from the inputs' own cameras: two pictures of one size.

    None for data that has no such renders."""
    records = [data[int(i)] for i in _evenly(len(data), limit)]
    if any(record.identity_rgb is None for record in records):
        return None
    return (
        exhibits.tile([record.input_rgb for record in records]),
        exhibits.tile([record.identity_rgb for record in records]),
    )


def _covered_pixels(
    record: ObjectViews,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """World positions (P, 3), colours (P, 3) and half widths (P,) of all pixels with depth."""
    found = []
    seen_by = [(record.input_camera, record.input_depth, record.input_rgb)]
    if record.depth is not None:
        seen_by += [
            (record.cameras[i], record.depth[i], record.rgb[i]) for i in range(len(record.depth))
        ]
    for camera, depth, rgb in seen_by:
        if depth is None or not (depth > 0).any():
            continue
        y, x = torch.nonzero(depth > 0, as_tuple=True)
        pixels = torch.stack([x + 0.5, y + 0.5, torch.ones_like(x)], dim=-1).float()
        seen = (pixels @ torch.linalg.inv(camera.Ks).T) * depth[y, x][:, None]
        rotation, translation = camera.viewmats[:3, :3], camera.viewmats[:3, 3]
        radii = 0.5 * depth[y, x] / camera.Ks[0, 0]
        found.append(((seen - translation) @ rotation, rgb[y, x].float() / 255, radii))
    if not found:
        return torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0)
    means, colors, radii = (torch.cat(parts) for parts in zip(*found, strict=True))
    return means, colors, radii


def _evenly(count: int, limit: int) -> torch.Tensor:
    """Indices of at most `limit` of `count` things, evenly spread."""
    return torch.linspace(0, max(0, count - 1), min(limit, count)).round().long()


def describe_geometry(record: ObjectViews, content: np.ndarray) -> str:
    """Alt text of the camera figure."""
    distance = torch.linalg.norm(record.cameras.centers - record.pivot, dim=-1).mean()
    text = f"{len(record.cameras)} cameras stand {distance:.1f} units around the pivot; "
    if len(content) == 0:
        return text + "no depth says where the object is."
    away = np.linalg.norm(content.mean(axis=0) - record.pivot.numpy())
    return text + f"the object's centroid is {away:.1f} units away from the pivot."


def describe_training(
    fall: float, steps: int, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> str:
    """Alt text of the loss beside what the outputs are worth.

    curves: of `arms.validation_curves`."""
    text = f"The loss fell {fall:.1f}-fold over {steps} steps"
    for name, (_, values) in curves.items():
        text += f"; the held-out {name} went from {values[0]:.2f} to {values[-1]:.2f}"
    return text + "."


def worst_views(
    data: MultiViewDataset, verdict: Verdict, count: int = 8
) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Pictures, captions and names of the views with the least of their input's light."""
    rows = sorted(
        verdict.measurements,
        key=lambda r: r["coverage_ratio"] * np.nan_to_num(r["luminance_ratio"]),
    )
    pictures, captions = [], []
    for row in rows[:count]:
        record = data[data.names.index(row["object"])]
        pictures.append(record.rgb[row["view"]].numpy())
        captions.append(f"{row['azimuth_deg']:+.0f}\N{DEGREE SIGN}, {row['coverage_ratio']:.2f}")
    return pictures, captions, [row["object"] for row in rows[:count]]


def reasons_table(verdict: Verdict) -> str:
    """The gate's findings as a Markdown table, most likely cause first."""
    rows = [
        {
            "rank": str(rank),
            "finding": reason.code,
            "what": reason.message,
            "what to do": reason.hint,
            "symptom of": reason.symptom_of or "",
        }
        for rank, reason in enumerate(verdict.reasons, 1)
    ]
    notes = "".join(f"\n\n*Not checked:* {note}" for note in verdict.notes)
    return (evaluate.format_rows(rows) or "No check failed.") + notes


def gate_metrics(verdict: Verdict) -> dict[str, Any]:
    """The gate's key figures for results.json."""
    rows = verdict.measurements
    return {
        "coverage_ratio": _mean(r["coverage_ratio"] for r in rows),
        "luminance_ratio": _mean(r["luminance_ratio"] for r in rows),
        "frame_luminance_ratio": _mean(
            r["coverage_ratio"] * np.nan_to_num(r["luminance_ratio"]) for r in rows
        ),
        "empty_views": _mean(float(r["empty"]) for r in rows),
        "views_seen": len(rows),
        "gate_duration_s": verdict.duration_s,
        "gate_figures": verdict.figures,
        "gate_codes": [reason.code for reason in verdict.reasons],
    }


def novel_view_rows(
    truth: Any, predictors: Mapping[str, evaluate.Predictor], records: Sequence[int]
) -> tuple[list[list[np.ndarray]], list[str], list[float]]:
    """For each record, a row of true views and one per predictor, ordered by azimuth.

    Args:
        truth: `ViewTensors` of ground truth.

    Returns:
        Rows of [input, views...], a label per row, and the azimuths of the first record.
    """
    azimuths = relative_azimuth_deg(truth.cameras, truth.inputs.cameras, truth.pivots)
    rows, labels = [], []
    for i in records:
        angles = torch.where(azimuths[i] < -179.99, azimuths[i] + 360, azimuths[i])
        order = angles.argsort()
        one = truth[[i]]
        source = one.inputs.rgb[0].cpu().numpy()
        rows.append([source, *one.rgb[0][order].cpu().numpy()])
        labels.append(f"{truth.names[i]}: truth")
        for name, predict in predictors.items():
            with torch.no_grad():
                views = predict(one.inputs, one.cameras)
            rows.append([source, *views.rgb[0][order].float().cpu().numpy()])
            labels.append(f"{truth.names[i]}: {name}")
    first = azimuths[records[0]]
    first = torch.where(first < -179.99, first + 360, first).sort().values
    return rows, labels, [float(a) for a in first]


def by_object(
    measured: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """What two runs are compared by, pair by pair: PSNR of every object over black and over white,
    for results.json, in thousandths of a dB.

    The mean and the black image are left out, and further network calls over white: nothing is
    paired with them, and a study of 60 runs is to stay small.

    Args:
        measured: predictor -> rows of `evaluate.evaluate`.

    Returns:
        "psnr_by_object" and "psnr_white_by_object": predictor -> bin -> object -> dB.
    """
    apart = {"psnr": r"mean_image|black_image", "psnr_white": r"mean_image|black_image|.* steps"}
    return {
        f"{metric}_by_object": {
            name: {
                azimuth_bin: {key: round(value, 3) for key, value in objects.items()}
                for azimuth_bin, objects in evaluate.by_object(rows, metric).items()
            }
            for name, rows in measured.items()
            if not re.fullmatch(left_out, name)
        }
        for metric, left_out in apart.items()
    }


def luminance_by_azimuth(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Sums of light over objects, outputs over truth, by azimuth in 45 degree steps."""
    azimuths = [float(a) for a in range(-135, 181, 45)]
    ratios: dict[str, list[float]] = {"azimuth_deg": azimuths}
    for quantity in ("luminance", "coverage"):
        values = []
        for azimuth in azimuths:
            chosen = [r for r in rows if round((r["azimuth_deg"] - azimuth) / 45) % 8 == 0]
            target = sum(r[f"{quantity}_target"] for r in chosen)
            values.append(sum(r[quantity] for r in chosen) / target if target else float("nan"))
        ratios[f"{quantity}_ratio"] = values
    return ratios


def _mean(values: Any) -> float:
    array = np.array(list(values), dtype=float)
    array = array[np.isfinite(array)]
    return float(array.mean()) if len(array) else float("nan")
