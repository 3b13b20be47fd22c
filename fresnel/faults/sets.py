"""Corruptions of whole sets, and what puts any fault into a set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fresnel.data import dataset as datasets
from fresnel.data.dataset import MultiViewDataset
from fresnel.data.records import ObjectViews
from fresnel.faults import pictures, poses  # noqa: F401, poses registers its faults
from fresnel.faults.pictures import EXPECTED, FAULTS, as_bytes, straight

Objects = Sequence[ObjectViews] | MultiViewDataset
SetFault = Callable[[Objects, int, float, np.random.Generator], ObjectViews]


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
    rows = pictures.choose(own, strength, rng)
    depth = own.depth
    if own.depth is not None and other.depth is not None:
        depth = pictures.put(own.depth, rows, other.depth[rows])
    return replace(
        own,
        rgb=pictures.put(own.rgb, rows, other.rgb[rows]),
        alpha=pictures.put(own.alpha, rows, other.alpha[rows]),
        depth=depth,
    )


def others_poses(
    objects: Objects, index: int, strength: float, rng: np.random.Generator
) -> ObjectViews:
    """This share of the records has the cameras of another record's views."""
    own, other = objects[index], objects[(index + 1) % len(objects)]
    return replace(own, cameras=other.cameras) if rng.random() < strength else own


def split_leak(
    objects: Objects, index: int, strength: float, rng: np.random.Generator
) -> ObjectViews:
    """The second half of the set is its test set (see `said`), and this share of it, at least one
    record, shows what a training record shows, under its own name."""
    own, half = objects[index], len(objects) // 2
    if index < half or (rng.random() >= strength and index < len(objects) - 1):
        return own
    return replace(objects[int(rng.integers(half))], name=own.name) if half else own


SET_FAULTS: dict[str, SetFault] = {
    "duplicated_objects": duplicated_objects,
    "mixed_objects": mixed_objects,
    "others_poses": others_poses,
    "split_leak": split_leak,
}
EXPECTED |= {
    "duplicated_objects": ("duplicated_objects", 0.25),
    "mixed_objects": ("pose_mismatch", 0.25),
    "others_poses": ("pose_mismatch", 1.0),
    "split_leak": ("split_leak", 0.05),
    "class_imbalance": ("class_imbalance", 0.75),
}
UNPAIRED = ("rolled_off_centre", "others_poses", "fading_exposure", "linear_colours")
"""Faults that no mend of `poses.explain` is the inverse of."""


def said(names: Sequence[str], fault: str, strength: float) -> dict[str, Any]:
    """What a set with this fault says in its meta about its objects; {} for most faults.

    For "split_leak" the first half of the objects is to train on, the second to test on; for
    "class_imbalance" 60% + 40% * strength are of one class, each of the others of its own.
    """
    if fault == "split_leak":
        half = len(names) // 2
        splits = {name: "train" if k < half else "test" for k, name in enumerate(names)}
        return {"object_splits": splits}
    if fault == "class_imbalance":
        many = min(len(names) - 1, round((0.6 + 0.4 * strength) * len(names)))
        return {"object_classes": {n: "chair" if k < many else n for k, n in enumerate(names)}}
    return {}


def corrupt(
    objects: Objects, fault: str, strength: float, *, seed: int = 0
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
        whole = fault in SET_FAULTS
        views = SET_FAULTS[fault](objects, index, strength, rng) if whole else objects[index]
        yield FAULTS[fault](views, strength, rng) if fault in FAULTS else views


Scene = Literal["black", "photo", "opaque_black", "opaque_white"]


def on_background(views: ObjectViews, scene: Scene, rng: np.random.Generator) -> ObjectViews:
    """The views over another background.

    "photo" (a smooth random picture in photographic contrast, another one for every view) keeps
    alpha; the opaque ones drop it, as data without masks does.
    """
    if scene == "black":
        return views
    behind: torch.Tensor | float = 255.0 * scene.endswith("white")
    if scene == "photo":
        height, width = views.alpha.shape[1:]
        coarse = torch.from_numpy(rng.uniform(0, 255, (len(views.rgb), 3, 5, 5))).float()
        fine = torch.from_numpy(rng.normal(0, 20, (len(views.rgb), 1, height, width))).float()
        large = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        behind = (large + fine).clamp(0, 255).permute(0, 2, 3, 1)
    solid = views.alpha[..., None].float() / 255
    rgb = as_bytes(straight(views) * solid + behind * (1 - solid))
    opaque = scene.startswith("opaque")
    return replace(views, rgb=rgb, alpha=views.alpha | 255 if opaque else views.alpha)


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
    meta = {**dataset.meta, "fault": {"name": fault, "strength": strength, "seed": seed}}
    meta |= said(dataset.names, fault, strength)
    objects = corrupt(dataset, fault, strength, seed=seed)
    return datasets.write(path, objects, meta=meta, overwrite=overwrite, total=len(dataset))
