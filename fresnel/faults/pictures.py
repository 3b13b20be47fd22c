"""Corruptions of pictures: exposure, colour, sharpness, content.

See `faults` for what strength and background mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fresnel.data.dataset import ObjectViews
from fresnel.scene.cameras import Cameras
from fresnel.scene.colour import linear_to_srgb, srgb_to_linear


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
    chosen = choose(views, strength, rng)
    return replace(views, rgb=put(views.rgb, chosen, dark.rgb[chosen]))


def white_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views is white all over, and opaque."""
    return _flat(views, choose(views, strength, rng), 255)


def constant_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views is one grey all over, and opaque."""
    return _flat(views, choose(views, strength, rng), 119)


def empty_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views shows the background only."""
    keep = torch.ones(len(views.rgb))
    keep[choose(views, strength, rng)] = 0.0
    zero = keep[:, None, None].bool()
    rgb = join(straight(views, background), views.alpha * zero, background)
    depth = None if views.depth is None else views.depth * zero
    return replace(views, rgb=rgb, alpha=views.alpha * zero, depth=depth)


def frozen_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views repeats the first view's picture; the poses stay."""
    chosen = torch.unique(torch.cat([torch.tensor([0]), choose(views, strength, rng)]))
    depth = None if views.depth is None else put(views.depth, chosen, views.depth[:1])
    return replace(
        views,
        rgb=put(views.rgb, chosen, views.rgb[:1]),
        alpha=put(views.alpha, chosen, views.alpha[:1]),
        depth=depth,
    )


