"""How good are predicted views: metrics by azimuth, beside trivial baselines, with uncertainty.

A near-black picture of a small object can score SSIM 0.88, so pixel metrics never stand alone here:
luminance and coverage ratios say whether there is anything in the picture at all, and every table
is meant to be read beside `baselines`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from fresnel.data import faces
from fresnel.data.images import InputImages
from fresnel.data.layout import object_name
from fresnel.data.records import ViewTensors
from fresnel.evaluation import perceptual
from fresnel.evaluation.agreement import BRIGHT, Common, spreading
from fresnel.evaluation.perceptual import Perceptual
from fresnel.models import Predictor
from fresnel.render import Views
from fresnel.scene.cameras import Cameras, relative_azimuth_deg
from fresnel.scene.colour import luminance

# --- pictures ---------------------------------------------------------------------------------

MAX_PSNR = 100.0
"""PSNR in dB of identical images; infinity would make every mean infinite."""


def psnr(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (N, H, W, 3) in [0, 1], shape (N,).

    Args:
        mask: (N, H, W) bool; only these pixels count. An image without any gives NaN.
    """
    mse = _mean((output - target).square().mean(dim=-1), mask)
    return -10.0 * torch.log10(mse.clamp_min(10.0 ** (-MAX_PSNR / 10.0)))


