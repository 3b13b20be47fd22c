"""What other tools write, described as `Capture`s: `FORMATS` lists what recognises and reads it.

**transforms.json** of nerfstudio, instant-ngp and Blender (NeRF synthetic), or _train, _val and
_test of it as one capture.  ``transform_matrix`` is an OpenGL camera-to-world matrix in a world
whose Z is up.  Intrinsics stand at the top or in each frame: ``fl_x fl_y cx cy w h``, or
``camera_angle_x`` in radians; ``file_path`` may lack its extension.  Depth maps and
``applied_scale`` are not used (https://docs.nerf.studio/quickstart/data_conventions.html).

**COLMAP** sparse models, text and binary, read by pycolmap, in the folder itself or one of
`_MODELS` below it; pictures in one of `_IMAGES`, masks in masks/ as PICTURE.png or PICTURE with
.png for its extension.  Every lens model with a focal length is undone.  Worlds have no vertical:
the mean of the cameras' up directions becomes Y.  Points can be larger than memory and are not
read (https://colmap.github.io/format.html).

**CO3D v2**: frame_annotations.jgz of a category, every sequence one object.  Cameras are
PyTorch3D's: row vectors, X_camera = X_world R + T, with x left, y up, z forward; focal lengths and
principal points in NDC, isotropic (the shorter half side is 1), or by each side in version 1's
"ndc_norm_image_bounds".  Paths start at the folder that holds the category; masks become alpha.
Written after the published definition and tested on files made by hand: the data set itself
(5.5 TB) has not been downloaded here (https://github.com/facebookresearch/co3d).
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.data.captures import MAX_VIEWS, Capture, Lens, View, collect, pinhole
from fresnel.data.images import IMAGE_SUFFIXES, DatasetError, decoded
from fresnel.data.layout import MAX_JSON_BYTES, entry, inside, read_json, relative

Y_UP = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])
"""World of a transforms.json (Z up) to ours (Y up): (x, y, z) -> (x, z, -y)."""
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
"""OpenGL cameras to OpenCV's, and back."""
_LENSES = {
    "PINHOLE": ("PINHOLE",),
    "SIMPLE_PINHOLE": ("PINHOLE",),
    "PERSPECTIVE": ("PINHOLE",),
    "OPENCV": ("FULL_OPENCV", "k1", "k2", "p1", "p2", "k3", "", "", ""),
    "OPENCV_FISHEYE": ("OPENCV_FISHEYE", "k1", "k2", "k3", "k4"),
}
"""camera_model of a transforms.json: COLMAP's name of it, and what its parameters are called."""
_MODELS = ("", "sparse/0", "sparse", "colmap/sparse/0", "0")
_IMAGES = ("images", "", "images_2", "images_4", "images_8")
_MAX_MODEL_BYTES = 1 << 30
_CO3D = "frame_annotations.jgz"


def captures_in(root: Path, folder: str = "") -> list[Capture]:
    """What other tools' description in ``root / folder`` says; [] where no reader knows it.

    Raises:
        DatasetError: if a description is recognised but damaged.
    """
    for found, read in FORMATS:
        if names := found(root / folder):
            return read(root, folder, names)
    return []


def recognises(folder: Path) -> bool:
    """Whether there is a description; looks at names only."""
    return any(found(folder) for found, _ in FORMATS)


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


# --- transforms.json ---------------------------------------------------------------------------


def _transforms_in(folder: Path) -> list[str]:
    parts = [f"transforms_{part}.json" for part in ("train", "val", "test")]
    for names in (["transforms.json"], parts):
        if found := [name for name in names if (folder / name).is_file()]:
            return found
    return []


def _read_transforms(root: Path, folder: str, names: list[str]) -> list[Capture]:
    views: list[View] = []
    marks: dict[str, Any] = {}  # what our own `export` adds
    for name in names:
        path = inside(root, _joined(folder, name))
        top = read_json(path)
        frames = entry(top, "frames", list, path)
        if len(frames) > MAX_VIEWS:
            raise DatasetError(f"{path}: {len(frames)} frames, the limit is {MAX_VIEWS}")
        marks |= entry(top, "fresnel", dict, path, {})
        sizes: list[tuple[int, int]] = []
        views += [_frame(root, folder, path, top, frame, sizes) for frame in frames]
    if len(names) > 1:
        views = list({view.image: view for view in views}.values())  # a copied split repeats them
    more: dict[str, Any] = {"attribution": entry(marks, "attribution", str, path, "")}
    if "pivot" in marks:
        more["pivot"] = Y_UP @ entry(marks, "pivot", (3,), path)
    if "input" in marks:
        more["input_image"] = relative(folder, marks["input"], path)
    label, said_in = folder or root.resolve().name, [_joined(folder, name) for name in names]
    return [collect(path, label, views, said_in, "nerfstudio", Y_UP, **more)]