def mirrored_views(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the views is mirrored left to right; the poses stay."""
    chosen = choose(views, strength, rng)
    depth = None if views.depth is None else put(views.depth, chosen, views.depth[chosen].flip(2))
    return replace(
        views,
        rgb=put(views.rgb, chosen, views.rgb[chosen].flip(2)),
        alpha=put(views.alpha, chosen, views.alpha[chosen].flip(2)),
        depth=depth,
    )


def billboard(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Views are squeezed in width by 1 - strength (1 - |cos azimuth|): at 1 the object is a flat
    cut-out that vanishes from the side."""
    from fresnel.scene.cameras import relative_azimuth_deg

    camera = views.input_camera.reshape(1)
    azimuth = relative_azimuth_deg(views.cameras.reshape(1, -1), camera, views.pivot)[0]
    width = 1 - strength * (1 - azimuth.deg2rad().cos().abs())
    centre = (views.cameras.Ks @ unit(to_camera(views.cameras, views.pivot))[..., None])[:, :2, 0]
    one = torch.ones_like(width)
    return warp(views, background, width.clamp_min(1e-3), one, centre, centre, views.cameras.width)


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
    both = as_bytes(flat.reshape(both.shape).permute(0, 2, 3, 1))
    return replace(views, rgb=both[..., :3].contiguous(), alpha=both[..., 3].contiguous())


def identity_mismatch(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The render from the input camera is the input moved sideways by strength * 0.5 of its width,
    its colours swapped around in the same proportion."""
    shift = max(1, round(0.5 * strength * views.input_rgb.shape[1]))
    rgb, alpha = views.input_rgb.roll(shift, 1), views.input_alpha.roll(shift, 1)
    swapped = as_bytes((1 - strength) * rgb.float() + strength * rgb.roll(1, -1).float())
    return replace(views, identity_rgb=swapped, identity_alpha=alpha)


def exposure_drift(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Every view's linear light times its own power of two, uniform within +-4 * strength stops."""
    gains = 2.0 ** torch.from_numpy(rng.uniform(-4, 4, len(views.rgb)) * strength).float()
    linear = srgb_to_linear(straight(views, background) / 255) * gains[:, None, None, None]
    return replace(views, rgb=join(255 * linear_to_srgb(linear), views.alpha, background))


def contrast(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The object's colours spread about their mean, 1 + 15 * strength times, and clipped."""
    own = straight(views, background)
    mean = own[views.alpha > 127].mean() if (views.alpha > 127).any() else own.mean()
    spread = (own - mean) * (1 + 15 * strength) + mean
    return replace(views, rgb=join(spread.clamp(0, 255), views.alpha, background))


def noise(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """White noise on the object's colours, sigma = 128 * strength of 255."""
    grain = torch.from_numpy(rng.normal(0, 128 * strength, views.rgb.shape)).float()
    noisy = (straight(views, background) + grain).clamp(0, 255)
    return replace(views, rgb=join(noisy, views.alpha, background))


def swapped_channels(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Red and blue exchanged in the views, blended in by `strength`."""
    own = straight(views, background)
    mixed = (1 - strength) * own + strength * own.flip(-1)
    return replace(views, rgb=join(mixed, views.alpha, background))


def cropped(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The views are zoomed by 1 + 3 * strength, focal length included: the object leaves frames."""
    zoom = torch.full((len(views.rgb),), 1 + 3 * strength)
    centre = views.cameras.Ks[:, :2, 2]
    scaled = warp(views, background, zoom, zoom, centre, centre, views.cameras.width)
    Ks = views.cameras.Ks.clone()
    Ks[:, 0, 0] *= zoom
    Ks[:, 1, 1] *= zoom
    return replace(scaled, cameras=replace(views.cameras, Ks=Ks))


def wrong_depth(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Depth of views and input times 1 - 0.8 * strength."""
    if views.depth is None:
        return views
    factor = 1 - 0.8 * strength
    own = None if views.input_depth is None else views.input_depth * factor
    return replace(views, depth=views.depth * factor, input_depth=own)


def mirrored_all(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """All pictures, the input's too, are mirrored, in this share of the records."""
    if rng.random() >= strength:
        return views
    every = mirrored_views(views, 1.0, rng, background)
    names = ("input_rgb", "input_alpha", "input_depth", "identity_rgb", "identity_alpha")
    own = {n: getattr(views, n).flip(1) for n in names if getattr(views, n) is not None}
    return replace(every, **own)


def choose(views: ObjectViews, share: float, rng: np.random.Generator, at_least: int = 1) -> Tensor:
    count = len(views.rgb)
    number = min(count, max(at_least, round(share * count)))
    return torch.from_numpy(np.sort(rng.permutation(count)[:number]))


def put(values: Tensor, index: Tensor, new: Tensor) -> Tensor:
    out = values.clone()
    out[index] = new
    return out


def as_bytes(values: Tensor) -> Tensor:
    return (values + 0.5).clamp(0, 255).to(torch.uint8)


def unit(points: Tensor) -> Tensor:
    return points / points[:, 2:].clamp_min(1e-3)


def to_camera(cameras: Cameras, point: Tensor) -> Tensor:
    """A world point in every camera's frame, (V, 3)."""
    return cameras.viewmats[:, :3, :3] @ point + cameras.viewmats[:, :3, 3]


def _expose(views: ObjectViews, gain: float, background: Sequence[float]) -> ObjectViews:
    linear = srgb_to_linear(straight(views, background) / 255) * gain
    return replace(views, rgb=join(255 * linear_to_srgb(linear), views.alpha, background))


def _flat(views: ObjectViews, chosen: Tensor, value: int) -> ObjectViews:
    rgb, alpha = views.rgb.clone(), views.alpha.clone()
    rgb[chosen], alpha[chosen] = value, 255
    return replace(views, rgb=rgb, alpha=alpha)


def straight(views: ObjectViews, background: Sequence[float]) -> Tensor:
    """The object's own colour, un-premultiplied, float (V, H, W, 3) in [0, 255]."""
    alpha = views.alpha[..., None].float() / 255
    behind = (1 - alpha) * torch.tensor(tuple(background)) * 255
    return ((views.rgb.float() - behind) / alpha.clamp_min(1 / 255)).clamp(0, 255)


def join(straight: Tensor, alpha: Tensor, background: Sequence[float]) -> Tensor:
    alpha = alpha[..., None].float() / 255
    return as_bytes(straight * alpha + (1 - alpha) * torch.tensor(tuple(background)) * 255)


def warp(
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
    premultiplied = straight(views, background) * alpha[..., None]
    layers = torch.cat([premultiplied, 255 * alpha[..., None]], dim=-1).permute(0, 3, 1, 2)
    grid = affine_grid(theta, list(layers.shape), align_corners=False)
    layers = grid_sample(layers, grid, align_corners=False).permute(0, 2, 3, 1)
    new_alpha = as_bytes(layers[..., 3])
    behind = (255 - layers[..., 3:]) * torch.tensor(tuple(background))
    depth = None
    if views.depth is not None:
        sampled = grid_sample(views.depth[:, None], grid, mode="nearest", align_corners=False)
        depth = sampled[:, 0]
    return replace(views, rgb=as_bytes(layers[..., :3] + behind), alpha=new_alpha, depth=depth)
