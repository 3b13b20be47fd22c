"""Corruptions of poses, and of how they belong to the pictures.

See `faults` for what strength and background mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fresnel.data.dataset import ObjectViews
from fresnel.faults.pictures import choose, join, put, straight, to_camera, warp
from fresnel.scene.cameras import Cameras


def shuffled_poses(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the poses (at least two) changes places in a cycle; the pictures stay."""
    chosen = choose(views, strength, rng, at_least=2)
    chosen = chosen[torch.from_numpy(rng.permutation(len(chosen)))]
    return _posed(
        views, put(views.cameras.viewmats, chosen, views.cameras.viewmats[chosen.roll(1)])
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
    before = to_camera(views.cameras, views.pivot)
    after = to_camera(cameras, views.pivot)
    scale = before[:, 2] / after[:, 2].clamp_min(1e-3)
    visible = (after[:, 2] > 0.05 * before[:, 2]).to(scale)
    K, size = views.cameras.Ks, views.cameras.width
    pixel = (K @ (after / after[:, 2:].clamp_min(1e-3))[..., None])[:, :2, 0]
    centre = (K @ (before / before[:, 2:])[..., None])[:, :2, 0]
    moved = warp(views, background, scale, scale, centre, pixel, size)
    shown = visible[:, None, None].bool()
    alpha = moved.alpha * shown
    depth = None
    if moved.depth is not None:
        shift = (after[:, 2] - before[:, 2])[:, None, None]
        depth = torch.where((alpha > 0) & (moved.depth > 0), (moved.depth + shift).clamp_min(0), 0)
    rgb = join(straight(moved, background), alpha, background)
    return replace(moved, rgb=rgb, alpha=alpha, depth=depth, cameras=cameras, pivot=pivot)


def nan_pose(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """This share of the poses is NaN.  In memory only: `dataset.write` refuses it."""
    viewmats = views.cameras.viewmats.clone()
    viewmats[choose(views, strength, rng)] = torch.nan
    return replace(views, cameras=replace(views.cameras, viewmats=viewmats))


def rolled_poses(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Every view has the pose of the next one, in this share of the records."""
    if rng.random() >= strength:
        return views
    return _posed(views, views.cameras.viewmats.roll(-1, 0))


def jittered_poses(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Every camera turned about the pivot's vertical by its own angle, sigma = 45 degrees *
    strength."""
    angles = torch.from_numpy(rng.normal(0, 45 * strength, len(views.rgb))).float()
    return _posed(views, views.cameras.viewmats @ _turn(angles, views.pivot))


def inverted_extrinsics(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Camera-to-world matrices given as world-to-camera, in this share of the records."""
    if rng.random() >= strength:
        return views
    return _posed(views, torch.linalg.inv(views.cameras.viewmats))


def transposed_rotations(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Rotations transposed, translations kept, in this share of the records."""
    if rng.random() >= strength:
        return views
    viewmats = views.cameras.viewmats.clone()
    viewmats[:, :3, :3] = views.cameras.viewmats[:, :3, :3].transpose(1, 2)
    return _posed(views, viewmats)


def opengl_axes(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """OpenGL cameras (y up, looking down -z) given as OpenCV's, in this share of the records."""
    if rng.random() >= strength:
        return views
    return _posed(views, torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])) @ views.cameras.viewmats)


def opengl_camera_to_world(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """OpenGL camera-to-world matrices given as OpenCV world-to-camera ones, in this share of the
    records."""
    if rng.random() >= strength:
        return views
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    return _posed(views, torch.linalg.inv(flip @ views.cameras.viewmats))


def reversed_azimuth(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Poses that turn about the object the wrong way round, seen from the input camera, in this
    share of the records."""
    if rng.random() >= strength:
        return views
    away = views.input_camera.centers - views.pivot
    normal = torch.nn.functional.normalize(torch.stack([away[2], 0 * away[0], -away[0]]), dim=0)
    mirror = torch.eye(4)
    mirror[:3, :3] -= 2 * normal[:, None] * normal
    mirror[:3, 3] = 2 * normal * (normal @ views.pivot)
    across = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    return _posed(views, across @ views.cameras.viewmats @ mirror)


def wrong_focal(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The views' focal length is said to be 1 + strength times what it is."""
    Ks = views.cameras.Ks.clone()
    Ks[:, 0, 0] *= 1 + strength
    Ks[:, 1, 1] *= 1 + strength
    return replace(views, cameras=replace(views.cameras, Ks=Ks))


def wrong_principal_point(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The views' principal point is said to be 0.3 * strength of the width to the side."""
    Ks = views.cameras.Ks.clone()
    Ks[:, 0, 2] += 0.3 * strength * views.cameras.width
    return replace(views, cameras=replace(views.cameras, Ks=Ks))


def wrong_input_pose(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The input camera is said to stand 180 degrees * strength further around the pivot."""
    turn = _turn(torch.tensor([180 * strength]), views.pivot)[0]
    viewmats = views.input_camera.viewmats @ turn
    return replace(views, input_camera=replace(views.input_camera, viewmats=viewmats))


def tilted_world(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Everything turned about the world's X by 90 degrees * strength: at 1, Z is up."""
    angle = torch.tensor(0.5 * np.pi * strength, dtype=torch.float32)
    turn = torch.eye(4)
    turn[1, 1] = turn[2, 2] = angle.cos()
    turn[1, 2], turn[2, 1] = -angle.sin(), angle.sin()
    return replace(
        views,
        cameras=views.cameras.transformed(turn),
        input_camera=views.input_camera.transformed(turn),
        pivot=turn[:3, :3] @ views.pivot,
    )


def stated_pivot(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The pivot that the data states is off by 1.5 * strength of the cameras' distance; cameras and
    pictures stay."""
    moved = _moved(views, 1.5 * strength, rng)
    return replace(views, pivot=views.pivot + (moved.centers[0] - views.cameras.centers[0]))


def one_side(
    views: ObjectViews, strength: float, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """Only views within 180 degrees * (1 - strength) of the input's azimuth are left (at least the
    nearest)."""
    from fresnel.scene.cameras import relative_azimuth_deg

    camera = views.input_camera.reshape(1)
    azimuth = relative_azimuth_deg(views.cameras.reshape(1, -1), camera, views.pivot)[0].abs()
    rows = (azimuth <= max(180 * (1 - strength), float(azimuth.min()))).nonzero()[:, 0]
    return replace(
        views,
        rgb=views.rgb[rows],
        alpha=views.alpha[rows],
        depth=None if views.depth is None else views.depth[rows],
        cameras=views.cameras[rows],
    )


def _posed(views: ObjectViews, viewmats: Tensor) -> ObjectViews:
    return replace(views, cameras=replace(views.cameras, viewmats=viewmats))


def _turn(angles_deg: Tensor, pivot: Tensor) -> Tensor:
    """Rotations (N, 4, 4) about the vertical through the pivot."""
    cos, sin = angles_deg.deg2rad().cos(), angles_deg.deg2rad().sin()
    turn = torch.eye(4).repeat(len(angles_deg), 1, 1)
    turn[:, 0, 0], turn[:, 0, 2], turn[:, 2, 0], turn[:, 2, 2] = cos, sin, -sin, cos
    turn[:, :3, 3] = pivot - turn[:, :3, :3] @ pivot
    return turn


def _moved(views: ObjectViews, by: float, rng: np.random.Generator) -> Cameras:
    """The cameras moved together, `by` times their distance, in a random horizontal direction."""
    angle = rng.uniform(0, 2 * np.pi)
    radius = (views.cameras.centers - views.pivot).norm(dim=-1).median()
    move = by * radius * torch.tensor([np.sin(angle), 0.0, np.cos(angle)], dtype=torch.float32)
    viewmats = views.cameras.viewmats.clone()
    viewmats[:, :3, 3] -= viewmats[:, :3, :3] @ move
    return replace(views.cameras, viewmats=viewmats)
