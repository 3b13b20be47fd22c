"""How good are predicted views: metrics by azimuth, beside trivial baselines, with uncertainty.

A near-black picture of a small object can score SSIM 0.88, so pixel metrics never stand alone here:
luminance and coverage ratios say whether there is anything in the picture at all, and every table
is meant to be read beside `baselines`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fresnel.data.images import InputImages
from fresnel.data.layout import object_name
from fresnel.data.records import ViewTensors
from fresnel.render import Views
from fresnel.scene.cameras import Cameras, relative_azimuth_deg
from fresnel.scene.colour import luminance

if TYPE_CHECKING:
    from fresnel.data.dataset import MultiViewDataset

Predictor = Callable[[InputImages, Cameras], Views]
"""Input images (M) and target cameras (M, V) in, `Views` (M, V, H, W, ...) over black out."""

AZIMUTH_BINS = (("0-30", 30.0), ("30-60", 60.0), ("60-90", 90.0), ("90-180", 180.0))
"""Name and inclusive upper end, in degrees, of the bins of |azimuth relative to the input|."""

MAX_PSNR = 100.0
"""PSNR in dB of identical images; infinity would make every mean infinite."""

RATIOS = ("luminance_ratio", "coverage_ratio")
"""Metrics aggregated as a ratio of sums per object."""
MEANS = ("psnr", "psnr_white", "ssim", "psnr_foreground", "ssim_foreground", "alpha_mae")
"""Metrics aggregated as a mean per object."""
PERCEPTUAL = "lpips"
"""Aggregated as a mean per object too, where it was measured."""


def azimuth_bin(azimuth_deg: float) -> str:
    """Name of the bin of |azimuth_deg|; rounded to 1e-3 first, so that 30.0001 is in 0-30."""
    distance = round(abs((azimuth_deg + 180.0) % 360.0 - 180.0), 3)
    return next(name for name, upper in AZIMUTH_BINS if distance <= upper)


def psnr(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (N, H, W, 3) in [0, 1], shape (N,).

    Args:
        mask: (N, H, W) bool; only these pixels count. An image without any gives NaN.

    Identical images give `MAX_PSNR`.
    """
    error = (output - target).square().mean(dim=-1)
    if mask is None:
        mse = error.mean(dim=(1, 2))
    else:
        mse = (error * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))
    return -10.0 * torch.log10(mse.clamp_min(10.0 ** (-MAX_PSNR / 10.0)))


