"""Corruptions of poses, and of how they belong to the pictures.  Records are over black."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fresnel.data.records import ObjectViews
from fresnel.faults.pictures import choose, fault, to_camera, unit, warp
from fresnel.poses import transforms
from fresnel.poses.transforms import calibrated, posed
from fresnel.scene.cameras import relative_azimuth_deg


@fault("pose_mismatch", 0.5)
def shuffled_poses(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """This share of the poses (at least two) changes places in a cycle; the pictures stay."""
    chosen = choose(views, strength, rng, at_least=2).numpy()
    order = np.arange(len(views.rgb))
    chosen = rng.permutation(chosen)
    order[chosen] = np.roll(chosen, 1)
    return posed(views, lambda poses: poses[order])


@fault("pose_mismatch", 1.0, by_record=True)
def rolled_poses(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Every view has the pose of the next one, in this share of the records."""
    return posed(views, lambda poses: np.roll(poses, -1, 0))


@fault("pose_mismatch", 1.0, by_record=True)
def rolled_off_centre(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Every view has the pose of the next one, and the principal point is 0.1 widths off."""
    rolled = rolled_poses(views, strength, rng)
    return calibrated(rolled, lambda Ks: transforms.shifted(Ks, 0.1, 0.0, views.cameras.width))


@fault("pose_mismatch", 0.5)
def jittered_poses(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Every camera turned about the pivot's vertical by its own angle, sigma = 45 degrees *
    strength."""
    turns = _turns(rng.normal(0, 45 * strength, len(views.rgb)), views.pivot)
    return posed(views, lambda poses: poses @ turns)


@fault("pose_convention", 1.0, by_record=True)
def inverted_extrinsics(
    views: ObjectViews, strength: float, rng: np.random.Generator
) -> ObjectViews:
    """Camera-to-world matrices given as world-to-camera, in this share of the records."""
    return posed(views, transforms.inverted)


@fault("pose_convention", 1.0, by_record=True)
def transposed_rotations(
    views: ObjectViews, strength: float, rng: np.random.Generator
) -> ObjectViews:
    """Rotations transposed, translations kept, in this share of the records."""
    return posed(views, transforms.transposed)


@fault("pose_convention", 1.0, by_record=True)
def opengl_axes(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """OpenGL cameras (y up, looking down -z) given as OpenCV's, in this share of the records."""
    return posed(views, transforms.opengl)


@fault("pose_convention", 1.0, by_record=True)
def opengl_camera_to_world(
    views: ObjectViews, strength: float, rng: np.random.Generator
) -> ObjectViews:
    """OpenGL camera-to-world matrices given as OpenCV world-to-camera ones, in this share of the
    records."""
    return posed(views, lambda poses: transforms.inverted(transforms.opengl(poses)))


@fault("mirrored", 1.0, by_record=True)
def reversed_azimuth(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Poses that turn about the object the wrong way round, seen from the input camera, in this
    share of the records."""
    pivot, centre = views.pivot.double().numpy(), views.input_camera.centers.double().numpy()
    return posed(views, lambda poses: transforms.mirrored_about(poses, pivot, centre - pivot))


@fault("focal_length", 0.25)
def wrong_focal(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The views' focal length is said to be 1 + strength times what it is."""
    return calibrated(views, lambda Ks: transforms.zoomed(Ks, 1 + strength))


@fault("principal_point", 0.25)
def wrong_principal_point(
    views: ObjectViews, strength: float, rng: np.random.Generator
) -> ObjectViews:
    """The views' principal point is said to be 0.3 * strength of the width to the side."""
    width = views.cameras.width
    return calibrated(views, lambda Ks: transforms.shifted(Ks, 0.3 * strength, 0.0, width))


@fault("input_pose", 0.5)
def wrong_input_pose(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The input camera is said to stand 180 degrees * strength further around the pivot."""
    turn = torch.from_numpy(_turns(np.array([180 * strength]), views.pivot)[0]).float()
    viewmats = views.input_camera.viewmats @ turn
    return replace(views, input_camera=replace(views.input_camera, viewmats=viewmats))


@fault("up_axis", 1.0)
def tilted_world(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Everything turned about the world's X by 90 degrees * strength: at 1, Z is up."""
    angle = torch.tensor(0.5 * np.pi * strength, dtype=torch.float32)
    turn = torch.eye(4)
    turn[1, 1] = turn[2, 2] = angle.cos()
    turn[1, 2], turn[2, 1] = -angle.sin(), angle.sin()
    return transforms.turned_world(views, turn)


@fault("pivot_offset", 0.25)
def stated_pivot(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The pivot that the data states is off by 1.5 * strength of the cameras' distance; cameras and
    pictures stay."""
    return replace(views, pivot=views.pivot + _sideways(views, 1.5 * strength, rng))


@fault("pivot_offset", 0.25)
def shifted_poses(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """All views' cameras are said to stand elsewhere, by `strength` of their distance; the
    pictures, the input camera and the declared pivot stay."""
    move = _sideways(views, strength, rng).double().numpy()
    return posed(views, lambda poses: transforms.moved(poses, move))


@fault("pivot_offset", 0.5)
def pivot_offset(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """The orbit's centre is off by `strength` * 1.5 of the orbit's radius (the original experiment
    had 1.5), and the pictures follow.

    The object moves through every frame as a picture at the depth of the old pivot would; where it
    ends up behind the camera the view is empty.
    """
    move = _sideways(views, 1.5 * strength, rng)
    away = posed(views, lambda poses: transforms.moved(poses, move.double().numpy()))
    before, after = (to_camera(one.cameras, views.pivot) for one in (views, away))
    scale = (before[:, 2] / after[:, 2].clamp_min(1e-3))[:, None].expand(-1, 2)
    centre, pixel = ((views.cameras.Ks @ unit(p)[..., None])[:, :2, 0] for p in (before, after))
    seen = warp(views, scale, centre, pixel)
    shown = (after[:, 2] > 0.05 * before[:, 2])[:, None, None]
    alpha, depth = seen.alpha * shown, None
    if seen.depth is not None:
        shift = (after[:, 2] - before[:, 2])[:, None, None]
        depth = torch.where((alpha > 0) & (seen.depth > 0), (seen.depth + shift).clamp_min(0), 0)
    pictures = replace(seen, rgb=seen.rgb * shown[..., None], alpha=alpha, depth=depth)
    return replace(pictures, cameras=away.cameras, pivot=views.pivot + move)


@fault("azimuth_imbalance", 0.75)
def one_side(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """Only views within 180 degrees * (1 - strength) of the input's azimuth are left (at least the
    nearest)."""
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


@fault("pose_invalid", 0.25)
def nan_pose(views: ObjectViews, strength: float, rng: np.random.Generator) -> ObjectViews:
    """This share of the poses is NaN.  In memory only: `dataset.write` refuses it."""
    viewmats = views.cameras.viewmats.clone()
    viewmats[choose(views, strength, rng)] = torch.nan
    return replace(views, cameras=replace(views.cameras, viewmats=viewmats))


def _turns(angles_deg: np.ndarray, pivot: Tensor) -> np.ndarray:
    """Rotations (N, 4, 4) about the vertical through the pivot."""
    angles, centre = np.radians(angles_deg), pivot.double().numpy()
    turns = np.tile(np.eye(4), (len(angles), 1, 1))
    turns[:, 0, 0] = turns[:, 2, 2] = np.cos(angles)
    turns[:, 0, 2], turns[:, 2, 0] = np.sin(angles), -np.sin(angles)
    turns[:, :3, 3] = centre - turns[:, :3, :3] @ centre
    return turns


def _sideways(views: ObjectViews, by: float, rng: np.random.Generator) -> Tensor:
    """A random horizontal world vector (3,) of `by` times the cameras' distance."""
    angle = rng.uniform(0, 2 * np.pi)
    radius = (views.cameras.centers - views.pivot).norm(dim=-1).median()
    return by * radius * torch.tensor([np.sin(angle), 0.0, np.cos(angle)], dtype=torch.float32)
