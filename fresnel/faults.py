"""Named corruptions of multi-view data: what the gate is tested and calibrated against.

`corrupt` puts one of them into records over black, whose pictures, poses or place in the set it
changes.  Each has a strength in (0, 1], whose meaning is stated beside it.  Nothing is re-rendered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from fresnel.data import dataset as datasets
from fresnel.data.dataset import MultiViewDataset
from fresnel.data.records import ObjectViews
from fresnel.poses import transforms
from fresnel.poses.transforms import PICTURES, as_bytes, changed, exposed, posed, put, recoloured
from fresnel.scene.cameras import Cameras, relative_azimuth_deg
from fresnel.scene.colour import srgb_to_linear

_PRACTICAL = {
    "views_dark": {"darken": 0.8, "black_views": 0.25, "linear_colours": 0.75},
    "views_bright": {"overexpose": 0.9},
    "constant_frames": {"white_views": 0.25, "constant_views": 0.25},
    "views_empty": {"empty_views": 0.25},
    "frozen_views": {"frozen_views": 0.5},
    "exposure_drift": {"exposure_drift": 0.75, "fading_exposure": 0.75, "rolling_exposure": 0.5},
    "clipped": {"contrast": 0.75},
    "noisy": {"noise": 0.25},
    "channels_swapped": {"swapped_channels": 1.0},
    "views_grey": {"grey_views": 1.0},
    "views_negative": {"negative_views": 1.0},
    "colour_drift": {"drifting_white": 0.75},
    "out_of_frame": {"cropped": 0.5},
    "depth_mismatch": {"wrong_depth": 0.25},
    "mirrored": {"mirrored_views": 0.5, "mirrored_all": 1.0, "reversed_azimuth": 1.0},
    "pose_mismatch": {
        **{"shuffled_poses": 0.5, "rolled_poses": 1.0, "rolled_off_centre": 1.0},
        **{"jittered_poses": 0.5, "mixed_objects": 0.25, "others_poses": 1.0},
        "drifting_poses": 0.5,
    },
    "pose_convention": {
        **{"inverted_extrinsics": 1.0, "transposed_rotations": 1.0, "opengl_axes": 1.0},
        "opengl_camera_to_world": 1.0,
    },
    "focal_length": {"wrong_focal": 0.25},
    "principal_point": {"wrong_principal_point": 0.25},
    "input_pose": {"wrong_input_pose": 0.5},
    "pivot_offset": {"stated_pivot": 0.25, "shifted_poses": 0.25, "pivot_offset": 0.5},
    "azimuth_imbalance": {"one_side": 0.75},
    "billboard": {"billboard": 0.75},
    "blurred": {"blur": 0.5, "half_blurred": 0.5},
    "identity_mismatch": {"identity_mismatch": 0.5},
    "pose_invalid": {"nan_pose": 0.25},
    "duplicated_objects": {"duplicated_objects": 0.25},
    "split_leak": {"split_leak": 0.05},
    "class_imbalance": {"class_imbalance": 0.75},
}
EXPECTED = {name: (code, at) for code, names in _PRACTICAL.items() for name, at in names.items()}
"""The code that should come first, and the smallest strength at which it has to: practical ones."""
_BY_RECORD = {n for n, (_, practical) in EXPECTED.items() if practical == 1}
_BY_RECORD -= {"swapped_channels", "grey_views"}
"""Mistakes that are there or not, in a share `strength` of the records."""
UNPAIRED = (
    *("rolled_off_centre", "others_poses", "drifting_poses"),
    *("fading_exposure", "rolling_exposure", "linear_colours"),
)
"""Faults that no mend of `poses.explain` is the inverse of."""
ACCEPTED = {"rolled_off_centre": ("principal_point",)}
"""Other codes that are as right to come first: of two mistakes at once, the other one."""
Scene = Literal["black", "photo", "opaque_black", "opaque_white"]


def corrupt(
    objects: Sequence[ObjectViews] | MultiViewDataset, fault: str, strength: float, *, seed: int = 0
) -> Iterator[ObjectViews]:
    """The records with a fault, one after the other; each draws from its own seed.

    Raises:
        ValueError: for an unknown fault or a strength outside (0, 1].
    """
    if fault not in EXPECTED:
        raise ValueError(f"fault: got {fault!r}, want one of {', '.join(EXPECTED)}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength: got {strength}, want in (0, 1]")
    for index in range(len(objects)):
        yield broken(objects, index, fault, strength, seed=seed)


def broken(
    objects: Sequence[ObjectViews] | MultiViewDataset,
    index: int,
    fault: str,
    strength: float,
    *,
    seed: int = 0,
) -> ObjectViews:
    """One of the records that `corrupt` gives."""
    own, rng, count = objects[index], np.random.default_rng([seed, index]), len(objects)
    if fault in _BY_RECORD and rng.random() >= strength:
        return own
    if fault == "others_poses":  # the cameras of another record's views
        return replace(own, cameras=objects[(index + 1) % count].cameras)
    if fault == "mixed_objects":  # in every record this share of the views is of another
        other, rows = objects[(index + 1) % count], _chosen(own, strength, rng)
        for name in ("rgb", "alpha", "depth"):
            mine, its = getattr(own, name), getattr(other, name)
            if mine is not None and its is not None:
                own = replace(own, **{name: put(mine, rows, its[rows])})  # type: ignore[arg-type]
        return own
    if fault in ("duplicated_objects", "split_leak"):
        # This share of the records (of the second half, see `said`), at least the last, shows
        # what one before it (in the first half) shows, under its own name.
        first = 1 if fault == "duplicated_objects" else max(1, count // 2)
        if index < first or (rng.random() >= strength and index < count - 1):
            return own
        before = index if fault == "duplicated_objects" else first
        return replace(objects[int(rng.integers(before))], name=own.name)
    return _posed(_pictured(own, fault, strength, rng), fault, strength, rng)


def said(names: Sequence[str], fault: str, strength: float) -> dict[str, Any]:
    """What a set with this fault says in its meta about its objects; {} for most faults.

    For "split_leak" the first half of the objects is to train on, the second to test on; for
    "class_imbalance" 60% + 40% * strength are of one class, each of the others of its own.
    """
    if fault == "split_leak":
        half = len(names) // 2
        return {"object_splits": {n: "train" if k < half else "test" for k, n in enumerate(names)}}
    if fault == "class_imbalance":
        many = min(len(names) - 1, round((0.6 + 0.4 * strength) * len(names)))
        return {"object_classes": {n: "chair" if k < many else n for k, n in enumerate(names)}}
    return {}


def apply(dataset: MultiViewDataset, fault: str, strength: float, path: Path) -> MultiViewDataset:
    """Write a copy of a dataset with a fault; its manifest's meta says which."""
    meta = {**dataset.meta, "fault": {"name": fault, "strength": strength}}
    meta |= said(dataset.names, fault, strength)
    return datasets.write(path, corrupt(dataset, fault, strength), meta=meta, total=len(dataset))