def _frame(
    root: Path, folder: str, path: Path, top: Any, frame: Any, sizes: list[tuple[int, int]]
) -> View:
    """Without w and h the first picture of the file is measured, into ``sizes``."""
    image = relative(folder, entry(frame, "file_path", str, path), path)
    if Path(image).suffix.lower() not in IMAGE_SUFFIXES and not inside(root, image).is_file():
        there = [image + end for end in IMAGE_SUFFIXES if (root / f"{image}{end}").is_file()]
        if not there:
            raise DatasetError(f"{root / image}: no such file, nor with an image's extension")
        image = there[0]
    both = {**top, **frame}

    def number(key: str, default: float | None = None) -> float:
        return float(entry(both, key, float, path, default))

    def focal(pixels: str, angle: str, count: int) -> float | None:
        if pixels in both or angle not in both or "fl_x" in both:
            return number(pixels) if pixels in both else None
        if not 0 < number(angle) < math.pi:
            raise DatasetError(f"{path}: {angle} is {number(angle)}, want radians in (0, pi)")
        return 0.5 * count / math.tan(0.5 * number(angle))

    rows = len(entry(frame, "transform_matrix", list, path))
    matrix = np.eye(4)
    matrix[:rows] = entry(frame, "transform_matrix", (3 if rows == 3 else 4, 4), path)
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > 1e-6 or not np.linalg.det(matrix):
        raise DatasetError(f"{path}: {image!r}: a matrix is singular, or doesn't end in 0 0 0 1")
    if "w" in both or "h" in both:
        width, height = round(number("w")), round(number("h"))
    else:
        sizes += [] if sizes else [decoded(inside(root, image), pixels=False).size]
        width, height = sizes[0]
    fx, fy = focal("fl_x", "camera_angle_x", width), focal("fl_y", "camera_angle_y", height)
    if fx is None and fy is None:
        raise DatasetError(f"{path}: has neither fl_x nor camera_angle_x for {image!r}")
    fx = number("fl_y") if fx is None else fx
    model = entry(both, "camera_model", str, path, "OPENCV")
    if model not in _LENSES:
        raise DatasetError(f"{path}: camera_model {model!r}; want one of {tuple(_LENSES)}")
    lens: Lens = (
        _LENSES[model][0],
        tuple(number(name, 0.0) if name else 0.0 for name in _LENSES[model][1:]),
    )
    middle = number("cx", width / 2), number("cy", height / 2)
    mask = "" if (mask := frame.get("mask_path")) is None else relative(folder, mask, path)
    K = pinhole(fx, fx if fy is None else fy, *middle)
    return View(image, FLIP @ np.linalg.inv(matrix), K, (width, height), mask, lens)


# --- COLMAP ------------------------------------------------------------------------------------


def _model_in(folder: Path) -> list[str]:
    """The model's place below the folder, and the suffix of its files."""
    for place in _MODELS:
        for suffix in (".bin", ".txt"):
            stems = [s for s in ("images", "frames") if (folder / place / f"{s}{suffix}").is_file()]
            if stems and (folder / place / f"cameras{suffix}").is_file():
                return [place, suffix]
    return []