def ssim(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity of images (N, H, W, 3) in [0, 1], shape (N,): see `ssim_map`.

    Args:
        mask: (N, H, W) bool; the SSIM map is averaged over these pixels. Without any: NaN.

    Raises:
        ValueError: for images smaller than the 11 px window's padding allows (6 px).
    """
    if min(output.shape[1:3]) < 6:
        raise ValueError(f"images: got {tuple(output.shape[1:3])} px, SSIM wants at least 6 x 6")
    full = ssim_map(output, target).mean(dim=1)
    if mask is None:
        return full.mean(dim=(1, 2))
    return (full * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))


def ssim_map(
    output: Tensor, target: Tensor, windows: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """SSIM around each pixel of images (..., H, W, 3) in [0, 1]: (..., 3, H, W).

    Gaussian window of 11 pixels, sigma 1.5, data range 1 (Wang et al. 2004), the values of
    torchmetrics: the window is separable, and as two products with banded matrices it costs a
    hundredth of the convolution.  `windows`: `ssim_window` of height and width, where at hand.
    """

    def mean(values: Tensor) -> Tensor:
        return rows @ (values @ columns.mT)

    x, y = (value.movedim(-1, -3) for value in (output, target))
    rows, columns = windows or (ssim_window(size, x) for size in x.shape[-2:])
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, covariance = (
        mean(a * b) - mean_a * mean_b
        for a, b, mean_a, mean_b in (
            (x, x, mean_x, mean_x),
            (y, y, mean_y, mean_y),
            (x, y, mean_x, mean_y),
        )
    )
    c1, c2 = 0.01**2, 0.03**2
    spread = var_x.clamp_min(0) + var_y.clamp_min(0) + c2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return alike / ((mean_x.square() + mean_y.square() + c1) * spread)


def ssim_window(size: int, like: Tensor, *, reach: int = 5, sigma: float = 1.5) -> Tensor:
    """Matrix (size, size) that averages neighbours by a Gaussian; edges are reflected."""
    place = torch.arange(size, device=like.device)
    outer = torch.arange(-reach, size + reach, device=like.device)
    offset = (outer - place[:, None]).to(like.dtype)
    weights = torch.exp(-0.5 * (offset / sigma).square()) * (offset.abs() <= reach)
    inner = (size - 1) - ((size - 1) - outer.abs()).abs()
    weights = weights @ (inner[:, None] == place).to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets (N, H, W, 3) in [0, 1] in, distances (N,) out, smaller is more alike."""
_BACKBONE = "alexnet-owt-7be5be79.pth"


def find_lpips(device: torch.device | str = "cpu") -> tuple[Perceptual | None, str]:
    """LPIPS (arXiv 1801.03924, AlexNet, torchmetrics') if its backbone is on this machine.

    Nothing is downloaded.  Images below 64 px are scaled up to that, as the backbone needs.

    Returns:
        The metric, or None; and a sentence that says which, and what is missing.
    """
    from importlib.util import find_spec

    weights = Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONE
    if find_spec("torchvision") is None:
        return None, "LPIPS not measured: torchvision, which holds its backbone, is not installed."
    if not weights.is_file():
        return None, (
            f"LPIPS not measured: its backbone's weights are not at {weights.name} in torch's hub "
            f"folder. Get them with torchvision.models.alexnet(weights='DEFAULT') (233 MB)."
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    @torch.no_grad()
    def distance(output: Tensor, target: Tensor) -> Tensor:
        images = [image.permute(0, 3, 1, 2) for image in (output, target)]
        if min(images[0].shape[-2:]) < 64:
            images = [interpolate(image, size=(64, 64), mode="bilinear") for image in images]
        pairs = zip(images[0].split(1), images[1].split(1), strict=True)
        return torch.stack([metric(a.clamp(0, 1), b.clamp(0, 1)) for a, b in pairs])

    return distance, "LPIPS: AlexNet, torchmetrics."


def evaluate(
    predictor: Predictor,
    data: MultiViewDataset | ViewTensors,
    *,
    batch: int = 4,
    background: Sequence[float] = (0.0, 0.0, 0.0),
    size: int | None = None,
    device: torch.device | str = "cpu",
    perceptual: Perceptual | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Compare predicted with true views, one row per (record, view).

    Args:
        data: a dataset (read `batch` records at a time) or view tensors (`size` and `device` are
            then theirs).
        batch: records given to the predictor at once.
        background: sRGB colour in [0, 1] that both sides are composited over before PSNR and SSIM.
            Luminance is always that of the object over black.
        size: resize a dataset's views to this many pixels; None keeps them.
        perceptual: what `find_lpips` found; None: rows have no "lpips".

    Returns:
        Rows with keys object (name without the record's "__k"), record, view, azimuth_deg relative
        to the input in (-180, 180], bin, psnr, psnr_white (both sides over white) and
        psnr_foreground (dB), ssim and ssim_foreground, lpips (with `perceptual`), alpha_mae,
        luminance and luminance_target (sums over the frame, in full-white pixels),
        luminance_ratio, coverage and coverage_target (mean alpha), coverage_ratio. Foreground is
        where the true alpha exceeds 0.5. A ratio whose target is zero is NaN.

    Raises:
        ValueError: if the predictor returns another shape than (M, V, H, W, 3) or NaN.
    """
    if batch < 1:
        raise ValueError(f"batch: got {batch}, want at least 1")
    from tqdm.auto import tqdm

    rows: list[dict[str, Any]] = []
    starts = range(0, len(data), batch)
    for start in tqdm(starts, desc="evaluate", disable=None if progress else True, delay=2):
        stop = min(start + batch, len(data))
        if not isinstance(data, ViewTensors):
            part = data.subset(range(start, stop)).tensors(size=size, device=device)
        else:
            part = data[start:stop]
        with torch.no_grad():
            rows += _compare(predictor(part.inputs, part.cameras), part, background, perceptual)
    return rows


def _compare(
    views: Views,
    part: ViewTensors,
    background: Sequence[float],
    perceptual: Perceptual | None,
) -> list[dict[str, Any]]:
    rgb, alpha, names = part.rgb, part.alpha, part.names
    m, v, h, w = alpha.shape[:4]
    if tuple(views.rgb.shape) != (m, v, h, w, 3) or tuple(views.alpha.shape) != (m, v, h, w, 1):
        raise ValueError(
            f"predictor: got rgb {tuple(views.rgb.shape)} and alpha {tuple(views.alpha.shape)}, "
            f"want {(m, v, h, w, 3)} and {(m, v, h, w, 1)}"
        )
    true_rgb = rgb.reshape(m * v, h, w, 3).float() / 255.0
    true_alpha = alpha.reshape(m * v, h, w).float() / 255.0
    out_rgb = views.rgb.reshape(m * v, h, w, 3).to(true_rgb)
    out_alpha = views.alpha.reshape(m * v, h, w).to(true_alpha)
    if not (out_rgb.isfinite().all() and out_alpha.isfinite().all()):
        raise ValueError("predictor: returned NaN or infinite pixels")
    out_rgb, out_alpha = out_rgb.clamp(0, 1), out_alpha.clamp(0, 1)

    bg = true_rgb.new_tensor(tuple(background))
    over_out = out_rgb + (1 - out_alpha[..., None]) * bg
    over_true = true_rgb + (1 - true_alpha[..., None]) * bg
    over_out = over_out.clamp(0, 1)
    mask = true_alpha > 0.5
    light, light_true = (luminance(x).sum(dim=(1, 2)) for x in (out_rgb, true_rgb))
    cover, cover_true = (x.mean(dim=(1, 2)) for x in (out_alpha, true_alpha))
    columns = {
        "psnr": psnr(over_out, over_true),
        "psnr_white": psnr(
            (out_rgb + 1 - out_alpha[..., None]).clamp(0, 1), true_rgb + 1 - true_alpha[..., None]
        ),
        "ssim": ssim(over_out, over_true),
        "psnr_foreground": psnr(over_out, over_true, mask),
        "ssim_foreground": ssim(over_out, over_true, mask),
        "alpha_mae": (out_alpha - true_alpha).abs().mean(dim=(1, 2)),
        "luminance": light,
        "luminance_target": light_true,
        "luminance_ratio": _divide(light, light_true),
        "coverage": cover,
        "coverage_target": cover_true,
        "coverage_ratio": _divide(cover, cover_true),
    }
    if perceptual is not None:
        columns[PERCEPTUAL] = perceptual(over_out, over_true)
    lists = {key: value.double().cpu().tolist() for key, value in columns.items()}
    azimuth = (
        relative_azimuth_deg(part.cameras, part.inputs.cameras, part.pivots)
        .reshape(-1)
        .cpu()
        .tolist()
    )
    return [
        {
            "object": object_name(names[i // v]),
            "record": names[i // v],
            "view": i % v,
            "azimuth_deg": azimuth[i],
            "bin": azimuth_bin(azimuth[i]),
            **{key: value[i] for key, value in lists.items()},
        }
        for i in range(m * v)
    ]


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, torch.nan)


def summarise(
    rows: Sequence[Mapping[str, Any]],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Mean and bootstrap confidence interval per azimuth bin, and over all views ("all").

    Every object counts once: its views (of all its records) are averaged first, for the ratios as
    a ratio of sums (so that a view edge-on, with almost no target, can't dominate); then objects
    are averaged. The interval is a percentile bootstrap that resamples objects, because views of
    one object are no independent evidence (Efron & Tibshirani 1993, ch. 13).

    Returns:
        One dict per bin that has views: bin, objects, views and, for every metric m: m, m_low,
        m_high. With one object the interval is NaN: nothing can be said about the spread.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, want inside (0, 1)")
    summary = []
    for name in (*(name for name, _ in AZIMUTH_BINS), "all"):
        chosen = [row for row in rows if name == "all" or row["bin"] == name]
        if not chosen:
            continue
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in chosen:
            groups.setdefault(row["object"], []).append(row)
        entry: dict[str, Any] = {"bin": name, "objects": len(groups), "views": len(chosen)}
        # The same resamples for every metric and every call: tables of two models are paired.
        draws = np.random.default_rng(seed).integers(len(groups), size=(resamples, len(groups)))
        measured = [PERCEPTUAL] if all(PERCEPTUAL in row for row in chosen) else []
        for metric in (*MEANS, *measured, *RATIOS):
            values = np.array([_object_value(group, metric) for group in groups.values()])
            entry[metric] = _nanmean(values)
            low = high = math.nan
            if len(groups) > 1 and np.isfinite(entry[metric]):
                sample = np.ma.masked_invalid(values[draws])
                tail = (1 - confidence) / 2
                means = sample.mean(axis=1).compressed()
                low, high = np.quantile(means, [tail, 1 - tail])
            entry[f"{metric}_low"], entry[f"{metric}_high"] = float(low), float(high)
        summary.append(entry)
    return summary


def by_object(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[str, float]]:
    """Bin -> object -> value: what `summarise` averages, so that two runs can be compared."""
    found: dict[str, dict[str, float]] = {}
    for name in (*(name for name, _ in AZIMUTH_BINS), "all"):
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if name in ("all", row["bin"]):
                groups.setdefault(row["object"], []).append(row)
        if groups:
            found[name] = {key: _object_value(group, metric) for key, group in groups.items()}
    return found


def paired_difference(
    ours: Mapping[str, float | None],
    theirs: Mapping[str, float | None],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of ours - theirs over the objects that both have, and its bootstrap interval.

    Args:
        ours, theirs: object -> value, a bin of `by_object`.
    """
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    values = np.array([a - b for a, b in pairs if a is not None and b is not None])
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (float(values[0]) if len(values) else math.nan), math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail])
    return float(values.mean()), float(low), float(high)


def _nanmean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _object_value(rows: Sequence[Mapping[str, Any]], metric: str) -> float:
    if metric not in RATIOS:
        return _nanmean(np.array([row[metric] for row in rows], dtype=np.float64))
    quantity = metric.removesuffix("_ratio")
    target = sum(row[f"{quantity}_target"] for row in rows)
    return sum(row[quantity] for row in rows) / target if target > 0 else math.nan


def baselines(train: ViewTensors) -> dict[str, Predictor]:
    """What a model has to beat: copy_input, mean_image (of the training views), black_image."""
    rgb = train.rgb.flatten(0, 1).float().mean(dim=0) / 255.0
    alpha = train.alpha.flatten(0, 1).float().mean(dim=0)[..., None] / 255.0

    def copy_input(inputs: InputImages, cameras: Cameras) -> Views:
        picture = _to_float(inputs.rgb, cameras.device)
        return _constant(picture, _to_float(inputs.alpha, cameras.device)[..., None], cameras)

    def mean_image(inputs: InputImages, cameras: Cameras) -> Views:
        count, device = len(inputs.names), cameras.device
        picture = rgb.to(device).expand(count, -1, -1, -1)
        return _constant(picture, alpha.to(device).expand(count, -1, -1, -1), cameras)

    def black_image(inputs: InputImages, cameras: Cameras) -> Views:
        shape = (*cameras.batch_shape, cameras.height, cameras.width)
        zero = torch.zeros(*shape, 1, device=cameras.device)
        return Views(zero.expand(*shape, 3), zero, zero)

    return {"copy_input": copy_input, "mean_image": mean_image, "black_image": black_image}


def _to_float(image: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(image, device=device).float() / 255.0


def _constant(rgb: Tensor, alpha: Tensor, cameras: Cameras) -> Views:
    """The picture (M, H, W, C) of each record as every one of its views."""
    size, views = (cameras.height, cameras.width), cameras.batch_shape[1]
    both = torch.cat([rgb, alpha], dim=-1).permute(0, 3, 1, 2)
    if tuple(both.shape[-2:]) != size:
        both = interpolate(both, size=size, mode="bilinear", align_corners=False, antialias=True)
    both = both.permute(0, 2, 3, 1)[:, None].expand(-1, views, -1, -1, -1)
    return Views(both[..., :3], both[..., 3:], torch.zeros_like(both[..., 3:]))


def table(
    summaries: Mapping[str, Sequence[Mapping[str, Any]]] | Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[str] = ("psnr", "ssim", PERCEPTUAL, "psnr_foreground", *RATIOS),
    style: str = "markdown",
    digits: int = 2,
) -> str:
    """A summary, or several by name (model and baselines), as one table with intervals.

    Args:
        summaries: what `summarise` returned, or a dict name -> that.
        style: "markdown" or "html".
        digits: after the decimal point.
    """
    named = summaries if isinstance(summaries, Mapping) else {"": summaries}
    rows = []
    for name, summary in named.items():
        for entry in summary:
            row = {"model": name} if name else {}
            row |= {"azimuth (deg)": entry["bin"], "objects": str(entry["objects"])}
            row |= {m: _with_interval(entry, m, digits) for m in metrics if m in entry}
            rows.append(row)
    return format_rows(rows, style=style)


def _with_interval(entry: Mapping[str, Any], metric: str, digits: int) -> str:
    value, low, high = (entry[metric + end] for end in ("", "_low", "_high"))
    if not math.isfinite(value):
        return "-"
    text = f"{value:.{digits}f}"
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else text


def format_rows(rows: Sequence[Mapping[str, Any]], *, style: str = "markdown") -> str:
    """Rows with the same keys as a Markdown or HTML table; cells are escaped."""
    if style not in ("markdown", "html"):
        raise ValueError(f"style: got {style!r}, want 'markdown' or 'html'")
    if not rows:
        return ""
    head = list(rows[0])
    body = [[str(row.get(key, "")) for key in head] for row in rows]
    if style == "html":
        lines = ["".join(f"<th>{html.escape(key)}</th>" for key in head)]
        lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in body]
        return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"
    lines_of_cells = [head, ["---"] * len(head), *body]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines_of_cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)
