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

import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.data.captures import Capture, Floats, View, collect, pinhole
from fresnel.data.images import DatasetError
from fresnel.data.layout import MAX_JSON_BYTES, array, entry, inside, read_json, relative

FILE = "frame_annotations.jgz"
_FLIP = np.diag([-1.0, -1.0, 1.0])


def recognises(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read(root: Path, folder: str) -> list[Capture]:
    """One capture for each sequence of the category in ``root / folder`` that lies on disk.

    Sequences of which no picture is there (a partial download) are left out.
    """
    file = relative(folder, FILE, root)
    path = inside(root, file)
    sequences: dict[str, list[View]] = defaultdict(list)
    present: dict[str, bool] = {}
    for frame in unpack(path):
        name = entry(frame, "sequence_name", str, path)
        view = _view(folder, path, frame)
        if present.setdefault(name, (root / view.image).is_file()):
            sequences[name].append(view)
    if not sequences:
        raise DatasetError(f"{path}: none of its {len(present)} sequences has its pictures here")
    return [
        collect(path, f"{folder}/{name}" if folder else name, views, [file], "co3d")
        for name, views in sequences.items()
    ]


def unpack(path: Path) -> list[Any]:
    """The JSON list of a gzipped file, never more than the limit of it in memory."""
    unzip = zlib.decompressobj(wbits=31)
    parts, size = [], 0
    try:
        with path.open("rb") as file:
            while (chunk := file.read(1 << 20)) and size <= MAX_JSON_BYTES:
                parts.append(unzip.decompress(chunk, MAX_JSON_BYTES + 1 - size))
                size += len(parts[-1])
    except (OSError, zlib.error) as error:
        raise DatasetError(f"{path}: not a gzipped JSON file ({error})") from None
    if size > MAX_JSON_BYTES:
        raise DatasetError(f"{path}: unpacks to more than {MAX_JSON_BYTES} bytes")
    if not unzip.eof:
        raise DatasetError(f"{path}: not a whole gzipped file: it is cut off")
    return read_json(path, b"".join(parts), list)


def _view(folder: str, path: Path, frame: dict[str, Any]) -> View:
    image, camera = (entry(frame, key, dict, path) for key in ("image", "viewpoint"))
    height, width = (int(n) for n in array(image, "size", (2,), path))
    viewmat = np.eye(4)
    viewmat[:3, :3] = _FLIP @ array(camera, "R", (3, 3), path).T
    viewmat[:3, 3] = _FLIP @ array(camera, "T", (3,), path)
    mask = frame.get("mask")
    mask = mask.get("path") if isinstance(mask, dict) else ""
    return View(
        image=_at(folder, image.get("path"), path),
        viewmat=viewmat,
        K=_intrinsics(camera, np.array([width, height]) / 2, path),
        size=(width, height),
        mask=_at(folder, mask, path) if mask else "",
    )


def _intrinsics(camera: dict[str, Any], half: Floats, path: Path) -> Floats:
    kind = camera.get("intrinsics_format", "ndc_norm_image_bounds")
    if kind not in ("ndc_isotropic", "ndc_norm_image_bounds"):
        raise DatasetError(f"{path}: intrinsics_format {str(kind)[:80]!r} is unknown")
    unit = np.full(2, half.min()) if kind == "ndc_isotropic" else half
    focal = array(camera, "focal_length", (2,), path) * unit  # `collect` refuses what is absurd
    return pinhole(*focal, *(half - array(camera, "principal_point", (2,), path) * unit))


def _at(folder: str, file: Any, path: Path) -> str:
    """A path of the annotations, which starts with the category's name, inside the root."""
    return relative(folder, relative("", file, path).split("/", 1)[-1], path)
