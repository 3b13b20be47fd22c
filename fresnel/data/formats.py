"""What other tools write, described as `Capture`s: `FORMATS` lists what recognises and reads it.

What is read of each, said of it and refused stands in docs/data.md.

**transforms.json** (https://docs.nerf.studio/quickstart/data_conventions.html): OpenGL
camera-to-world matrices in a world whose Z is up.  Depth maps and ``applied_scale`` are not used.

**COLMAP** (https://colmap.github.io/format.html): masks lie in masks/ as PICTURE.png or PICTURE
with .png for its extension.  Points can be larger than memory and are not read, nor are rigs.

**CO3D v2**: frame_annotations.jgz of a category, every sequence one object.  Cameras are
PyTorch3D's: row vectors, X_camera = X_world R + T, with x left, y up, z forward; focal lengths and
principal points in NDC, isotropic (the shorter half side is 1), or by each side in version 1's
"ndc_norm_image_bounds".  Written after the published definition, not tried on the data itself
(https://github.com/facebookresearch/co3d).
"""

import io
import math
import os
import re
import struct
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from fresnel.data.captures import MAX_VIEWS, Capture, Floats, Lens, View, collect, pinhole
from fresnel.data.images import IMAGE_SUFFIXES, DatasetError, decoded, read_bytes
from fresnel.data.layout import (
    MAX_JSON_BYTES,
    entry,
    inside,
    read_items,
    read_json,
    relative,
    sha256,
)
from fresnel.host.files import below

_Y_UP = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])
"""World of a transforms.json (Z up) to ours (Y up): (x, y, z) -> (x, z, -y)."""
_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
"""OpenGL cameras to OpenCV's, and back."""
_FOCALS = {"fl_x", "fl_y", "camera_angle_x", "camera_angle_y"}
_WHOLE_SPHERE = ("equirectangular", "latlong", "ftheta", "ftheta_p0")
"""What instant-ngp writes of lenses that no pinhole's picture comes out of."""
_MODELS = ("", "sparse/0", "sparse", "colmap/sparse/0", "0")
_IMAGES = ("images", "", "images_2", "images_4", "images_8")
_MAX_MODEL_BYTES = 1 << 30
_CO3D = "frame_annotations.jgz"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf)", re.ASCII)


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


def description(path: Path) -> bool:
    """Whether a path is a file that a reader would find in its folder."""
    return path.is_file() and any(path.name in found(path.parent) for found, _ in FORMATS)


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _name_of(root: Path) -> str:
    """A folder's own name, a link's too: what travels under that name is the same data there."""
    return Path(os.path.abspath(root)).name


def _transforms_in(folder: Path) -> list[str]:
    parts = [f"transforms_{part}.json" for part in ("train", "val", "test")]
    for names in (["transforms.json"], parts):
        if found := [name for name in names if (folder / name).is_file()]:
            return found
    return []


def _read_transforms(root: Path, folder: str, names: list[str]) -> list[Capture]:
    views: list[View] = []
    scales: list[float] = []
    said_in: dict[str, str] = {}
    for name in names:
        path = inside(root, _joined(folder, name))
        data = read_bytes(path, MAX_JSON_BYTES)
        said_in[_joined(folder, name)] = sha256(data)
        top = read_json(path, data)
        frames = entry(top, "frames", list, path)
        if len(frames) > MAX_VIEWS:
            raise DatasetError(f"{path}: {len(frames)} frames, the limit is {MAX_VIEWS}")
        for frame in frames:
            view, scale = _frame(root, folder, path, top, frame)
            views.append(view)
            scales.append(scale)
    if len(names) > 1:
        views = list({view.image: view for view in views}.values())  # a copied split repeats them
    warnings = []
    if scaled := [scale for scale in scales if abs(scale - 1) > 1e-3]:
        said = f"the rotations of {len(scaled)} of {len(scales)} views are scaled"
        warnings.append(f"{said} (by {scaled[0]:.4g}, for one): the scale was taken out")
    label = folder or _name_of(root)
    return [collect(path, label, views, said_in, "nerfstudio", _Y_UP, warnings)]