def on_background(views: ObjectViews, scene: Scene, rng: np.random.Generator) -> ObjectViews:
    """The views over another background.

    "photo" (a smooth random picture in photographic contrast, another one for every view) keeps
    alpha; the opaque ones drop it, as data without masks does.
    """
    if scene == "black":
        return views
    behind: Tensor | float = 255.0 * scene.endswith("white")
    if scene == "photo":
        count, height, width = views.alpha.shape
        coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5))).float()
        fine = torch.from_numpy(rng.normal(0, 20, (count, 1, height, width))).float()
        large = interpolate(coarse, (height, width), mode="bicubic")
        behind = (large + fine).clamp(0, 255).permute(0, 2, 3, 1)
    solid = views.alpha[..., None].float() / 255
    rgb = as_bytes(transforms.straight(views) * solid + behind * (1 - solid))
    opaque = scene.startswith("opaque")
    return replace(views, rgb=rgb, alpha=views.alpha | 255 if opaque else views.alpha)


def _chosen(views: ObjectViews, share: float, rng: np.random.Generator, least: int = 1) -> Tensor:
    """Indices of this share of the views."""
    count = len(views.rgb)
    number = min(count, max(least, round(share * count)))
    return torch.from_numpy(np.sort(rng.permutation(count)[:number]))


