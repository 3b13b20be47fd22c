"""CO3D v2: frame_annotations.jgz of a category; every sequence is one object.

Cameras are PyTorch3D's: row vectors, X_camera = X_world R + T, with x left, y up, z forward; focal
lengths and principal points in NDC, isotropic (the shorter half side is 1) in version 2, by each
side in version 1's "ndc_norm_image_bounds".  Paths start at the folder that holds the category;
masks are probabilities of the foreground and become alpha.  Worlds come from COLMAP: no scale, and
the mean of the cameras' up directions becomes Y.  Depth maps are not used.

Written after the data set's published definition and tested on files made by hand: the data set
itself (5.5 TB) has not been downloaded here.  Its owner's downloader:
https://github.com/facebookresearch/co3d
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.data import layout as _layouts
from fresnel.data.captures import Capture, Floats, View, collect, pinhole, upright
from fresnel.data.images import DatasetError
from fresnel.data.layout import inside, relative

FILE = "frame_annotations.jgz"
_MAX_JSON_BYTES = 1 << 28
_FLIP = np.diag([-1.0, -1.0, 1.0])


def recognises(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read(root: Path, folder: str) -> list[Capture]:
    """One capture for each sequence of the category in ``root / folder`` that lies on disk.

    Sequences of which no picture is there (a partial download) are left out.
    """
    file = f"{folder}/{FILE}" if folder else FILE
    path = inside(root, file)
    frames = unpack(path)
    sequences: dict[str, list[View]] = defaultdict(list)
    present: dict[str, bool] = {}
    for frame in frames:
        name = frame.get("sequence_name") if isinstance(frame, dict) else None
        if not isinstance(name, str):
            raise DatasetError(f"{path}: a frame has no sequence_name")
        view = _view(root, folder, path, frame)
        present.setdefault(name, (root / view.image).is_file())
        if present[name]:
            sequences[name].append(view)
    if not sequences:
        raise DatasetError(f"{path}: none of its {len(present)} sequences has its pictures here")
    captures = []
    for name, views in sequences.items():
        viewmats = np.stack([view.viewmat for view in views])
        turn = upright(viewmats) if np.isfinite(viewmats).all() else np.eye(3)
        label = f"{folder}/{name}" if folder else name
        notes = {"format": "co3d", "up": "mean of the cameras' up directions"}
        captures.append(collect(path, label, views, [file], turn, notes=notes))
    return captures


def unpack(path: Path) -> list[Any]:
    """The JSON list of a gzipped file, never more than the limit of it in memory."""
    unzip = zlib.decompressobj(wbits=31)
    try:
        with path.open("rb") as file:
            parts, size = [], 0
            while chunk := file.read(1 << 20):
                parts.append(unzip.decompress(chunk, _MAX_JSON_BYTES + 1 - size))
                size += len(parts[-1])
                if size > _MAX_JSON_BYTES:
                    raise DatasetError(f"{path}: unpacks to more than {_MAX_JSON_BYTES} bytes")
        if not unzip.eof:
            raise ValueError("the file is cut off")
        value = json.loads(b"".join(parts))
    except (OSError, zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: not a gzipped JSON file ({str(error)[:200]})") from None
    if not isinstance(value, list):
        raise DatasetError(f"{path}: holds a {type(value).__name__}, want a list of frames")
    return value


def _view(root: Path, folder: str, path: Path, frame: dict[str, Any]) -> View:
    image, mask, camera = (frame.get(key) for key in ("image", "mask", "viewpoint"))
    if not isinstance(image, dict) or not isinstance(camera, dict):
        raise DatasetError(f"{path}: a frame has no image or no viewpoint")
    height, width = (int(n) for n in _layouts.array(image, "size", (2,), path))
    if not (0 < height <= 100_000 and 0 < width <= 100_000):
        raise DatasetError(f"{path}: an image of size {width} x {height}")
    rotation, translation = (
        _layouts.array(camera, "R", (3, 3), path),
        _layouts.array(camera, "T", (3,), path),
    )
    viewmat = np.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = _FLIP @ rotation.T, _FLIP @ translation
    return View(
        image=_at(root, folder, image.get("path"), path),
        viewmat=viewmat,
        K=_intrinsics(camera, width, height, path),
        size=(width, height),
        mask=_at(root, folder, mask["path"], path)
        if isinstance(mask, dict) and mask.get("path")
        else "",
    )


def _intrinsics(camera: dict[str, Any], width: int, height: int, path: Path) -> Floats:
    focal = _layouts.array(camera, "focal_length", (2,), path)
    point = _layouts.array(camera, "principal_point", (2,), path)
    half = np.array([width, height]) / 2
    kind = camera.get("intrinsics_format", "ndc_norm_image_bounds")
    if kind == "ndc_isotropic":
        unit = np.full(2, half.min())
    elif kind == "ndc_norm_image_bounds":
        unit = half
    else:
        raise DatasetError(f"{path}: intrinsics_format {str(kind)[:80]!r} is unknown")
    fx, fy = focal * unit  # `collect` refuses what is absurd
    cx, cy = half - point * unit
    return pinhole(fx, fy, cx, cy)


def _at(root: Path, folder: str, file: Any, path: Path) -> str:
    """A path of the annotations, which starts with the category's name, inside ``root``."""
    whole = relative(root, "", file, path)
    inner = whole.split("/", 1)[-1]
    return f"{folder}/{inner}" if folder else inner
