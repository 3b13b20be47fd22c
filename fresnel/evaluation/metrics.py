"""How good are predicted views: metrics by azimuth, beside trivial baselines, with uncertainty.

A near-black picture of a small object can score SSIM 0.88, so pixel metrics never stand alone here:
luminance and coverage ratios say whether there is anything in the picture at all, and every table
is meant to be read beside `baselines`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fresnel.data.layout import object_name
from fresnel.data.records import ViewTensors
from fresnel.evaluation.azimuth import AZIMUTH_BINS, azimuth_bin
from fresnel.evaluation.baselines import baselines
from fresnel.evaluation.intervals import (
    MEANS,
    PERCEPTUAL,
    RATIOS,
    by_object,
    format_rows,
    mean_interval,
    summarise,
    table,
)
from fresnel.models import Predictor
from fresnel.render import Views
from fresnel.scene.cameras import relative_azimuth_deg
from fresnel.scene.colour import luminance

if TYPE_CHECKING:
    from fresnel.data.dataset import MultiViewDataset

__all__ = [
    "AZIMUTH_BINS",
    "MEANS",
    "PERCEPTUAL",
    "RATIOS",
    "Predictor",
    "azimuth_bin",
    "baselines",
    "by_object",
    "evaluate",
    "find_lpips",
    "format_rows",
    "mean_interval",
    "psnr",
    "ssim",
    "summarise",
    "table",
]

MAX_PSNR = 100.0
"""PSNR in dB of identical images; infinity would make every mean infinite."""


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
