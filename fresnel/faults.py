"""Named corruptions of multi-view data: what the gate is tested and calibrated against.

Every fault is a plain function of one record, a strength in (0, 1] whose meaning it states, and a
random generator; `background` is the sRGB colour that the views are over.  Nothing is re-rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fresnel import dataset as datasets
from fresnel.cameras import Cameras
from fresnel.dataset import MultiViewDataset, ObjectViews
from fresnel.evaluate import srgb_to_linear

Fault = Callable[[ObjectViews, float, np.random.Generator, Sequence[float]], ObjectViews]


def darken(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The object's linear light times (1 - strength); alpha and background stay."""
    return _expose(views, 1.0 - strength, background)


def overexpose(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The object's linear light over (1 - strength), clipped."""
    return _expose(views, 1.0 / max(1.0 - strength, 1e-3), background)


def black_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The object is black in this share of the views; alpha stays."""
    dark = _expose(views, 0.0, background)
    chosen = _choose(views, strength, rng)
    return replace(views, rgb=_put(views.rgb, chosen, dark.rgb[chosen]))


def white_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views is white all over, and opaque."""
    return _flat(views, _choose(views, strength, rng), 255)


def constant_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views is one grey all over, and opaque."""
    return _flat(views, _choose(views, strength, rng), 119)


def empty_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views shows the background only."""
    keep = torch.ones(len(views.rgb))
    keep[_choose(views, strength, rng)] = 0.0
    zero = keep[:, None, None].bool()
    rgb = _join(_straight(views, background), views.alpha * zero, background)
    depth = None if views.depth is None else views.depth * zero
    return replace(views, rgb=rgb, alpha=views.alpha * zero, depth=depth)


def frozen_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views repeats the first view's picture; the poses stay."""
    chosen = torch.unique(torch.cat([torch.tensor([0]), _choose(views, strength, rng)]))
    depth = None if views.depth is None else _put(views.depth, chosen, views.depth[:1])
    return replace(
        views,
        rgb=_put(views.rgb, chosen, views.rgb[:1]),
        alpha=_put(views.alpha, chosen, views.alpha[:1]),
        depth=depth,
    )


def shuffled_poses(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the poses (at least two) changes places in a cycle; the pictures stay."""
    chosen = _choose(views, strength, rng, at_least=2)
    viewmats = _put(views.cameras.viewmats, chosen, views.cameras.viewmats[chosen.roll(1)])
    return replace(views, cameras=replace(views.cameras, viewmats=viewmats))


def mirrored_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views is mirrored left to right; the poses stay."""
    chosen = _choose(views, strength, rng)
    depth = None if views.depth is None else _put(views.depth, chosen, views.depth[chosen].flip(2))
    return replace(
        views,
        rgb=_put(views.rgb, chosen, views.rgb[chosen].flip(2)),
        alpha=_put(views.alpha, chosen, views.alpha[chosen].flip(2)),
        depth=depth,
    )


def shifted_poses(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """All views' cameras are said to stand elsewhere, by `strength` of their distance.

    The pictures, the input camera and the declared pivot stay.
    """
    return replace(views, cameras=_moved(views, strength, rng))


def pivot_offset(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The orbit's centre is off by `strength` * 1.5 of the orbit's radius (the original experiment
    had 1.5), and the pictures follow.

    The object moves through every frame as a picture at the depth of the old pivot would; where it
    ends up behind the camera the view is empty.
    """
    cameras = _moved(views, 1.5 * strength, rng)
    pivot = views.pivot + (cameras.centers[0] - views.cameras.centers[0])
    before = _to_camera(views.cameras, views.pivot)
    after = _to_camera(cameras, views.pivot)
    scale = before[:, 2] / after[:, 2].clamp_min(1e-3)
    visible = (after[:, 2] > 0.05 * before[:, 2]).to(scale)
    K, size = views.cameras.Ks, views.cameras.width
    pixel = (K @ (after / after[:, 2:].clamp_min(1e-3))[..., None])[:, :2, 0]
    centre = (K @ (before / before[:, 2:])[..., None])[:, :2, 0]
    moved = _warp(views, background, scale, scale, centre, pixel, size)
    shown = visible[:, None, None].bool()
    alpha = moved.alpha * shown
    depth = None
    if moved.depth is not None:
        shift = (after[:, 2] - before[:, 2])[:, None, None]
        depth = torch.where((alpha > 0) & (moved.depth > 0), (moved.depth + shift).clamp_min(0), 0)
    rgb = _join(_straight(moved, background), alpha, background)
    return replace(moved, rgb=rgb, alpha=alpha, depth=depth, cameras=cameras, pivot=pivot)


def billboard(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Views are squeezed in width by 1 - strength (1 - |cos azimuth|): at 1 the object is a flat
    cut-out that vanishes from the side."""
    from fresnel.cameras import relative_azimuth_deg

    camera = views.input_camera.reshape(1)
    azimuth = relative_azimuth_deg(views.cameras.reshape(1, -1), camera, views.pivot)[0]
    width = 1 - strength * (1 - azimuth.deg2rad().cos().abs())
    centre = (views.cameras.Ks @ _unit(_to_camera(views.cameras, views.pivot))[..., None])[:, :2, 0]
    one = torch.ones_like(width)
    return _warp(views, background, width.clamp_min(1e-3), one, centre, centre, views.cameras.width)


def blur(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Gaussian blur of the views, colour and alpha; sigma = strength * 0.1 of the image width."""
    sigma = 0.1 * strength * views.rgb.shape[2]
    reach = max(1, round(3 * sigma))
    x = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    both = torch.cat([views.rgb, views.alpha[..., None]], dim=-1).permute(0, 3, 1, 2).float()
    flat = both.reshape(-1, 1, *both.shape[2:])
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        pad = (0, 0, reach, reach) if shape[2] == -1 else (reach, reach, 0, 0)
        padded = torch.nn.functional.pad(flat, pad, mode="replicate")
        flat = torch.nn.functional.conv2d(padded, kernel.reshape(shape))
    both = _bytes(flat.reshape(both.shape).permute(0, 2, 3, 1))
    return replace(views, rgb=both[..., :3].contiguous(), alpha=both[..., 3].contiguous())


def identity_mismatch(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The render from the input camera is the input moved sideways by strength * 0.5 of its width,
    its colours swapped around in the same proportion."""
    shift = max(1, round(0.5 * strength * views.input_rgb.shape[1]))
    rgb, alpha = views.input_rgb.roll(shift, 1), views.input_alpha.roll(shift, 1)
    swapped = _bytes((1 - strength) * rgb.float() + strength * rgb.roll(1, -1).float())
    return replace(views, identity_rgb=swapped, identity_alpha=alpha)


def nan_pose(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the poses is NaN.  In memory only: `dataset.write` refuses it."""
    viewmats = views.cameras.viewmats.clone()
    viewmats[_choose(views, strength, rng)] = torch.nan
    return replace(views, cameras=replace(views.cameras, viewmats=viewmats))


FAULTS: dict[str, Fault] = {
    "darken": darken,
    "overexpose": overexpose,
    "black_views": black_views,
    "white_views": white_views,
    "constant_views": constant_views,
    "empty_views": empty_views,
    "frozen_views": frozen_views,
    "shuffled_poses": shuffled_poses,
    "mirrored_views": mirrored_views,
    "shifted_poses": shifted_poses,
    "pivot_offset": pivot_offset,
    "billboard": billboard,
    "blur": blur,
    "identity_mismatch": identity_mismatch,
    "nan_pose": nan_pose,
}

EXPECTED: dict[str, tuple[str, float]] = {
    "darken": ("views_dark", 0.8),
    "overexpose": ("views_bright", 0.9),
    "black_views": ("views_dark", 0.25),
    "white_views": ("constant_frames", 0.25),
    "constant_views": ("constant_frames", 0.25),
    "empty_views": ("views_empty", 0.25),
    "frozen_views": ("frozen_views", 0.5),
    "shuffled_poses": ("pose_mismatch", 1.0),
    "mirrored_views": ("mirrored", 1.0),
    "shifted_poses": ("pivot_offset", 0.5),
    "pivot_offset": ("pivot_offset", 0.5),
    "billboard": ("billboard", 1.0),
    "blur": ("blurred", 0.5),
    "identity_mismatch": ("identity_mismatch", 0.5),
    "nan_pose": ("pose_invalid", 0.25),
}
"""The code that should come first, and the smallest strength at which it has to."""


def corrupt(
    objects: Sequence[ObjectViews] | MultiViewDataset,
    fault: str,
    strength: float,
    *,
    background: Sequence[float] = (0.0, 0.0, 0.0),
    seed: int = 0,
) -> Iterator[ObjectViews]:
    """The records with a fault, one after the other; each draws from its own seed.

    Raises:
        ValueError: for an unknown fault or a strength outside (0, 1].
    """
    if fault not in FAULTS:
        raise ValueError(f"fault: got {fault!r}, want one of {', '.join(FAULTS)}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength: got {strength}, want in (0, 1]")
    for index in range(len(objects)):
        rng = np.random.default_rng([seed, index])
        yield FAULTS[fault](objects[index], strength, rng, background)


def apply(
    dataset: MultiViewDataset,
    fault: str,
    strength: float,
    path: str | Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> MultiViewDataset:
    """Write a copy of a dataset with a fault; its manifest's meta says which."""
    objects = corrupt(dataset, fault, strength, background=dataset.background, seed=seed)
    meta = {**dataset.meta, "fault": {"name": fault, "strength": strength, "seed": seed}}
    return datasets.write(
        path,
        objects,
        background=dataset.background,
        meta=meta,
        overwrite=overwrite,
        total=len(dataset),
    )


def _choose(
    views: ObjectViews, share: float, rng: np.random.Generator, at_least: int = 1
) -> Tensor:
    count = len(views.rgb)
    number = min(count, max(at_least, round(share * count)))
    return torch.from_numpy(np.sort(rng.permutation(count)[:number]))


def _put(values: Tensor, index: Tensor, new: Tensor) -> Tensor:
    out = values.clone()
    out[index] = new
    return out


def _bytes(values: Tensor) -> Tensor:
    return (values + 0.5).clamp(0, 255).to(torch.uint8)


def _straight(views: ObjectViews, background: Sequence[float]) -> Tensor:
    """The object's own colour, un-premultiplied, float (V, H, W, 3) in [0, 255]."""
    alpha = views.alpha[..., None].float() / 255
    behind = (1 - alpha) * torch.tensor(tuple(background)) * 255
    return ((views.rgb.float() - behind) / alpha.clamp_min(1 / 255)).clamp(0, 255)


def _join(straight: Tensor, alpha: Tensor, background: Sequence[float]) -> Tensor:
    alpha = alpha[..., None].float() / 255
    return _bytes(straight * alpha + (1 - alpha) * torch.tensor(tuple(background)) * 255)


def _expose(views: ObjectViews, gain: float, background: Sequence[float]) -> ObjectViews:
    linear = srgb_to_linear(_straight(views, background) / 255) * gain
    linear = linear.clamp(0, 1)
    encoded = torch.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp_min(1e-9) ** (1 / 2.4) - 0.055
    )
    return replace(views, rgb=_join(255 * encoded, views.alpha, background))


def _flat(views: ObjectViews, chosen: Tensor, value: int) -> ObjectViews:
    rgb, alpha = views.rgb.clone(), views.alpha.clone()
    rgb[chosen], alpha[chosen] = value, 255
    return replace(views, rgb=rgb, alpha=alpha)


def _unit(points: Tensor) -> Tensor:
    return points / points[:, 2:].clamp_min(1e-3)


def _to_camera(cameras: Cameras, point: Tensor) -> Tensor:
    """A world point in every camera's frame, (V, 3)."""
    return cameras.viewmats[:, :3, :3] @ point + cameras.viewmats[:, :3, 3]


def _moved(views: ObjectViews, by: float, rng: np.random.Generator) -> Cameras:
    """The cameras moved together, `by` times their distance, in a random horizontal direction."""
    angle = rng.uniform(0, 2 * np.pi)
    radius = (views.cameras.centers - views.pivot).norm(dim=-1).median()
    move = by * radius * torch.tensor([np.sin(angle), 0.0, np.cos(angle)], dtype=torch.float32)
    viewmats = views.cameras.viewmats.clone()
    viewmats[:, :3, 3] -= viewmats[:, :3, :3] @ move
    return replace(views.cameras, viewmats=viewmats)


def _warp(
    views: ObjectViews,
    background: Sequence[float],
    scale_x: Tensor,
    scale_y: Tensor,
    centre: Tensor,
    target: Tensor,
    size: int,
) -> ObjectViews:
    """Scale the pictures about pixel `centre` (V, 2), which moves to pixel `target`."""
    scale = torch.stack([scale_x, scale_y], dim=-1)
    # affine_grid maps output to input coordinates, both in [-1, 1] over the frame.
    centre_n, target_n = 2 * centre / size - 1, 2 * target / size - 1
    theta = torch.zeros(len(scale), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / scale[:, 0], 1 / scale[:, 1]
    theta[:, :, 2] = centre_n - target_n / scale
    alpha = views.alpha.float() / 255
    premultiplied = _straight(views, background) * alpha[..., None]
    layers = torch.cat([premultiplied, 255 * alpha[..., None]], dim=-1).permute(0, 3, 1, 2)
    grid = affine_grid(theta, list(layers.shape), align_corners=False)
    layers = grid_sample(layers, grid, align_corners=False).permute(0, 2, 3, 1)
    new_alpha = _bytes(layers[..., 3])
    behind = (255 - layers[..., 3:]) * torch.tensor(tuple(background))
    depth = None
    if views.depth is not None:
        sampled = grid_sample(views.depth[:, None], grid, mode="nearest", align_corners=False)
        depth = sampled[:, 0]
    return replace(views, rgb=_bytes(layers[..., :3] + behind), alpha=new_alpha, depth=depth)
