"""Other people's multi-view data: nerfstudio and Blender, COLMAP, CO3D, WebDataset shards.

Each reader turns a folder's description into `Capture`s (one object or scene each) without
touching a picture; `capture.read` then makes an `ObjectViews` of one: undistorted, square, with
OpenCV world-to-camera poses in a world whose Y is up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.data import captures as _capture
from fresnel.data import co3d, colmap
from fresnel.data import transforms as nerfstudio
from fresnel.data.captures import Capture, input_of, pivot_of
from fresnel.data.images import DatasetError

_MAX_FOLDERS = 20_000


def captures(root: Path) -> list[Capture]:
    """What ``root`` describes: one capture, a CO3D category's objects, or those of its folders.

    Returns:
        An empty list if no format is recognised, in ``root`` or in a folder directly inside it.

    Raises:
        DatasetError: if a description is recognised but damaged.
    """
    here = _of(root, "")
    if here:
        return here
    found: list[Capture] = []
    folders = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    if len(folders) > _MAX_FOLDERS:
        raise DatasetError(
            f"{root}: holds {len(folders)} entries, the limit is {_MAX_FOLDERS}. Split it up"
        )
    for name in folders:
        if (root / name).is_dir() and (root / name).resolve().is_relative_to(root.resolve()):
            found += _of(root, name)
    return found


def _of(root: Path, folder: str) -> list[Capture]:
    for reader in (nerfstudio, colmap, co3d):
        if reader.recognises(root / folder):
            return reader.read(root, folder)
    return []


def prepare(
    root: Path, found: Sequence[Capture], image_size: int | None, views: int | None
) -> tuple[list[Capture], int, dict[str, Any]]:
    """Captures thinned to ``views``, the common side of their pictures, and what to say of them.

    Raises:
        DatasetError: if a capture has fewer views, or all of one don't fit into memory.
    """
    for name, value in (("image_size", image_size), ("views", views)):
        if value is not None and not 1 <= value <= 100_000:
            raise ValueError(f"{name}: got {value}, want at least 1")
    chosen = [_thinned(root, capture, views) for capture in found]
    sources = {capture.name: _capture.alpha_source(root, capture) for capture in chosen}
    most = max(len(capture) for capture in chosen)
    if image_size is None:
        sides = [_capture.natural_side(root, c, sources[c.name]) for c in chosen]
        image_size = _capture.common_side(root, sides, most)
    else:
        _capture.common_side(root, [image_size], most)
    kinds = set(sources.values())
    meta: dict[str, Any] = {
        "source": "captures",
        "formats": sorted({str(capture.notes["format"]) for capture in chosen}),
        "elevation_is_assumed": False,
        "alpha_source": kinds.pop() if len(kinds) == 1 else "mixed",
        "input": "one of the views acts as the input: the one its description names, the middle "
        "one of a capture from one side, else the first",
        "undistorted": any(c.distortion.any() or c.fisheye.any() for c in chosen),
        "scale": "the capture's own",
        "objects": {
            capture.name: {
                "input": capture.images[input_of(capture)],
                "pivot": pivot_of(capture).tolist(),
                "pivot_source": "nearest point to the optical axes"
                if capture.pivot is None
                else "description",
                "alpha_source": sources[capture.name],
                "views": len(capture),
                "views_left_out": len(whole) - len(capture),
                "world_from_file": capture.world_from_file.tolist(),
                **capture.notes,
            }
            for capture, whole in zip(chosen, found, strict=True)
        },
    }
    return chosen, image_size, meta


def _thinned(root: Path, capture: Capture, views: int | None) -> Capture:
    """Evenly spaced views, the declared input among them."""
    if views is None or views == len(capture):
        return capture
    if views > len(capture):
        raise DatasetError(f"{root}: {capture.name!r} has {len(capture)} views, views asks {views}")
    rows = np.linspace(0, len(capture) - 1, views).round().astype(int)
    kept = capture.input_view
    if kept is not None:
        rows[np.abs(rows - kept).argmin()] = kept
    return replace(
        capture,
        images=tuple(capture.images[row] for row in rows),
        masks=tuple(capture.masks[row] for row in rows),
        viewmats=capture.viewmats[rows],
        Ks=capture.Ks[rows],
        distortion=capture.distortion[rows],
        fisheye=capture.fisheye[rows],
        sizes=capture.sizes[rows],
        input_view=None if kept is None else int(np.abs(rows - kept).argmin()),
    )
