"""Named corruptions of multi-view data: what the gate is tested and calibrated against.

Every fault is a plain function of one record (or, in `SET_FAULTS`, of the whole set; in
`META_FAULTS`, of what the set says of its objects), a strength in (0, 1] whose meaning it states,
and a random generator; `background` is the sRGB colour that the views are over.  Nothing is
re-rendered.  Mistakes that are there or not hit a share of the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fresnel.data import dataset as datasets
from fresnel.data.dataset import MultiViewDataset, ObjectViews
from fresnel.faults.pictures import (
    billboard,
    black_views,
    blur,
    constant_views,
    contrast,
    cropped,
    darken,
    empty_views,
    exposure_drift,
    frozen_views,
    identity_mismatch,
    join,
    mirrored_all,
    mirrored_views,
    noise,
    overexpose,
    straight,
    swapped_channels,
    white_views,
    wrong_depth,
)
from fresnel.faults.poses import (
    inverted_extrinsics,
    jittered_poses,
    nan_pose,
    one_side,
    opengl_axes,
    opengl_camera_to_world,
    pivot_offset,
    reversed_azimuth,
    rolled_poses,
    shifted_poses,
    shuffled_poses,
    stated_pivot,
    tilted_world,
    transposed_rotations,
    wrong_focal,
    wrong_input_pose,
    wrong_principal_point,
)

Fault = Callable[[ObjectViews, float, np.random.Generator, Sequence[float]], ObjectViews]
Objects = Sequence[ObjectViews] | MultiViewDataset
SetFault = Callable[[Objects, int, float, np.random.Generator], ObjectViews]
MetaFault = Callable[[Sequence[str], float], dict[str, Any]]


def duplicated_objects(
    objects: Objects, index: int, strength: float, rng: np.random.Generator
) -> ObjectViews:
    """This share of the records, at least the last, shows what another one shows, under its own
    name."""
    own, last = objects[index], index == len(objects) - 1
    if index == 0 or (rng.random() >= strength and not last):
        return own
    return replace(objects[int(rng.integers(index))], name=own.name)


def mixed_objects(
    objects: Objects, index: int, strength: float, rng: np.random.Generator
) -> ObjectViews:
    """In every record, this share of the views shows another record's object."""
    own, other = objects[index], objects[(index + 1) % len(objects)]
    rows = rng.permutation(len(own.rgb))[: max(1, round(strength * len(own.rgb)))]
    rgb, alpha = own.rgb.clone(), own.alpha.clone()
    depth = None if own.depth is None else own.depth.clone()
    rgb[rows], alpha[rows] = other.rgb[rows], other.alpha[rows]
    if depth is not None and other.depth is not None:
        depth[rows] = other.depth[rows]
    return replace(own, rgb=rgb, alpha=alpha, depth=depth)


def split_leak(
    objects: Objects, index: int, strength: float, rng: np.random.Generator
) -> ObjectViews:
    """The second half of the set is its test set (see `halves`), and this share of it, at least
    one record, shows what a training record shows, under its own name."""
    own, half = objects[index], len(objects) // 2
    if index < half or (rng.random() >= strength and index < len(objects) - 1):
        return own
    return replace(objects[int(rng.integers(half))], name=own.name) if half else own


def halves(names: Sequence[str], strength: float) -> dict[str, Any]:
    """The first half of the objects is to train on, the second to test on."""
    half = len(names) // 2
    return {
        "object_splits": {name: "train" if k < half else "test" for k, name in enumerate(names)}
    }


def class_imbalance(names: Sequence[str], strength: float) -> dict[str, Any]:
    """60% + 40% * strength of the objects are of one class, each of the others (at least one) of
    its own."""
    many = min(len(names) - 1, round((0.6 + 0.4 * strength) * len(names)))
    return {"object_classes": {name: "chair" if k < many else name for k, name in enumerate(names)}}


FAULTS: dict[str, Fault] = {
    "darken": darken,
    "overexpose": overexpose,
    "black_views": black_views,
    "white_views": white_views,
    "constant_views": constant_views,
    "empty_views": empty_views,
    "frozen_views": frozen_views,
    "exposure_drift": exposure_drift,
    "contrast": contrast,
    "noise": noise,
    "swapped_channels": swapped_channels,
    "cropped": cropped,
    "wrong_depth": wrong_depth,
    "mirrored_views": mirrored_views,
    "mirrored_all": mirrored_all,
    "shuffled_poses": shuffled_poses,
    "rolled_poses": rolled_poses,
    "jittered_poses": jittered_poses,
    "inverted_extrinsics": inverted_extrinsics,
    "transposed_rotations": transposed_rotations,
    "opengl_axes": opengl_axes,
    "opengl_camera_to_world": opengl_camera_to_world,
    "reversed_azimuth": reversed_azimuth,
    "wrong_focal": wrong_focal,
    "wrong_principal_point": wrong_principal_point,
    "wrong_input_pose": wrong_input_pose,
    "tilted_world": tilted_world,
    "stated_pivot": stated_pivot,
    "shifted_poses": shifted_poses,
    "pivot_offset": pivot_offset,
    "one_side": one_side,
    "billboard": billboard,
    "blur": blur,
    "identity_mismatch": identity_mismatch,
    "nan_pose": nan_pose,
}
SET_FAULTS: dict[str, SetFault] = {
    "duplicated_objects": duplicated_objects,
    "mixed_objects": mixed_objects,
    "split_leak": split_leak,
}
META_FAULTS: dict[str, MetaFault] = {"split_leak": halves, "class_imbalance": class_imbalance}