def _read_model(root: Path, folder: str, found: list[str]) -> list[Capture]:
    import pycolmap

    at, suffix = _joined(folder, found[0]), found[1]
    model = inside(root, at)
    names = [f"{stem}{suffix}" for stem in ("cameras", "images", "rigs", "frames")]
    names = [name for name in names if (model / name).is_file()]
    if f"images{suffix}" not in names:
        said = f"has no images{suffix}, which says which picture has which pose"
        raise DatasetError(f"{model}: {said}. Export it again: colmap model_converter")
    if (size := sum((model / name).stat().st_size for name in names)) > _MAX_MODEL_BYTES:
        raise DatasetError(f"{model}: {size} bytes, the limit is {_MAX_MODEL_BYTES}")
    with tempfile.TemporaryDirectory() as copy:  # the model as it is, but for its points
        for name in names:
            (Path(copy) / name).symlink_to((model / name).resolve())
        (Path(copy) / f"points3D{suffix}").write_bytes(b"\0" * 8 if suffix == ".bin" else b"")
        try:
            made = pycolmap.Reconstruction(copy)
            images = sorted((i for i in made.images.values() if i.has_pose), key=lambda i: i.name)
        except Exception as error:  # names that are no UTF-8 among them
            said = (str(error).strip().splitlines() or ["it crashed"])[-1][:300]
            raise DatasetError(f"{model}: not a readable COLMAP model ({said})") from None
    if len(images) > MAX_VIEWS:
        raise DatasetError(f"{model}: {len(images)} views, the limit is {MAX_VIEWS}")
    first = str(images[0].name) if images else ""
    prefixes = [_joined(folder, place) for place in _IMAGES] if first else []
    prefixes = [p for p in prefixes if (root / relative(p, first, model)).is_file()]
    if not prefixes:
        said = f"can't find picture {first!r} in images/ or here"
        raise DatasetError(f"{root / folder}: {said}. Put the pictures of the model beside it")
    cameras, views = dict(made.cameras.items()), []
    for image in images:
        camera = cameras.get(image.camera_id)
        if camera is None or not camera.focal_length_idxs():
            has = "there is no" if camera is None else f"{camera.model_name} is no pinhole with a"
            raise DatasetError(f"{model}: {image.name!r}: {has} lens. Cut out perspective pictures")
        masks = (f"{image.name}.png", str(Path(image.name).with_suffix(".png")))
        places = [relative(folder, f"masks/{name}", model) for name in masks]
        bends = camera.params[list(camera.extra_params_idxs())].tolist()
        views.append(
            View(
                image=relative(prefixes[0], image.name, model),
                viewmat=np.vstack([image.cam_from_world().matrix(), [0, 0, 0, 1]]),
                K=np.asarray(camera.calibration_matrix()),
                size=(int(camera.width), int(camera.height)),
                mask=next((place for place in places if (root / place).is_file()), ""),
                lens=(camera.model_name, tuple(bends)),
            )
        )
    label, said_in = folder or root.resolve().name, [_joined(at, name) for name in names]
    return [collect(model, label, views, said_in, "colmap")]


# --- CO3D --------------------------------------------------------------------------------------


def _annotations_in(folder: Path) -> list[str]:
    return [_CO3D] if (folder / _CO3D).is_file() else []


def _read_annotations(root: Path, folder: str, names: list[str]) -> list[Capture]:
    """One capture for each sequence of the category that lies on disk.

    Sequences of which no picture is there (a partial download) are left out.
    """
    file = _joined(folder, *names)
    path = inside(root, file)
    sequences: dict[str, list[View]] = defaultdict(list)
    present: dict[str, bool] = {}
    for frame in read_json(path, _unzipped(path), list):
        name = entry(frame, "sequence_name", str, path)
        image, camera = (entry(frame, key, dict, path) for key in ("image", "viewpoint"))
        size = entry(image, "size", (2,), path)[::-1]
        kind = camera.get("intrinsics_format", "ndc_norm_image_bounds")
        if kind not in ("ndc_isotropic", "ndc_norm_image_bounds"):
            raise DatasetError(f"{path}: intrinsics_format {str(kind)[:80]!r} is unknown")
        unit = np.full(2, size.min() / 2) if kind == "ndc_isotropic" else size / 2
        focal = entry(camera, "focal_length", (2,), path) * unit
        middle = size / 2 - entry(camera, "principal_point", (2,), path) * unit
        viewmat = np.eye(4)
        viewmat[:3, :3] = entry(camera, "R", (3, 3), path).T
        viewmat[:3, 3] = entry(camera, "T", (3,), path)
        viewmat[:2] *= -1
        # paths start with the category's name
        masked = isinstance(frame.get("mask"), dict) and frame["mask"].get("path")
        files = [image.get("path"), *([masked] if masked else [])]
        inner = [relative("", one, path).split("/", 1)[-1] for one in files]
        found = [relative(folder, one, path) for one in inner]
        whole = int(size[0]), int(size[1])
        view = View(found[0], viewmat, pinhole(*focal, *middle), whole, "".join(found[1:]))
        if present.setdefault(name, (root / view.image).is_file()):
            sequences[name].append(view)
    if not sequences:
        raise DatasetError(f"{path}: none of its {len(present)} sequences has its pictures here")
    return [
        collect(path, _joined(folder, name), views, [file], "co3d")
        for name, views in sequences.items()
    ]


def _unzipped(path: Path) -> bytes:
    """What a gzipped file holds, never more than the limit of it in memory."""
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
    return b"".join(parts)


Find = Callable[[Path], list[str]]
Read = Callable[[Path, str, list[str]], list[Capture]]
FORMATS: tuple[tuple[Find, Read], ...] = (
    (_transforms_in, _read_transforms),
    (_model_in, _read_model),
    (_annotations_in, _read_annotations),
)
"""Of each format: the names of the files in a folder that it knows ([]: it is of another one), by
names only, and what reads the descriptions in ``root / folder``, but no picture."""