def _pictured(views: ObjectViews, fault: str, by: float, rng: np.random.Generator) -> ObjectViews:
    """The record with a fault of its pictures; the same for other faults."""
    count, size = views.rgb.shape[0], views.rgb.shape[2]
    match fault:
        case "darken":  # the object's linear light times (1 - strength)
            return exposed(views, 1 - by)
        case "overexpose":  # over (1 - strength), clipped
            return exposed(views, 1 / max(1 - by, 1e-3))
        case "exposure_drift":  # times 2 to the power of every view's own, within +-4 * strength
            gain = 2.0 ** torch.from_numpy(rng.uniform(-4, 4, count) * by).float()
            return exposed(views, gain[:, None, None, None])
        case "fading_exposure":  # falls from the first view to the last by 8 * strength stops
            gain = 2.0 ** (-8 * by * torch.linspace(0, 1, count))
            return exposed(views, gain[:, None, None, None])
        case "rolling_exposure":  # by a wave over the views, of +-4 * strength stops
            gain = 2.0 ** (4 * by * torch.sin(2 * torch.pi * torch.arange(count) / count))
            return exposed(views, gain[:, None, None, None])
        case "linear_colours":  # written where sRGB is meant, blended in by `strength`
            linear = lambda own: 255 * srgb_to_linear(own / 255)  # noqa: E731
            return recoloured(views, lambda own: (1 - by) * own + by * linear(own))
        case "contrast":  # colours spread about their mean, 1 + 15 * strength times, and clipped
            own, solid = transforms.straight(views), views.alpha > 127
            mean = own[solid].mean() if solid.any() else own.mean()
            return recoloured(
                views, lambda own: ((own - mean) * (1 + 15 * by) + mean).clamp(0, 255)
            )
        case "noise":  # white, on the object's colours, sigma = 128 * strength of 255
            grain = torch.from_numpy(rng.normal(0, 128 * by, views.rgb.shape)).float()
            return recoloured(views, lambda own: (own + grain).clamp(0, 255))
        case "swapped_channels":  # red and blue exchanged, blended in by `strength`
            return recoloured(views, lambda own: (1 - by) * own + by * own.flip(-1))
        case "grey_views":  # as bright, without their colours, blended in by `strength`
            luma = torch.tensor([0.299, 0.587, 0.114])
            return recoloured(views, lambda own: (1 - by) * own + by * (own @ luma)[..., None])
        case "negative_views":
            return recoloured(views, lambda own: 255 - own)
        case "drifting_white":  # red rises by 2 * strength stops over the views, blue falls
            stops = by * torch.linspace(-1, 1, count)
            gain = 2.0 ** torch.stack([stops, 0 * stops, -stops], dim=-1)
            return exposed(views, gain[:, None, None])
        case "black_views":  # in this share of the views the object is; alpha stays
            rows = _chosen(views, by, rng)
            return changed(views, ["rgb"], lambda part: put(part, rows, 0))
        case "white_views" | "constant_views":  # this share is white, or one grey, and opaque
            rows, value = _chosen(views, by, rng), 255 if fault == "white_views" else 119
            flat = changed(views, ["rgb"], lambda part: put(part, rows, value))
            return changed(flat, ["alpha"], lambda part: put(part, rows, 255))
        case "empty_views":  # this share of the views shows nothing
            rows = _chosen(views, by, rng)
            return changed(views, PICTURES, lambda part: put(part, rows, 0))
        case "frozen_views":  # this share repeats the first view's picture; the poses stay
            rows = _chosen(views, by, rng)
            return changed(views, PICTURES, lambda part: put(part, rows, part[:1]))
        case "mirrored_views":  # this share is mirrored left to right; the poses stay
            return transforms.flipped(views, _chosen(views, by, rng), also_input=False)
        case "mirrored_all":  # the input's pictures too
            return transforms.flipped(views, torch.arange(count), also_input=True)
        case "cropped":  # views zoomed by 1 + 3 * strength, focal length included: leaves frames
            zoom, centre = 1 + 3 * by, views.cameras.Ks[:, :2, 2]
            scaled = _warped(views, torch.full((count, 2), zoom), centre, centre)
            return posed(scaled, "Ks", lambda Ks: transforms.calibrated(Ks, size, zoom=zoom))
        case "wrong_depth":  # of views and input times 1 - 0.8 * strength
            return transforms.scaled_depth(views, 1 - 0.8 * by)
        case "billboard":  # a flat cut-out, which is squeezed at its side, at 1 to nothing
            width = transforms.squeezed(_azimuth_deg(views).deg2rad().cos().numpy(), by)
            scale = torch.from_numpy(np.stack([width.clip(1e-3), np.ones_like(width)], -1)).float()
            centre = _pixels(views.cameras, views.pivot)[1]
            return _warped(views, scale, centre, centre)
        case "blur" | "half_blurred":  # of colour and alpha; sigma = strength * 0.1 of the width
            sigma, rows = 0.1 * by * size, _chosen(views, 0.5 if fault != "blur" else 1.0, rng)

            def blurred(part: Tensor) -> Tensor:
                axes = (0, sigma, sigma, 0)[: part.ndim]
                soft = gaussian_filter(part[rows].float().numpy(), axes, mode="nearest", truncate=3)
                return put(part, rows, as_bytes(torch.from_numpy(soft)))

            return changed(views, ("rgb", "alpha"), blurred)
        case "identity_mismatch":  # the input moved by strength / 2 of its width, colours swapped
            shift = max(1, round(0.5 * by * views.input_rgb.shape[1]))
            rgb, alpha = views.input_rgb.roll(shift, 1), views.input_alpha.roll(shift, 1)
            rgb = as_bytes((1 - by) * rgb.float() + by * rgb.roll(1, -1).float())
            return replace(views, identity_rgb=rgb, identity_alpha=alpha)
    return views


