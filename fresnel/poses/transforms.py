"""Transforms of poses and pictures, each written once: faults inject them, mends undo them.

Poses are world-to-camera matrices (V, 4, 4), intrinsics (V, 3, 3), both numpy float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fresnel.data.records import ObjectViews
from fresnel.scene.cameras import Cameras
from fresnel.scene.colour import linear_to_srgb, srgb_to_linear

Change = Callable[[np.ndarray], np.ndarray]
PICTURES = ("rgb", "alpha", "depth")
OF_INPUT = ("input_rgb", "input_alpha", "input_depth", "identity_rgb", "identity_alpha")


def transposed(poses: np.ndarray) -> np.ndarray:
    """Rotations transposed, translations kept; its own inverse."""
    out = poses.copy()
    out[:, :3, :3] = poses[:, :3, :3].transpose(0, 2, 1)
    return out


def axes(x: float, y: float, z: float) -> Change:
    """Camera axes with these signs; its own inverse."""
    return lambda poses: np.diag([x, y, z, 1.0]) @ poses


opengl = axes(1, -1, -1)


def mirrored_about(poses: np.ndarray, pivot: np.ndarray, away: np.ndarray) -> np.ndarray:
    """Poses mirrored in the vertical plane through a pivot and a direction; its own inverse."""
    normal = np.array([away[2], 0.0, -away[0]]) / max(np.hypot(away[0], away[2]), 1e-9)
    mirror = np.eye(4)
    mirror[:3, :3] -= 2 * np.outer(normal, normal)
    mirror[:3, 3] = 2 * normal * (normal @ pivot)
    return np.diag([-1.0, 1, 1, 1]) @ poses @ mirror


def moved(poses: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Cameras moved together by a world vector (3,)."""
    out = poses.copy()
    out[:, :3, 3] -= poses[:, :3, :3] @ by
    return out


def calibrated(
    Ks: np.ndarray, width: int, x: float = 0.0, y: float = 0.0, *, zoom: float = 1.0
) -> np.ndarray:
    """Focal lengths times a factor, principal points moved by shares of the width."""
    out = Ks * np.array([[zoom, 1, 1], [1, zoom, 1], [1, 1, 1]])
    out[:, :2, 2] += np.array([x, y]) * width
    return out


def mirrored(Ks: np.ndarray, width: int) -> np.ndarray:
    """Intrinsics of pictures flipped left to right: a negative K[0, 0]; its own inverse."""
    return np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]) @ Ks


def squeezed(across: np.ndarray, strength: float) -> np.ndarray:
    """Widths (V,) that a flat cut-out keeps: 1 - strength (1 - |cos azimuth|)."""
    return 1 - strength * (1 - np.abs(across))


# --- records -------------------------------------------------------------------------------------


def cameras_of(like: Cameras, **matrices: np.ndarray) -> Cameras:
    """Cameras with other `viewmats` or `Ks`, in the type of `like`."""
    new: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(matrix)).to(getattr(like, name))
        for name, matrix in matrices.items()
    }
    return replace(like, **new)


def posed(views: ObjectViews, name: str, change: Change) -> ObjectViews:
    """The record with its views' `viewmats` or `Ks` changed."""
    new = change(getattr(views.cameras, name).double().numpy())
    return replace(views, cameras=cameras_of(views.cameras, **{name: new}))


def changed(
    views: ObjectViews, names: Sequence[str], change: Callable[[Tensor], Tensor]
) -> ObjectViews:
    """The record with these of its tensors changed that it has."""
    parts: dict[str, Any] = {name: getattr(views, name) for name in names}
    parts = {name: change(part) for name, part in parts.items() if part is not None}
    return replace(views, **parts)


def put(values: Tensor, rows: Tensor, new: Tensor | float) -> Tensor:
    """A copy with other rows, by index or mask."""
    out = values.clone()
    out[rows] = new
    return out


def flipped(views: ObjectViews, rows: Tensor, *, also_input: bool) -> ObjectViews:
    """Pictures of some views, or the input's too, mirrored left to right; all cameras stay."""
    views = changed(views, PICTURES, lambda part: put(part, rows, part[rows].flip(2)))
    return changed(views, OF_INPUT, lambda part: part.flip(1)) if also_input else views


def scaled_depth(views: ObjectViews, factor: float) -> ObjectViews:
    """Depth of views and input times a factor."""
    return changed(views, ("depth", "input_depth"), lambda depth: depth * factor)


def straight(views: ObjectViews) -> Tensor:
    """The object's own colour, un-premultiplied, float (V, H, W, 3) in [0, 255]."""
    alpha = views.alpha[..., None].float() / 255
    return (views.rgb.float() / alpha.clamp_min(1 / 255)).clamp(0, 255)


def recoloured(views: ObjectViews, change: Callable[[Tensor], Tensor]) -> ObjectViews:
    """The object's colours, as `straight` gives them, changed under its alpha, over black."""
    colours = change(straight(views)) * (views.alpha[..., None].float() / 255)
    return replace(views, rgb=as_bytes(colours))


def exposed(views: ObjectViews, gain: float | Tensor) -> ObjectViews:
    """The object's linear light times a gain, clipped; alpha stays."""
    return recoloured(views, lambda own: 255 * linear_to_srgb(srgb_to_linear(own / 255) * gain))


def as_bytes(values: Tensor) -> Tensor:
    return (values + 0.5).clamp(0, 255).to(torch.uint8)