EXPECTED: dict[str, tuple[str, float]] = {
    "darken": ("views_dark", 0.8),
    "overexpose": ("views_bright", 0.9),
    "black_views": ("views_dark", 0.25),
    "white_views": ("constant_frames", 0.25),
    "constant_views": ("constant_frames", 0.25),
    "empty_views": ("views_empty", 0.25),
    "frozen_views": ("frozen_views", 0.5),
    "exposure_drift": ("exposure_drift", 0.75),
    "contrast": ("clipped", 0.75),
    "noise": ("noisy", 0.25),
    "swapped_channels": ("channels_swapped", 1.0),
    "cropped": ("out_of_frame", 0.5),
    "wrong_depth": ("depth_mismatch", 0.25),
    "mirrored_views": ("mirrored", 0.5),
    "mirrored_all": ("mirrored", 1.0),
    "shuffled_poses": ("pose_mismatch", 0.5),
    "rolled_poses": ("pose_mismatch", 1.0),
    "jittered_poses": ("pose_mismatch", 0.5),
    "inverted_extrinsics": ("pose_convention", 1.0),
    "transposed_rotations": ("pose_convention", 1.0),
    "opengl_axes": ("pose_convention", 1.0),
    "opengl_camera_to_world": ("pose_convention", 1.0),
    "reversed_azimuth": ("mirrored", 1.0),
    "wrong_focal": ("focal_length", 0.25),
    "wrong_principal_point": ("principal_point", 0.25),
    "wrong_input_pose": ("input_pose", 0.5),
    "tilted_world": ("up_axis", 1.0),
    "stated_pivot": ("pivot_offset", 0.25),
    "shifted_poses": ("pivot_offset", 0.25),
    "pivot_offset": ("pivot_offset", 0.5),
    "one_side": ("azimuth_imbalance", 0.75),
    "billboard": ("billboard", 0.75),
    "blur": ("blurred", 0.5),
    "identity_mismatch": ("identity_mismatch", 0.5),
    "nan_pose": ("pose_invalid", 0.25),
    "duplicated_objects": ("duplicated_objects", 0.25),
    "mixed_objects": ("pose_mismatch", 0.25),
    "split_leak": ("split_leak", 0.05),
    "class_imbalance": ("class_imbalance", 0.75),
}
"""The code that should come first, and the smallest strength at which it has to: practical ones."""


def corrupt(
    objects: Objects,
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
    if fault not in EXPECTED:
        raise ValueError(f"fault: got {fault!r}, want one of {', '.join(EXPECTED)}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength: got {strength}, want in (0, 1]")
    for index in range(len(objects)):
        rng = np.random.default_rng([seed, index])
        if fault in SET_FAULTS:
            yield SET_FAULTS[fault](objects, index, strength, rng)
        elif fault in FAULTS:
            yield FAULTS[fault](objects[index], strength, rng, background)
        else:
            yield objects[index]


def said(names: Sequence[str], fault: str, strength: float) -> dict[str, Any]:
    """What a set with this fault says in its meta about its objects; {} for most faults."""
    return META_FAULTS[fault](names, strength) if fault in META_FAULTS else {}


Scene = Literal["black", "white", "photo", "opaque_black", "opaque_white"]


def on_background(
    views: ObjectViews, scene: Scene, rng: np.random.Generator, background: Sequence[float]
) -> ObjectViews:
    """The views over another background.

    "black", "white" and "photo" (a smooth random picture in photographic contrast, another one for
    every view) keep alpha; the opaque ones drop it, as data without masks does.
    """
    own = straight(views, background)
    alpha = views.alpha
    if scene == "photo":
        height, width = alpha.shape[1:]
        coarse = torch.from_numpy(rng.uniform(0, 255, (len(alpha), 3, 5, 5))).float()
        fine = torch.from_numpy(rng.normal(0, 20, (len(alpha), 1, height, width))).float()
        behind = torch.nn.functional.interpolate(
            coarse, (height, width), mode="bicubic", align_corners=False
        )
        behind = (behind + fine).clamp(0, 255).permute(0, 2, 3, 1)
        solid = alpha[..., None].float() / 255
        rgb = (own * solid + behind * (1 - solid) + 0.5).clamp(0, 255).to(torch.uint8)
        return replace(views, rgb=rgb)
    value = 1.0 if scene.endswith("white") else 0.0
    rgb = join(own, alpha, (value,) * 3)
    opaque = scene.startswith("opaque")
    return replace(views, rgb=rgb, alpha=torch.full_like(alpha, 255) if opaque else alpha)


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
    meta |= said(dataset.names, fault, strength)
    return datasets.write(
        path,
        objects,
        background=dataset.background,
        meta=meta,
        overwrite=overwrite,
        total=len(dataset),
    )