def _posed(views: ObjectViews, fault: str, by: float, rng: np.random.Generator) -> ObjectViews:
    """The record with a fault of its poses; the same for other faults."""
    count, size, pivot = len(views.rgb), views.cameras.width, views.pivot
    match fault:
        case "shuffled_poses":  # this share (at least two) changes places in a cycle
            order, chosen = np.arange(count), _chosen(views, by, rng, least=2).numpy()
            chosen = rng.permutation(chosen)
            order[chosen] = np.roll(chosen, 1)
            return posed(views, "viewmats", lambda poses: poses[order])
        case (
            "rolled_poses" | "rolled_off_centre"
        ):  # the next one's; a principal point 0.1 widths off
            rolled = posed(views, "viewmats", lambda poses: np.roll(poses, -1, 0))
            off = 0.1 if fault == "rolled_off_centre" else 0.0
            return posed(rolled, "Ks", lambda Ks: transforms.calibrated(Ks, size, off))
        case "jittered_poses":  # each turned about the vertical, sigma = 45 degrees * strength
            turns = _turns(rng.normal(0, 45 * by, count), pivot)
            return posed(views, "viewmats", lambda poses: poses @ turns)
        case (
            "drifting_poses"
        ):  # their time stamps gain on the pictures': turned, 180 deg * strength
            turns = _turns(np.linspace(0, 180 * by, count), pivot)  # for the last, for others less
            return posed(views, "viewmats", lambda poses: poses @ turns)
        case "inverted_extrinsics":  # camera-to-world given as world-to-camera
            return posed(views, "viewmats", np.linalg.inv)
        case "transposed_rotations":  # translations kept
            return posed(views, "viewmats", transforms.transposed)
        case "opengl_axes":  # y up, looking down -z, given as OpenCV's
            return posed(views, "viewmats", transforms.opengl)
        case "opengl_camera_to_world":
            return posed(views, "viewmats", lambda poses: np.linalg.inv(transforms.opengl(poses)))
        case "reversed_azimuth":  # turning the wrong way round, seen from the input camera
            at = pivot.double().numpy()
            away = views.input_camera.centers.double().numpy() - at
            return posed(
                views, "viewmats", lambda poses: transforms.mirrored_about(poses, at, away)
            )
        case "wrong_focal":  # said to be 1 + strength times what it is
            return posed(views, "Ks", lambda Ks: transforms.calibrated(Ks, size, zoom=1 + by))
        case "wrong_principal_point":  # said to be 0.3 * strength of the width to the side
            return posed(views, "Ks", lambda Ks: transforms.calibrated(Ks, size, 0.3 * by))
        case "wrong_input_pose":  # said to be 180 degrees * strength further around the pivot
            turn = torch.from_numpy(_turns(np.array([180 * by]), pivot)[0]).float()
            viewmats = views.input_camera.viewmats @ turn
            return replace(views, input_camera=replace(views.input_camera, viewmats=viewmats))
        case "stated_pivot":  # off by 1.5 * strength of the cameras' distance; all else stays
            return replace(views, pivot=pivot + _sideways(views, 1.5 * by, rng))
        case (
            "shifted_poses"
        ):  # said to be elsewhere, by `strength` of their distance; all else stays
            move = _sideways(views, by, rng).double().numpy()
            return posed(views, "viewmats", lambda poses: transforms.moved(poses, move))
        case "pivot_offset":
            return _off_pivot(views, _sideways(views, 1.5 * by, rng))
        case "one_side":  # views within 180 degrees * (1 - strength) of the input; the nearest
            azimuth = _azimuth_deg(views).abs()
            rows = azimuth <= max(180 * (1 - by), float(azimuth.min()))
            return changed(views, (*PICTURES, "cameras"), lambda part: part[rows])
        case "nan_pose":  # this share; in memory only: `dataset.write` refuses it
            viewmats = put(views.cameras.viewmats, _chosen(views, by, rng), torch.nan)
            return replace(views, cameras=replace(views.cameras, viewmats=viewmats))
    return views


