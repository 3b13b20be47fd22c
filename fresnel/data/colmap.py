"""COLMAP sparse models, text and binary, read by pycolmap.

A model lies in the folder itself or in sparse/0, sparse, colmap/sparse/0 or 0 below it; its
pictures in images/ (or the folder itself, or images_2/ ... if images/ is missing), masks in masks/
as PICTURE.png or PICTURE with .png for its extension, as COLMAP's own.

Every lens model but EQUIRECTANGULAR is undone.  Worlds have no scale and no vertical: the mean of
the cameras' up directions becomes Y.  The sparse points are not used and not read: they can be
larger than memory.

https://colmap.github.io/format.html
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.data.captures import MAX_VIEWS, Capture, View, collect
from fresnel.data.images import DatasetError
from fresnel.data.layout import inside, relative

_MODELS = ("", "sparse/0", "sparse", "colmap/sparse/0", "0")
_IMAGES = ("images", "", "images_2", "images_4", "images_8")
_MAX_MODEL_BYTES = 1 << 30


def recognises(folder: Path) -> bool:
    return _model(folder) is not None


def _model(folder: Path) -> tuple[str, str] | None:
    """The model's place below the folder, and the suffix of its files."""
    for place in _MODELS:
        for suffix in (".bin", ".txt"):
            at = folder / place
            named = [at / f"{name}{suffix}" for name in ("images", "frames")]
            if (at / f"cameras{suffix}").is_file() and any(path.is_file() for path in named):
                return place, suffix
    return None


def read(root: Path, folder: str) -> list[Capture]:
    """The capture that the model in ``root / folder`` describes."""
    found = _model(root / folder)
    assert found is not None
    place, suffix = found
    at = "/".join(part for part in (folder, place) if part)
    model = inside(root, at)
    stems = ("cameras", "images", "rigs", "frames")
    files = [path for stem in stems if (path := model / f"{stem}{suffix}").is_file()]
    size = sum(path.stat().st_size for path in files)
    if size > _MAX_MODEL_BYTES:
        raise DatasetError(f"{model}: {size} bytes, the limit is {_MAX_MODEL_BYTES}")
    if model / f"images{suffix}" not in files:
        raise DatasetError(
            f"{model}: has no images{suffix}, which says which picture has which pose. Export the "
            "model again with it: colmap model_converter"
        )
    images = _parsed(model, files)
    prefix = _pictures(root, folder, model, images)
    views = [_view(root, prefix, folder, model, image) for image in images]
    descriptions = [relative(at, path.name, model) for path in files]
    return [collect(model, folder or root.resolve().name, views, descriptions, "colmap")]


def _parsed(model: Path, files: list[Path]) -> list[Any]:
    """pycolmap's images that have a pose, by name."""
    import pycolmap

    suffix = files[0].suffix
    with tempfile.TemporaryDirectory() as folder:  # the model as it is, but for its points
        for path in files:
            (Path(folder) / path.name).symlink_to(path.resolve())
        (Path(folder) / f"points3D{suffix}").write_bytes(b"\0" * 8 if suffix == ".bin" else b"")
        try:
            found = pycolmap.Reconstruction(folder)
            images = sorted((i for i in found.images.values() if i.has_pose), key=lambda i: i.name)
        except Exception as error:  # names that are no UTF-8 among them
            said = (str(error).strip().splitlines() or ["it crashed"])[-1][:300]
            raise DatasetError(f"{model}: not a readable COLMAP model ({said})") from None
    if len(images) > MAX_VIEWS:
        raise DatasetError(f"{model}: {len(images)} views, the limit is {MAX_VIEWS}")
    for image in images:
        if image.camera_id not in found.cameras:
            raise DatasetError(f"{model}: {image.name!r} names a camera that isn't there")
    return images


def _view(root: Path, prefix: str, folder: str, model: Path, image: Any) -> View:
    camera = image.camera
    if not camera.focal_length_idxs():
        raise DatasetError(
            f"{model}: camera model {camera.model_name} is no pinhole with a lens. Cut perspective "
            "pictures out of its panoramas first"
        )
    picture = relative(prefix, image.name, model)
    masks = (f"{image.name}.png", str(Path(image.name).with_suffix(".png")))
    places = [relative(folder, f"masks/{name}", model) for name in masks]
    return View(
        image=picture,
        viewmat=np.vstack([image.cam_from_world().matrix(), [0, 0, 0, 1]]),
        K=np.asarray(camera.calibration_matrix()),
        size=(int(camera.width), int(camera.height)),
        mask=next((place for place in places if (root / place).is_file()), ""),
        lens=(camera.model_name, tuple(camera.params[list(camera.extra_params_idxs())].tolist())),
    )


def _pictures(root: Path, folder: str, model: Path, images: list[Any]) -> str:
    """The folder, relative to ``root``, that the pictures' names start from."""
    first = str(images[0].name) if images else ""
    for place in _IMAGES:
        prefix = "/".join(part for part in (folder, place) if part)
        if first and (root / relative(prefix, first, model)).is_file():
            return prefix
    raise DatasetError(
        f"{root / folder}: can't find picture {first!r} in images/ or here. Put the pictures of "
        "the model beside it"
    )