def _frame(root: Path, folder: str, path: Path, top: Any, frame: Any) -> tuple[View, float]:
    """A view, and the scale that its rotation had.  Without w and h its picture is measured."""
    image = relative(folder, entry(frame, "file_path", str, path), path)
    if Path(image).suffix.lower() not in IMAGE_SUFFIXES and not inside(root, image).is_file():
        there = [image + end for end in IMAGE_SUFFIXES if (root / f"{image}{end}").is_file()]
        if not there:
            raise DatasetError(f"{root / image}: no such file, nor with an image's extension")
        image = there[0]
    # a frame's own focal lengths stand for the file's, in whichever terms
    shared = {k: v for k, v in top.items() if k not in _FOCALS or not _FOCALS & frame.keys()}
    both = shared | frame

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
    scale = float(np.cbrt(np.linalg.det(matrix[:3, :3])))
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > 1e-6 or not scale:
        raise DatasetError(f"{path}: {image!r}: a matrix is singular, or doesn't end in 0 0 0 1")
    matrix[:3, :3] /= scale if scale > 0 and abs(scale - 1) > 1e-3 else 1.0
    if "w" in both or "h" in both:
        width, height = round(number("w")), round(number("h"))
    else:
        width, height = decoded(inside(root, image), pixels=False).size
    fx, fy = focal("fl_x", "camera_angle_x", width), focal("fl_y", "camera_angle_y", height)
    if fx is None and fy is None:
        raise DatasetError(f"{path}: has neither fl_x nor camera_angle_x for {image!r}")
    fx = number("fl_y") if fx is None else fx
    middle = number("cx", width / 2), number("cy", height / 2)
    mask = "" if (mask := frame.get("mask_path")) is None else relative(folder, mask, path)
    K = pinhole(fx, fx if fy is None else fy, *middle)
    viewmat = _FLIP @ np.linalg.inv(matrix)
    return View(image, viewmat, K, (width, height), mask, _lens(both, path)), scale


def _lens(said: dict[str, Any], path: Path) -> Lens:
    """The lens of a frame; camera_model is one of COLMAP's, or PERSPECTIVE."""
    import pycolmap

    for key in _WHOLE_SPHERE:
        if said.get(key):
            raise DatasetError(f"{path}: {key} pictures are not read. Cut out perspective ones")
    usual = "OPENCV_FISHEYE" if said.get("is_fisheye") else "OPENCV"
    model = entry(said, "camera_model", str, path, usual)
    known = sorted(pycolmap.CameraModelId.__members__.keys() - {"INVALID", "EQUIRECTANGULAR"})
    if model not in ("PERSPECTIVE", *known):
        raise DatasetError(f"{path}: camera_model {model!r}; want one of {tuple(known)}")
    if model in ("PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE"):
        return "PINHOLE", ()
    # nerfstudio's OPENCV has a third radial term, as COLMAP's FULL_OPENCV
    name = "FULL_OPENCV" if model == "OPENCV" else model
    camera = pycolmap.Camera.create_from_model_name(0, name, 1.0, 0, 0)
    terms = camera.params_info.split(", ")
    wanted = [terms[k] if terms[k] != "k" else "k1" for k in camera.extra_params_idxs()]
    values = [float(entry(said, term, float, path, 0.0)) for term in wanted]
    if model == "OPENCV" and any(values[5:]):
        what = "k4 (or k5, k6) of an OPENCV lens means different things to different tools"
        raise DatasetError(f"{path}: {what}. Say camera_model FULL_OPENCV, or undistort")
    return name, tuple(values)


def _models_in(folder: Path) -> list[str]:
    """The places below the folder where a model lies, each followed by the suffix of its files."""
    numbered = [f"sparse/{path.name}" for path in sorted(folder.glob("sparse/*"))]
    found = []
    for place in dict.fromkeys((*_MODELS, *numbered)):
        for suffix in (".bin", ".txt"):
            stems = [s for s in ("images", "frames") if (folder / place / f"{s}{suffix}").is_file()]
            if stems and (folder / place / f"cameras{suffix}").is_file():
                found += [place, suffix]
                break
    return found