def ssim(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity of images (N, H, W, 3) in [0, 1], shape (N,): the mean of `ssim_map`.

    Args:
        mask: as for `psnr`.

    Raises:
        ValueError: for images smaller than the 11 px window's padding allows (6 px).
    """
    if min(output.shape[1:3]) < 6:
        raise ValueError(f"images: got {tuple(output.shape[1:3])} px, SSIM wants at least 6 x 6")
    return _mean(ssim_map(output, target).mean(dim=1), mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean(dim=(1, 2))
    return (values * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))


def ssim_map(output: Tensor, target: Tensor) -> Tensor:
    """SSIM around each pixel of images (..., H, W, 3) in [0, 1]: (..., 3, H, W).

    Gaussian window of 11 pixels, sigma 1.5, data range 1 (Wang et al. 2004), the values of
    torchmetrics: the window is separable, and as two products with banded matrices it costs a
    hundredth of the convolution.
    """

    def mean(values: Tensor) -> Tensor:
        return rows @ (values @ columns.mT)

    x, y = (value.movedim(-1, -3) for value in (output, target))
    rows, columns = (_ssim_window(size, x) for size in x.shape[-2:])
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x * mean_x, mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    spread = var_x.clamp_min(0) + var_y.clamp_min(0) + c2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return alike / ((mean_x.square() + mean_y.square() + c1) * spread)


def _ssim_window(size: int, like: Tensor) -> Tensor:
    """Matrix (size, size) that averages neighbours by a Gaussian; edges are reflected."""
    reach, sigma = 5, 1.5
    place = torch.arange(size, device=like.device)
    outer = torch.arange(-reach, size + reach, device=like.device)
    offset = (outer - place[:, None]).to(like.dtype)
    weights = torch.exp(-0.5 * (offset / sigma).square()) * (offset.abs() <= reach)
    inner = (size - 1) - ((size - 1) - outer.abs()).abs()
    weights = weights @ (inner[:, None] == place).to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def edge_energy(images: Tensor) -> Tensor:
    """Sharpness of images (N, H, W, 3) in [0, 1]: squared differences of neighbouring pixels' luma
    (Rec. 601, of encoded values) along rows and columns, summed over the frame, shape (N,)."""
    return cell_edges(_luma(images))[1]


def checkerboard(images: Tensor) -> Tensor:
    """What alternates from pixel to pixel both ways in images (N, H, W, 3) in [0, 1]: squared
    differences of neighbouring differences of luma, summed over the frame, shape (N,)."""
    return _luma(images).diff(dim=1).diff(dim=2).square().sum(dim=(1, 2))


def cell_edges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Squared differences of neighbours along rows and columns of values (..., H, W), summed: those
    between cells of 2 x 2 pixels, and all, each (...). A half of all where no grid is; a network
    that draws patches puts its edges on their borders (as JPEG does: Wang, Sheikh and Bovik, ICIP
    2002)."""
    frame = (-2, -1)
    down, across = (values.diff(dim=axis).square() for axis in frame)
    between = down[..., 1::2, :].sum(dim=frame) + across[..., 1::2].sum(dim=frame)
    return between, down.sum(dim=frame) + across.sum(dim=frame)


def _luma(images: Tensor) -> Tensor:
    return images @ images.new_tensor([0.299, 0.587, 0.114])


def _halved(images: Tensor) -> Tensor:
    """Means of 2 x 2 pixels, (N, H, W, 3) -> (N, H // 2, W // 2, 3)."""
    return avg_pool2d(images.movedim(-1, 1), 2).movedim(1, -1)


# --- baselines --------------------------------------------------------------------------------


def baselines(train: ViewTensors) -> dict[str, Predictor]:
    """What a model has to beat, by name: copy_input, mean_image (of the training views) and
    black_image."""
    mean = torch.cat([train.rgb, train.alpha[..., None]], dim=-1).flatten(0, 1).float().mean(dim=0)

    def everywhere(picture: Callable[[InputImages], Tensor]) -> Predictor:
        """The picture (M, H, W, 4) in [0, 255] of each record as every one of its views."""

        def predict(inputs: InputImages, cameras: Cameras) -> Views:
            size, views = (cameras.height, cameras.width), cameras.batch_shape[1]
            rgba = picture(inputs).to(cameras.device).permute(0, 3, 1, 2) / 255
            if tuple(rgba.shape[-2:]) != size:
                rgba = interpolate(rgba, size=size, mode="bilinear", antialias=True)
            rgba = rgba.permute(0, 2, 3, 1)[:, None].expand(-1, views, -1, -1, -1)
            return Views(rgba[..., :3], rgba[..., 3:], torch.zeros_like(rgba[..., 3:]))

        return predict

    return {
        "copy_input": everywhere(
            lambda given: torch.cat([given.rgb, given.alpha[..., None]], dim=-1).float()
        ),
        "mean_image": everywhere(lambda given: mean.expand(len(given), -1, -1, -1)),
        "black_image": everywhere(lambda given: torch.zeros(len(given), 1, 1, 4)),
    }


# --- one row a view ---------------------------------------------------------------------------

AZIMUTH_BINS = (("0-30", 30.0), ("30-60", 60.0), ("60-90", 90.0), ("90-180", 180.0))
"""Name and inclusive upper end, in degrees, of the bins of |azimuth relative to the input|."""


def azimuth_bin(azimuth_deg: float) -> str:
    """Name of the bin of |azimuth_deg|; rounded to 1e-3 first, so that 30.0001 is in 0-30."""
    distance = round(abs((azimuth_deg + 180.0) % 360.0 - 180.0), 3)
    return next(name for name, upper in AZIMUTH_BINS if distance <= upper)


FACES_UP_TO_DEG = 60.0
"""Views up to this far from the input are asked whether they show a face."""


@dataclass(frozen=True)
class Measures:
    """What is measured beside pixels and sums, and what each measure needs that is missing."""

    distances: Mapping[str, Perceptual] = field(default_factory=dict)
    faces: Callable[[Tensor], Tensor] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """For a reader: what was measured, and how to have the rest."""
        found = [*self.distances, *(["faces"] if self.faces else [])]
        rest = "".join(f" {name} was not: {how}." for name, how in self.missing.items())
        return f"Measured beside pixels: {', '.join(found) or 'nothing'}.{rest}"


def find_measures(device: torch.device | str = "cpu", *, heads: bool = False) -> Measures:
    """What this machine can measure.

    Args:
        heads: also whether views show faces, as true views of heads do.
    """
    distances, missing = perceptual.find(device)
    if torch.device(device).type == "cpu" and "vgg_edges" in distances:
        del distances["vgg_edges"]
        missing["vgg_edges"] = "it is measured on a GPU (0.3 to 1 s a view on a core)"
    if heads and (why := faces.missing()):
        missing["faces"] = why
    return Measures(distances, faces.present if heads and not why else None, missing)


def evaluate(
    predictor: Predictor,
    data: ViewTensors,
    *,
    batch: int = 4,
    measures: Measures | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Compare predicted with true views, one row per (record, view).

    Args:
        batch: records given to the predictor at once.
        measures: what `find_measures` found; None: nothing that needs more than this package.

    Returns:
        Rows with keys object (name without the record's "__k"), record, view, azimuth_deg relative
        to the input in (-180, 180], bin, psnr and psnr_foreground (dB, over black), psnr_white,
        ssim and ssim_foreground (over black), alpha_mae; luminance (sum over the frame, in
        full-white pixels), coverage (mean alpha), edge_energy, coarse_edge_energy (at half the
        size) and checkerboard (over black), each also with "_target", and "_ratio", which is NaN
        where the target is zero; blocks, of the prediction alone: edge energy between cells of
        2 x 2 pixels, its "_target" half of all of it, and "_ratio"; of `measures` the distances
        (over white), and of views up to 60 degrees away whether a face is found: faces and
        faces_true (0 or 1, else NaN); where data have depth, how far a view and its neighbours
        differ on the true surface: disagreement and disagreement_true (`agreement`). Foreground:
        the true alpha exceeds 0.5.

    Raises:
        ValueError: if the predictor returns another shape than (M, V, H, W, 3) or NaN.
    """
    if batch < 1:
        raise ValueError(f"batch: got {batch}, want at least 1")
    from tqdm.auto import tqdm

    rows: list[dict[str, Any]] = []
    starts = range(0, len(data), batch)
    for start in tqdm(starts, desc="evaluate", disable=None if progress else True, delay=2):
        part = data[start : start + batch]
        with torch.no_grad():
            rows += _compare(predictor(part.inputs, part.cameras), part, measures or Measures())
    return rows


def _compare(views: Views, part: ViewTensors, measures: Measures) -> list[dict[str, Any]]:
    shape = tuple(part.alpha.shape)
    if (tuple(views.rgb.shape), tuple(views.alpha.shape)) != ((*shape, 3), (*shape, 1)):
        raise ValueError(
            f"predictor: got rgb {tuple(views.rgb.shape)} and alpha {tuple(views.alpha.shape)}, "
            f"want {(*shape, 3)} and {(*shape, 1)}"
        )
    true, true_alpha = (x.flatten(0, 1).float() / 255.0 for x in (part.rgb, part.alpha))
    ours, alpha = views.rgb.flatten(0, 1).to(true), views.alpha.flatten(0, 1)[..., 0].to(true)
    if not (ours.isfinite().all() and alpha.isfinite().all()):
        raise ValueError("predictor: returned NaN or infinite pixels")
    ours, alpha = ours.clamp(0, 1), alpha.clamp(0, 1)
    white, true_white = (ours + 1 - alpha[..., None]).clamp(0, 1), true + 1 - true_alpha[..., None]
    foreground = true_alpha > 0.5
    columns = {
        "psnr": psnr(ours, true),
        "psnr_white": psnr(white, true_white),
        "ssim": ssim(ours, true),
        "psnr_foreground": psnr(ours, true, foreground),
        "ssim_foreground": ssim(ours, true, foreground),
        "alpha_mae": (alpha - true_alpha).abs().mean(dim=(1, 2)),
    }
    light = [luminance(x).sum(dim=(1, 2)) for x in (ours, true)]
    cover = [x.mean(dim=(1, 2)) for x in (alpha, true_alpha)]
    sums = {"luminance": light, "coverage": cover}
    between, edges = cell_edges(_luma(ours))
    sums["edge_energy"] = [edges, edge_energy(true)]
    sums["coarse_edge_energy"] = [edge_energy(_halved(x)) for x in (ours, true)]
    sums["checkerboard"] = [checkerboard(x) for x in (ours, true)]
    sums["blocks"] = [between, edges / 2]
    for name, (found, target) in sums.items():
        ratio = torch.where(target > 0, found / target, torch.nan)
        columns |= {name: found, f"{name}_target": target, f"{name}_ratio": ratio}
    for name, distance in measures.distances.items():
        columns[name] = distance(white, true_white)
    azimuths = relative_azimuth_deg(part.cameras, part.inputs.cameras, part.pivots).flatten()
    if measures.faces is not None:
        near = azimuths.abs() <= FACES_UP_TO_DEG + 1e-3
        for name, pictures in {"faces": white, "faces_true": true_white}.items():
            columns[name] = torch.full_like(pictures[:, 0, 0, 0], torch.nan)
            columns[name][near] = measures.faces(pictures[near]).to(true)
    if part.depth is not None and shape[1] > 1:
        common = Common.of(part.cameras, part.depth, true_alpha.unflatten(0, shape[:2]))
        for name, pictures in {"disagreement": white, "disagreement_true": true_white}.items():
            columns[name] = common.disagreement(pictures.unflatten(0, shape[:2])).flatten()
    lists = {key: value.double().cpu().tolist() for key, value in columns.items()}
    return [
        {
            "object": object_name(part.names[i // shape[1]]),
            "record": part.names[i // shape[1]],
            "view": i % shape[1],
            "azimuth_deg": azimuth,
            "bin": azimuth_bin(azimuth),
            **{key: value[i] for key, value in lists.items()},
        }
        for i, azimuth in enumerate(azimuths.tolist())
    ]


# --- means over objects -----------------------------------------------------------------------

RATIOS = (
    *("luminance_ratio", "coverage_ratio"),
    *("edge_energy_ratio", "coarse_edge_energy_ratio", "checkerboard_ratio", "blocks_ratio"),
)
"""Metrics aggregated as a ratio of sums per object, where they were measured."""
MEANS = ("psnr", "psnr_white", "ssim", "psnr_foreground", "ssim_foreground", "alpha_mae")
"""Metrics aggregated as a mean per object."""
EXTRA = (
    *("perceptual", "vgg_edges", "lpips", "faces", "faces_true"),
    *("disagreement", "disagreement_true"),
)
"""Aggregated as a mean per object too, where they were measured."""

Rows = Sequence[Mapping[str, Any]]


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of one value an object, and Student's 95 % interval; NaN where nothing can be said."""
    from scipy.stats import t

    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan, math.nan
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    reach = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return mean, float(mean - reach), float(mean + reach)


def summarise(rows: Rows) -> list[dict[str, Any]]:
    """Mean and 95 % interval per azimuth bin, and over all views ("all").

    Every object counts once: its views (of all its records) are averaged first, for the ratios as
    a ratio of sums (so that a view edge-on, with almost no target, can't dominate); then objects
    are averaged, and make the interval, because views of one object are no independent evidence.

    Returns:
        One dict per bin that has views: bin, azimuths (which there are, in words), objects, views
        and, for every metric m: m, m_low, m_high. With one object the interval is NaN.
    """
    summary = []
    for name, groups in _binned(rows).items():
        chosen = [row for group in groups.values() for row in group]
        entry: dict[str, Any] = {"bin": name, "objects": len(groups), "views": len(chosen)}
        entry["azimuths"] = azimuths_label([row["azimuth_deg"] for row in chosen])
        measured = [m for m in (*EXTRA, *RATIOS) if all(m in row for row in chosen)]
        for metric in (*MEANS, *measured):
            values = np.array([_object_value(group, metric) for group in groups.values()])
            found = mean_interval(values)
            entry |= zip((metric, f"{metric}_low", f"{metric}_high"), found, strict=True)
        summary.append(entry)
    return summary


def showcase(rows: Rows) -> tuple[str, dict[str, str]]:
    """The records to show a reader, so that nobody picks: those with the best, the median and the
    worst views by the perceptual distance, or by SSIM where that was not measured.

    Returns:
        The measure in words, and "best", "median", "worst" -> record; each record once, the only
        one as the median.
    """
    measured = all("perceptual" in row for row in rows)
    metric, sign = ("perceptual", 1) if measured else ("ssim", -1)
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["record"], []).append(sign * row[metric])
    order = sorted(values, key=lambda name: float(np.mean(values[name])))
    middle = (len(order) - 1) // 2
    places = {"best": 0, "median": middle, "worst": len(order) - 1}
    chosen = {w: order[at] for w, at in places.items() if w == "median" or at != middle}
    return "perceptual distance" if measured else "SSIM", chosen


def by_object(rows: Rows, metric: str) -> dict[str, dict[str, float]]:
    """Bin -> object -> value: what `summarise` averages, so that two runs can be compared."""
    return {
        name: {key: _object_value(group, metric) for key, group in groups.items()}
        for name, groups in _binned(rows).items()
    }


def spread_by_azimuth(
    samples: Sequence[Predictor], data: ViewTensors, *, batch: int = 4
) -> dict[str, tuple[float, float, float]]:
    """Bin -> how far samples of the same views spread, which differ by their noise alone: mean over
    objects of the standard deviation, in steps of 8 bits, of what any of them covers, and Student's
    95 % interval.  It grows with azimuth where a model guesses what its input does not show."""
    rows: list[dict[str, Any]] = []
    for start in range(0, len(data), batch):
        part = data[start : start + batch]
        views = spreading(samples)(part.inputs, part.cameras)
        light, cover = views.rgb[..., 0].sum(dim=(2, 3)), views.alpha[..., 0].sum(dim=(2, 3))
        azimuths = relative_azimuth_deg(part.cameras, part.inputs.cameras, part.pivots)
        rows += [
            {"object": object_name(name), "bin": azimuth_bin(azimuth), "spread": float(value)}
            for name, *values in zip(part.names, BRIGHT * light / cover, azimuths, strict=True)
            for value, azimuth in zip(*(each.tolist() for each in values), strict=True)
        ]
    found = by_object(rows, "spread")
    return {name: mean_interval(np.array([*each.values()])) for name, each in found.items()}


def _binned(rows: Rows) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Bin -> object -> rows, of bins that have any."""
    found: dict[str, Any] = {name: {} for name in (*(name for name, _ in AZIMUTH_BINS), "all")}
    for row in rows:
        for name in (row["bin"], "all"):
            found[name].setdefault(row["object"], []).append(row)
    return {name: groups for name, groups in found.items() if groups}


def _object_value(rows: Rows, metric: str) -> float:
    if metric not in RATIOS:
        values = np.array([row[metric] for row in rows], dtype=np.float64)
        return mean_interval(values)[0]
    quantity = metric.removesuffix("_ratio")
    target = sum(row[f"{quantity}_target"] for row in rows)
    return sum(row[quantity] for row in rows) / target if target > 0 else math.nan


def azimuths_label(azimuths_deg: Sequence[float]) -> str:
    """What a bin really holds, in degrees: "135, 180" of single azimuths, or "91 to 178".

    Views of an orbit stand at a few azimuths, and a bin that holds 45 alone says nothing of 31.
    """
    found = sorted({round(abs(azimuth)) for azimuth in azimuths_deg})
    return ", ".join(map(str, found)) if len(found) <= 3 else f"{found[0]} to {found[-1]}"


def table(
    summaries: Mapping[str, Rows] | Rows,
    *,
    metrics: Sequence[str] = ("psnr", "ssim", *EXTRA, "psnr_foreground", *RATIOS),
    missing: Mapping[str, str] | None = None,
) -> str:
    """A summary, or several by name (model and baselines), as one Markdown table with intervals;
    bars are escaped.

    Args:
        missing: `Measures.missing`: the columns of our own extras say so.
    """
    named = summaries if isinstance(summaries, Mapping) else {"": summaries}
    rows: list[dict[str, str]] = []
    for name, summary in named.items():
        for entry in summary:
            row = {"model": name} if name else {}
            row["azimuth (deg)"] = "all" if entry["bin"] == "all" else entry["azimuths"]
            row["objects"] = str(entry["objects"])
            for metric in metrics:
                if metric in ("perceptual", "faces") and metric in (missing or {}):
                    row[f"{metric} (needs fresnel[{metric}])"] = "-"
                if metric not in entry:
                    continue
                value, low, high = (entry[metric + end] for end in ("", "_low", "_high"))
                interval = f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else ""
                row[metric] = f"{value:.2f}{interval}" if math.isfinite(value) else "-"
            rows.append(row)
    if not rows:
        return ""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row.get(key, "") for key in head] for row in rows)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)
