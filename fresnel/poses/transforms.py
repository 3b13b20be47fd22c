"""Transforms of poses and pictures, each written once: faults inject them, mends undo them.

Poses are world-to-camera matrices (V, 4, 4), intrinsics (V, 3, 3), both numpy float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fresnel.data.records import ObjectViews
from fresnel.scene.cameras import Cameras
from fresnel.scene.colour import linear_to_srgb, srgb_to_linear

Poses = Callable[[np.ndarray], np.ndarray]

# --- poses ---------------------------------------------------------------------------------------


def inverted(viewmats: np.ndarray) -> np.ndarray:
    """Camera-to-world where world-to-camera is meant, and back."""
    return np.linalg.inv(viewmats)


def transposed(viewmats: np.ndarray) -> np.ndarray:
    """Rotations transposed, translations kept; its own inverse."""
    out = viewmats.copy()
    out[:, :3, :3] = viewmats[:, :3, :3].transpose(0, 2, 1)
    return out


def flipped(x: int, y: int, z: int) -> Poses:
    """Camera axes with these signs; its own inverse."""
    return lambda viewmats: np.diag([float(x), y, z, 1]) @ viewmats


opengl = flipped(1, -1, -1)


def mirrored_about(viewmats: np.ndarray, pivot: np.ndarray, away: np.ndarray) -> np.ndarray:
    """Poses mirrored in the vertical plane through a pivot and a direction; its own inverse."""
    normal = np.array([away[2], 0.0, -away[0]]) / max(np.hypot(away[0], away[2]), 1e-9)
    mirror = np.eye(4)
    mirror[:3, :3] -= 2 * np.outer(normal, normal)
    mirror[:3, 3] = 2 * normal * (normal @ pivot)
    return np.diag([-1.0, 1, 1, 1]) @ viewmats @ mirror


def moved(viewmats: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Cameras moved together by a world vector (3,)."""
    out = viewmats.copy()
    out[:, :3, 3] -= viewmats[:, :3, :3] @ by
    return out


def zoomed(Ks: np.ndarray, factor: np.ndarray | float) -> np.ndarray:
    """Focal lengths times a factor."""
    out = Ks.copy()
    out[:, 0, 0] *= factor
    out[:, 1, 1] *= factor
    return out


def shifted(Ks: np.ndarray, x: float, y: float, width: int) -> np.ndarray:
    """Principal points moved by shares of the width."""
    out = Ks.copy()
    out[:, :2, 2] += np.array([x, y]) * width
    return out


def mirrored(Ks: np.ndarray, width: int) -> np.ndarray:
    """Intrinsics of pictures flipped left to right: a negative K[0, 0]; its own inverse."""
    return np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]) @ Ks


def squeezed(across: np.ndarray, strength: float) -> np.ndarray:
    """Widths (V,) that a flat cut-out keeps: 1 - strength (1 - |cos azimuth|)."""
    return 1 - strength * (1 - np.abs(across))


# --- records -------------------------------------------------------------------------------------


def cameras_of(like: Cameras, viewmats: np.ndarray, Ks: np.ndarray) -> Cameras:
    """Cameras with other matrices, in the type of `like`."""
    given = (torch.from_numpy(np.ascontiguousarray(matrix)) for matrix in (viewmats, Ks))
    viewmats_, Ks_ = (new.to(old) for new, old in zip(given, (like.viewmats, like.Ks), strict=True))
    return replace(like, viewmats=viewmats_, Ks=Ks_)


def posed(views: ObjectViews, change: Poses) -> ObjectViews:
    """The record with its views' poses changed."""
    cameras = views.cameras
    changed = change(cameras.viewmats.double().numpy())
    return replace(views, cameras=cameras_of(cameras, changed, cameras.Ks.double().numpy()))


def calibrated(views: ObjectViews, change: Poses) -> ObjectViews:
    """The record with its views' intrinsics changed."""
    cameras = views.cameras
    changed = change(cameras.Ks.double().numpy())
    return replace(views, cameras=cameras_of(cameras, cameras.viewmats.double().numpy(), changed))


def turned_world(views: ObjectViews, turn: Tensor) -> ObjectViews:
    """Everything turned about the world's origin by a rotation (4, 4)."""
    return replace(
        views,
        cameras=views.cameras.transformed(turn),
        input_camera=views.input_camera.transformed(turn),
        pivot=turn[:3, :3] @ views.pivot,
    )


def flipped_pictures(views: ObjectViews, rows: Tensor | slice) -> ObjectViews:
    """Pictures of some views (a mask or indices) mirrored left to right; the poses stay."""

    def flip(values: Tensor) -> Tensor:
        out = values.clone()
        out[rows] = values[rows].flip(2)
        return out

    depth = None if views.depth is None else flip(views.depth)
    return replace(views, rgb=flip(views.rgb), alpha=flip(views.alpha), depth=depth)


def flipped_input(views: ObjectViews) -> ObjectViews:
    """The input's pictures mirrored left to right; its camera stays."""
    names = ("input_rgb", "input_alpha", "input_depth", "identity_rgb", "identity_alpha")
    parts: dict[str, Any] = {name: getattr(views, name) for name in names}
    return replace(views, **{n: part.flip(1) for n, part in parts.items() if part is not None})


def scaled_depth(views: ObjectViews, factor: float) -> ObjectViews:
    """Depth of views and input times a factor."""
    parts: dict[str, Any] = {"depth": views.depth, "input_depth": views.input_depth}
    return replace(views, **{n: part * factor for n, part in parts.items() if part is not None})


def exposed(views: ObjectViews, gain: float | Tensor) -> ObjectViews:
    """The object's linear light times a gain, clipped; alpha stays."""
    linear = srgb_to_linear(straight(views) / 255) * gain
    return recoloured(views, 255 * linear_to_srgb(linear))


def straight(views: ObjectViews) -> Tensor:
    """The object's own colour, un-premultiplied, float (V, H, W, 3) in [0, 255]."""
    alpha = views.alpha[..., None].float() / 255
    return (views.rgb.float() / alpha.clamp_min(1 / 255)).clamp(0, 255)


def recoloured(views: ObjectViews, colours: Tensor) -> ObjectViews:
    """Colours as `straight` gives them put back under the record's alpha, over black."""
    return replace(views, rgb=as_bytes(colours * (views.alpha[..., None].float() / 255)))


def as_bytes(values: Tensor) -> Tensor:
    return (values + 0.5).clamp(0, 255).to(torch.uint8)


def nearest_up(views: ObjectViews) -> Tensor:
    """The quarter turn (4, 4) that brings the cameras' mean up nearest to +Y."""
    up = -views.cameras.viewmats[:, 1, :3].mean(dim=0)
    axis = int(up.abs().argmax())
    sign = float(up[axis].sign())
    turn: Any = torch.zeros(4, 4)
    turn[3, 3] = 1.0
    if axis == 1:
        turn[:3, :3] = torch.diag(torch.tensor([1.0, sign, sign]))
    else:
        turn[1, axis], turn[axis, 1], turn[2 - axis, 2 - axis] = sign, -sign, 1.0
    return turn