def _off_pivot(views: ObjectViews, move: Tensor) -> ObjectViews:
    """An orbit whose centre is off (the original experiment's by 1.5 radii), and the pictures too.

    The object moves through every frame as a picture at the depth of the old pivot would; where it
    ends up behind the camera the view is empty.
    """
    by = move.double().numpy()
    away = posed(views, "viewmats", lambda poses: transforms.moved(poses, by))
    (before, centre), (after, pixel) = (_pixels(one.cameras, views.pivot) for one in (views, away))
    scale = (before / after.clamp_min(1e-3))[:, None].expand(-1, 2)
    seen = _warped(views, scale, centre, pixel)
    shown, shift = (after > 0.05 * before)[:, None, None], (after - before)[:, None, None]
    alpha, depth = seen.alpha * shown, seen.depth
    if depth is not None:
        depth = torch.where((alpha > 0) & (depth > 0), (depth + shift).clamp_min(0), 0)
    pictures = replace(seen, rgb=seen.rgb * shown[..., None], alpha=alpha, depth=depth)
    return replace(pictures, cameras=away.cameras, pivot=views.pivot + move)


def _warped(views: ObjectViews, scale: Tensor, centre: Tensor, target: Tensor) -> ObjectViews:
    """The pictures scaled by (V, 2) about pixel `centre` (V, 2), which moves to pixel `target`."""
    # affine_grid maps output to input coordinates, both in [-1, 1] over the frame.
    size = views.cameras.width
    theta = torch.zeros(len(scale), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / scale[:, 0], 1 / scale[:, 1]
    theta[:, :, 2] = (2 * centre / size - 1) - (2 * target / size - 1) / scale
    grid = affine_grid(theta, [len(scale), 1, *views.alpha.shape[1:]], align_corners=False)

    def sampled(part: Tensor, mode: str = "bilinear") -> Tensor:
        layers = part.reshape(*part.shape[:3], -1).permute(0, 3, 1, 2).float()
        found = grid_sample(layers, grid, mode=mode, align_corners=False)
        return found.permute(0, 2, 3, 1).reshape(part.shape)

    views = changed(views, ("rgb", "alpha"), lambda part: as_bytes(sampled(part)))
    return changed(views, ["depth"], lambda part: sampled(part, "nearest"))


def _pixels(cameras: Cameras, point: Tensor) -> tuple[Tensor, Tensor]:
    """A world point's depths (V,) and pixels (V, 2)."""
    there = cameras.viewmats[:, :3, :3] @ point + cameras.viewmats[:, :3, 3]
    unit = there / there[:, 2:].clamp_min(1e-3)
    return there[:, 2], (cameras.Ks @ unit[..., None])[:, :2, 0]


def _azimuth_deg(views: ObjectViews) -> Tensor:
    return relative_azimuth_deg(views.cameras, views.input_camera, views.pivot)


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
