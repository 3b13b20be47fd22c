"""Corruptions of pictures: exposure, colour, sharpness, content.  Records are over black."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fresnel.data.records import ObjectViews
from fresnel.poses import transforms
from fresnel.poses.transforms import as_bytes, recoloured, straight
from fresnel.scene.cameras import Cameras, relative_azimuth_deg
from fresnel.scene.colour import srgb_to_linear

Fault = Callable[[ObjectViews, float, np.random.Generator], ObjectViews]
FAULTS: dict[str, Fault] = {}
EXPECTED: dict[str, tuple[str, float]] = {}
"""The code that should come first, and the smallest strength at which it has to: practical ones."""


def fault(code: str, practical: float, *, by_record: bool = False) -> Callable[[Fault], Fault]:
    """Register a fault; with `by_record` it is there or not, in a share `strength` of records."""

    def register(function: Fault) -> Fault:
        def some(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
            return function(views, strength, rng) if rng.random() < strength else views

        FAULTS[function.__name__] = some if by_record else function
        EXPECTED[function.__name__] = code, practical
        return function

    return register


@fault("views_dark", 0.8)
def darken(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The object's linear light times (1 - strength)."""
    return transforms.exposed(views, 1.0 - strength)


@fault("views_bright", 0.9)
def overexpose(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The object's linear light over (1 - strength), clipped."""
    return transforms.exposed(views, 1.0 / max(1.0 - strength, 1e-3))


@fault("views_dark", 0.25)
def black_views(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The object is black in this share of the views; alpha stays."""
    return replace(views, rgb=put(views.rgb, choose(views, strength, rng), 0))


@fault("constant_frames", 0.25)
def white_views(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """This share of the views is white all over, and opaque."""
    return _flat(views, choose(views, strength, rng), 255)


@fault("constant_frames", 0.25)
def constant_views(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """This share of the views is one grey all over, and opaque."""
    return _flat(views, choose(views, strength, rng), 119)


@fault("views_empty", 0.25)
def empty_views(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """This share of the views shows nothing."""
    chosen = choose(views, strength, rng)
    return _with(views, lambda values: put(values, chosen, 0))


@fault("frozen_views", 0.5)
def frozen_views(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """This share of the views repeats the first view's picture; the poses stay."""
    chosen = choose(views, strength, rng)
    return _with(views, lambda values: put(values, chosen, values[:1]))


@fault("mirrored", 0.5)
def mirrored_views(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """This share of the views is mirrored left to right; the poses stay."""
    return transforms.flipped_pictures(views, choose(views, strength, rng))


@fault("mirrored", 1.0, by_record=True)
def mirrored_all(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """All pictures, the input's too, are mirrored, in this share of the records."""
    return transforms.flipped_input(transforms.flipped_pictures(views, slice(None)))


@fault("exposure_drift", 0.75)
def exposure_drift(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Every view's linear light times its own power of two, uniform within +-4 * strength stops."""
    gain = 2.0 ** torch.from_numpy(rng.uniform(-4, 4, len(views.rgb)) * strength).float()
    return transforms.exposed(views, gain[:, None, None, None])


@fault("exposure_drift", 0.75)
def fading_exposure(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Linear light falls in time: from the first view to the last by 2 to the power of
    8 * strength."""
    gain = 2.0 ** (-8 * strength * torch.linspace(0, 1, len(views.rgb)))
    return transforms.exposed(views, gain[:, None, None, None])


@fault("views_dark", 0.75)
def linear_colours(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Linear light is written where sRGB is meant, blended in by `strength`."""
    own = straight(views)
    mixed = (1 - strength) * own + strength * 255 * srgb_to_linear(own / 255)
    return recoloured(views, mixed)


@fault("clipped", 0.75)
def contrast(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The object's colours spread about their mean, 1 + 15 * strength times, and clipped."""
    own = straight(views)
    mean = own[views.alpha > 127].mean() if (views.alpha > 127).any() else own.mean()
    return recoloured(views, ((own - mean) * (1 + 15 * strength) + mean).clamp(0, 255))


@fault("noisy", 0.25)
def noise(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """White noise on the object's colours, sigma = 128 * strength of 255."""
    grain = torch.from_numpy(rng.normal(0, 128 * strength, views.rgb.shape)).float()
    return recoloured(views, (straight(views) + grain).clamp(0, 255))


@fault("channels_swapped", 1.0)
def swapped_channels(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Red and blue exchanged in the views, blended in by `strength`."""
    own = straight(views)
    return recoloured(views, (1 - strength) * own + strength * own.flip(-1))


@fault("out_of_frame", 0.5)
def cropped(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The views are zoomed by 1 + 3 * strength, focal length included: the object leaves frames."""
    zoom = torch.full((len(views.rgb), 2), 1 + 3 * strength)
    centre = views.cameras.Ks[:, :2, 2]
    scaled = warp(views, zoom, centre, centre)
    return transforms.calibrated(scaled, lambda Ks: transforms.zoomed(Ks, 1 + 3 * strength))


@fault("depth_mismatch", 0.25)
def wrong_depth(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Depth of views and input times 1 - 0.8 * strength."""
    return transforms.scaled_depth(views, 1 - 0.8 * strength)


@fault("billboard", 0.75)
def billboard(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Views are squeezed in width by 1 - strength (1 - |cos azimuth|): at 1 the object is a flat
    cut-out that vanishes from the side."""
    camera = views.input_camera.reshape(1)
    azimuth = relative_azimuth_deg(views.cameras.reshape(1, -1), camera, views.pivot)[0]
    width = transforms.squeezed(azimuth.deg2rad().cos().numpy(), strength)
    scale = torch.from_numpy(np.stack([width.clip(1e-3), np.ones_like(width)], -1)).float()
    centre = (views.cameras.Ks @ unit(to_camera(views.cameras, views.pivot))[..., None])[:, :2, 0]
    return warp(views, scale, centre, centre)


@fault("blurred", 0.5)
def blur(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Gaussian blur of the views, colour and alpha; sigma = strength * 0.1 of the image width."""
    sigma = 0.1 * strength * views.rgb.shape[2]

    def blurred(values: Tensor) -> Tensor:
        by = (0, sigma, sigma, 0)[: values.ndim]
        smooth = gaussian_filter(values.numpy().astype(np.float32), by, mode="nearest", truncate=3)
        return as_bytes(torch.from_numpy(smooth))

    return replace(views, rgb=blurred(views.rgb), alpha=blurred(views.alpha))


@fault("identity_mismatch", 0.5)
def identity_mismatch(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The render from the input camera is the input moved sideways by strength * 0.5 of its width,
    its colours swapped around in the same proportion."""
    shift = max(1, round(0.5 * strength * views.input_rgb.shape[1]))
    rgb, alpha = views.input_rgb.roll(shift, 1), views.input_alpha.roll(shift, 1)
    swapped = as_bytes((1 - strength) * rgb.float() + strength * rgb.roll(1, -1).float())
    return replace(views, identity_rgb=swapped, identity_alpha=alpha)


def choose(views: ObjectViews, share: float, rng: np.random.Generator, at_least: int = 1) -> Tensor:
    """Indices of this share of the views."""
    count = len(views.rgb)
    number = min(count, max(at_least, round(share * count)))
    return torch.from_numpy(np.sort(rng.permutation(count)[:number]))


def put(values: Tensor, index: Tensor, new: Tensor | int) -> Tensor:
    out = values.clone()
    out[index] = new
    return out


def _with(views: ObjectViews, change: Callable[[Tensor], Tensor]) -> ObjectViews:
    """Pictures, alpha and depth of the views changed alike."""
    depth = None if views.depth is None else change(views.depth)
    return replace(views, rgb=change(views.rgb), alpha=change(views.alpha), depth=depth)


def unit(points: Tensor) -> Tensor:
    return points / points[:, 2:].clamp_min(1e-3)


def to_camera(cameras: Cameras, point: Tensor) -> Tensor:
    """A world point in every camera's frame, (V, 3)."""
    return cameras.viewmats[:, :3, :3] @ point + cameras.viewmats[:, :3, 3]


def _flat(views: ObjectViews, chosen: Tensor, value: int) -> ObjectViews:
    rgb, alpha = put(views.rgb, chosen, value), put(views.alpha, chosen, 255)
    return replace(views, rgb=rgb, alpha=alpha)


def warp(views: ObjectViews, scale: Tensor, centre: Tensor, target: Tensor) -> ObjectViews:
    """Scale the pictures by (V, 2) about pixel `centre` (V, 2), which moves to pixel `target`."""
    # affine_grid maps output to input coordinates, both in [-1, 1] over the frame.
    size = views.cameras.width
    centre_n, target_n = 2 * centre / size - 1, 2 * target / size - 1
    theta = torch.zeros(len(scale), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / scale[:, 0], 1 / scale[:, 1]
    theta[:, :, 2] = centre_n - target_n / scale
    layers = torch.cat([views.rgb, views.alpha[..., None]], dim=-1).permute(0, 3, 1, 2).float()
    grid = affine_grid(theta, list(layers.shape), align_corners=False)
    layers = as_bytes(grid_sample(layers, grid, align_corners=False)).permute(0, 2, 3, 1)
    depth = None
    if views.depth is not None:
        sampled = grid_sample(views.depth[:, None], grid, mode="nearest", align_corners=False)
        depth = sampled[:, 0]
    rgb, alpha = layers[..., :3].contiguous(), layers[..., 3].contiguous()
    return replace(views, rgb=rgb, alpha=alpha, depth=depth)