def _read_model(root: Path, folder: str, found: list[str]) -> list[Capture]:
    """The capture of the model that has most pictures; the others are named."""
    models = []
    for place, suffix in zip(found[::2], found[1::2], strict=True):
        at = _joined(folder, place)
        models.append((*_posed(inside(root, at), suffix), at))
    images, cameras, names, at = max(models, key=lambda model: len(model[0]))
    model = inside(root, at)
    if not images:
        raise DatasetError(f"{model}: the model has no registered image: the reconstruction failed")
    prefixes = [_joined(folder, place) for place in _IMAGES]
    first = images[0].name
    prefixes = [p for p in prefixes if (root / relative(p, first, model)).is_file()]
    if not prefixes:
        said = f"can't find picture {first!r} in images/ or here"
        raise DatasetError(f"{root / folder}: {said}. Put the pictures of the model beside it")
    views = []
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
                viewmat=image.viewmat,
                K=np.asarray(camera.calibration_matrix()),
                size=(int(camera.width), int(camera.height)),
                mask=next((place for place in places if (root / place).is_file()), ""),
                lens=(camera.model_name, tuple(bends)),
            )
        )
    warnings = [
        f"{other} holds another model, of {len(its)} pictures; it is not read"
        for its, _, _, other in models
        if other != at
    ]
    base = root / prefixes[0]
    files = below(base) if prefixes[0] else ()
    pictures = (p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
    there = {path.relative_to(base).as_posix() for path in pictures}
    if without := sorted(there - {image.name for image in images}):
        said = f"{len(without)} pictures in {prefixes[0]}, {without[0]!r} for one,"
        warnings.append(f"{said} have no pose in the model and are left out")
    label, said_in = folder or _name_of(root), {_joined(at, n): of for n, of in names.items()}
    return [collect(model, label, views, said_in, "colmap", None, warnings)]


class _Posed(NamedTuple):
    name: str
    camera_id: int
    viewmat: Floats


def _posed(model: Path, suffix: str) -> tuple[list[_Posed], dict[int, Any], dict[str, str]]:
    """Of a model: the pictures that have a pose, by name, the cameras, and the sha256 of the files
    that were read."""
    import pycolmap

    names = [f"{stem}{suffix}" for stem in ("cameras", "images")]
    names = [name for name in names if (model / name).is_file()]
    if f"images{suffix}" not in names:
        said = f"has no images{suffix}, which says which picture has which pose"
        raise DatasetError(f"{model}: {said}. Export it again: colmap model_converter")
    if (size := sum((model / name).stat().st_size for name in names)) > _MAX_MODEL_BYTES:
        raise DatasetError(f"{model}: {size} bytes, the limit is {_MAX_MODEL_BYTES}")
    found, (optics, poses) = [], (read_bytes(model / name, _MAX_MODEL_BYTES) for name in names)
    with tempfile.TemporaryDirectory() as copy:  # its cameras alone
        (Path(copy) / names[0]).write_bytes(optics)
        for name in ("images", "points3D"):
            (Path(copy) / f"{name}{suffix}").write_bytes(b"\0" * 8 if suffix == ".bin" else b"")
        try:
            read = _rows if suffix == ".txt" else _records
            for name, camera, (w, x, y, z, *shift) in read(poses):
                if not any((w, x, y, z)):
                    raise ValueError(f"the quaternion of {name!r} is 0 0 0 0, no rotation")
                pose = np.eye(4)
                pose[:3, :3] = Rotation.from_quat([x, y, z, w]).as_matrix()
                pose[:3, 3] = shift
                found.append(_Posed(name, camera, pose))
            cameras = dict(pycolmap.Reconstruction(copy).cameras.items())
        except Exception as error:  # names that are no UTF-8 among them
            said = (str(error).strip().splitlines() or ["it crashed"])[-1][:300]
            raise DatasetError(f"{model}: not a readable COLMAP model ({said})") from None
    if len(found) > MAX_VIEWS:
        raise DatasetError(f"{model}: {len(found)} views, the limit is {MAX_VIEWS}")
    read_from = {names[0]: sha256(optics), names[1]: sha256(poses)}
    return sorted(found, key=lambda one: one.name), cameras, read_from


def _rows(data: bytes) -> Iterator[tuple[str, int, list[float]]]:
    """Of an images.txt: name, camera, quaternion wxyz and translation of every picture.  Some tools
    leave the second lines, of points, out; names may hold spaces."""
    with io.TextIOWrapper(io.BytesIO(data), encoding="utf-8") as file:
        for line in file:
            words = line.split(None, 9)
            if len(words) < 10 or line.startswith("#"):
                continue
            ends = words[9].split(None, 1)[0], words[9].rsplit(None, 1)[-1]
            if not all(map(_NUMBER.fullmatch, ends)):  # else a row of points
                _, *numbers = (float(word) for word in words[:8])
                yield words[9].strip(), int(words[8]), numbers


def _records(data: bytes) -> Iterator[tuple[str, int, list[float]]]:
    """The same of an images.bin, whose points are skipped."""
    at = 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        _, *numbers, camera = struct.unpack_from("<I7dI", data, at)
        end = data.index(b"\0", at + 64)
        (points,) = struct.unpack_from("<Q", data, end + 1)
        yield data[at + 64 : end].decode(), camera, numbers
        at = end + 9 + 24 * points
    if at != len(data):
        raise ValueError(f"images.bin has {len(data)} bytes, its pictures {at}: it is cut off")


def _read_annotations(root: Path, folder: str, names: list[str]) -> list[Capture]:
    """One capture for each sequence of the category that lies on disk.

    Sequences of which no picture is there (a partial download) are left out.
    """
    file = _joined(folder, *names)
    path = inside(root, file)
    sequences: dict[str, list[View]] = defaultdict(list)
    present: dict[str, bool] = {}
    data = read_bytes(path, MAX_JSON_BYTES)
    for frame in read_items(path, data):
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
        collect(path, _joined(folder, name), views, {file: sha256(data)}, "co3d")
        for name, views in sequences.items()
    ]


Find = Callable[[Path], list[str]]
Read = Callable[[Path, str, list[str]], list[Capture]]
FORMATS: tuple[tuple[Find, Read], ...] = (
    (_transforms_in, _read_transforms),
    (_models_in, _read_model),
    (lambda folder: [_CO3D] * (folder / _CO3D).is_file(), _read_annotations),
)
"""Of each format: the names of the files in a folder that it knows ([]: it is of another one), by
names only, and what reads the descriptions in ``root / folder``, but no picture."""
