"""COLMAP sparse models, text and binary, read by pycolmap.

A model lies in the folder itself or in sparse/0, sparse, colmap/sparse/0 or 0 below it; its
pictures in images/ (or the folder itself, or images_2/ ... if images/ is missing), masks in masks/
as PICTURE.png or PICTURE with .png for its extension, as COLMAP's own.  Models of COLMAP 3.12 and
later may lack the images file: rigs and frames then say where each camera stood, and the pictures'
names come from database.db, or else from the sorted order of the pictures, which is the order
that COLMAP numbers them in.

Lens models up to OPENCV's eight radial and tangential terms and OPENCV_FISHEYE's four are undone
exactly; FOV, THIN_PRISM_FISHEYE, RAD_TAN_THIN_PRISM_FISHEYE and the others are refused: let
`colmap image_undistorter` undo them.  Worlds have no scale and no vertical: the mean of the
cameras' up directions becomes Y.  The sparse points are not used and not read: they can be
larger than memory.

The C++ reader trusts what it reads, so it runs in a process of its own with bounded memory.

https://colmap.github.io/format.html
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.data.captures import (
    MAX_VIEWS,
    TERMS,
    Capture,
    Floats,
    View,
    collect,
    pinhole,
    relative,
    upright,
)
from fresnel.data.images import IMAGE_SUFFIXES, DatasetError
from fresnel.data.layout import inside

_MODELS = ("", "sparse/0", "sparse", "colmap/sparse/0", "0")
_IMAGES = ("images", "", "images_2", "images_4", "images_8")
_MAX_MODEL_BYTES = 1 << 30
_SECONDS = 300
# model -> where its parameters go: f or fx fy, cx, cy, then OpenCV terms by their index
_TERMS: dict[str, tuple[int, ...]] = {
    "SIMPLE_PINHOLE": (),
    "PINHOLE": (),
    "SIMPLE_RADIAL": (0,),
    "RADIAL": (0, 1),
    "OPENCV": (0, 1, 2, 3),
    "FULL_OPENCV": (0, 1, 2, 3, 4, 5, 6, 7),
    "SIMPLE_RADIAL_FISHEYE": (0,),
    "RADIAL_FISHEYE": (0, 1),
    "OPENCV_FISHEYE": (0, 1, 2, 3),
}
_ONE_FOCAL = (
    "SIMPLE_PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
)


def recognises(folder: Path) -> bool:
    return _model(folder) is not None


def _model(folder: Path) -> str | None:
    for place in _MODELS:
        for suffix in (".bin", ".txt"):
            at = folder / place
            if (at / f"cameras{suffix}").is_file() and any(
                (at / f"{name}{suffix}").is_file() for name in ("images", "frames")
            ):
                return place
    return None


def read(root: Path, folder: str) -> list[Capture]:
    """The capture that the model in ``root / folder`` describes."""
    place = _model(root / folder)
    assert place is not None
    at = "/".join(part for part in (folder, place) if part)
    model = inside(root, at) if at else root
    files = [
        path
        for path in sorted(model.iterdir())
        if path.stem in ("cameras", "images", "rigs", "frames") and path.suffix in (".bin", ".txt")
    ]
    binary = (model / "cameras.bin").is_file()
    files = [path for path in files if (path.suffix == ".bin") == binary]
    size = sum(path.stat().st_size for path in files)
    if size > _MAX_MODEL_BYTES:
        raise DatasetError(f"{model}: {size} bytes, the limit is {_MAX_MODEL_BYTES}")
    notes: dict[str, Any] = {"format": "colmap", "up": "mean of the cameras' up directions"}
    cameras, images = _parsed(model, files)
    if not (model / f"images{'.bin' if binary else '.txt'}").is_file():
        images = _from_frames(root, folder, model, binary, notes)
    prefix = _pictures(root, folder, model, images)
    views = [
        _view(root, prefix, folder, model, cameras, image)
        for image in sorted(images, key=lambda entry: str(entry["name"]))
    ]
    descriptions = ["/".join(part for part in (at, path.name) if part) for path in files]
    stacked = np.stack([view.viewmat for view in views]) if views else np.zeros((0, 4, 4))
    turn = upright(stacked) if len(views) and np.isfinite(stacked).all() else np.eye(3)
    name = folder or root.resolve().name
    return [collect(model, name, views, descriptions, turn, notes=notes)]


def _view(
    root: Path,
    prefix: str,
    folder: str,
    model: Path,
    cameras: dict[str, Any],
    image: dict[str, Any],
) -> View:
    camera = cameras.get(str(image["camera"]))
    if camera is None:
        raise DatasetError(f"{model}: {image['name']!r} names a camera that isn't there")
    kind, parameters = camera["model"], camera["params"]
    if kind not in _TERMS:
        raise DatasetError(
            f"{model}: camera model {kind} is not supported; want one of {tuple(_TERMS)}. Run "
            "colmap image_undistorter first"
        )
    lens = _TERMS[kind]
    fx, *rest = parameters
    fy, cx, cy, *values = [fx, *rest] if kind in _ONE_FOCAL else rest
    terms = np.zeros(TERMS)
    terms[list(lens)] = values
    path = relative(root, prefix, image["name"], model)
    return View(
        image=path,
        viewmat=np.vstack([np.array(image["pose"], dtype=np.float64), [0, 0, 0, 1]]),
        K=pinhole(fx, fy, cx, cy),
        size=(int(camera["width"]), int(camera["height"])),
        mask=_mask(root, folder, image["name"]),
        distortion=terms,
        fisheye=kind.endswith("FISHEYE"),
    )


def _mask(root: Path, folder: str, name: str) -> str:
    for file in (f"{name}.png", str(Path(name).with_suffix(".png"))):
        candidate = "/".join(part for part in (folder, "masks", file) if part)
        if (root / candidate).is_file():
            return relative(root, "", candidate, root)
    return ""


def _pictures(root: Path, folder: str, model: Path, images: list[dict[str, Any]]) -> str:
    """The folder, relative to ``root``, that the pictures' names start from."""
    first = min((str(image["name"]) for image in images), default="")
    for place in _IMAGES:
        prefix = "/".join(part for part in (folder, place) if part)
        if first and (root / relative(root, prefix, first, model)).is_file():
            return prefix
    raise DatasetError(
        f"{root / folder}: can't find picture {first!r} in images/ or here. Put the pictures of "
        "the model beside it"
    )


# --- pycolmap, at arm's length -----------------------------------------------------------------

_CHILD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import pycolmap
model = pycolmap.Reconstruction(sys.argv[1])
json.dump({
    "cameras": {
        str(key): {
            "model": c.model_name if hasattr(c, "model_name") else c.model.name,
            "width": c.width, "height": c.height, "params": list(map(float, c.params)),
        } for key, c in model.cameras.items()
    },
    "images": [
        {"name": i.name, "camera": i.camera_id, "pose": i.cam_from_world().matrix().tolist()}
        for i in model.images.values() if i.has_pose
    ],
}, sys.stdout)
"""


def _parsed(model: Path, files: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cameras by id, and the images that have a pose."""
    try:
        import pycolmap  # noqa: F401  # only to say so here if it isn't there
    except ImportError:
        raise DatasetError(
            f"{model}: a COLMAP model needs pycolmap. Install it: pip install pycolmap"
        ) from None
    stems = {path.stem for path in files}
    with tempfile.TemporaryDirectory() as folder:
        suffix = files[0].suffix
        for path in files:
            if "images" in stems or path.stem == "cameras":
                os.symlink(path.resolve(), Path(folder) / path.name)
        for stem in ("images", "points3D"):
            if not (Path(folder) / f"{stem}{suffix}").exists():
                empty = b"\0" * 8 if suffix == ".bin" else b""
                (Path(folder) / f"{stem}{suffix}").write_bytes(empty)
        memory = 4 * _MAX_MODEL_BYTES
        command = [sys.executable, "-c", _CHILD, folder, str(memory)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise DatasetError(f"{model}: reading it takes more than {_SECONDS} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it crashed"]
        raise DatasetError(f"{model}: not a readable COLMAP model ({said[-1][:300]})")
    answer = json.loads(done.stdout)
    if len(answer["images"]) > MAX_VIEWS:
        raise DatasetError(f"{model}: {len(answer['images'])} views, the limit is {MAX_VIEWS}")
    return answer["cameras"], answer["images"]


# --- models without an images file -------------------------------------------------------------


def _from_frames(
    root: Path, folder: str, model: Path, binary: bool, notes: dict[str, Any]
) -> list[dict[str, Any]]:
    """Images from rigs and frames: pose = sensor from rig x rig from world."""
    try:
        rigs = dict(_rigs_bin(model) if binary else _rigs_txt(model))
        frames = list(_frames_bin(model) if binary else _frames_txt(model))
    except (struct.error, ValueError, IndexError, OSError) as error:
        raise DatasetError(f"{model}: rigs or frames can't be read ({error})") from None
    images: list[dict[str, Any]] = []
    for rig_id, rig_from_world, data in frames:
        for sensor, image_id in data:
            if sensor not in rigs.get(rig_id, {}):
                raise DatasetError(f"{model}: a frame names sensor {sensor} that its rig hasn't")
            pose = rigs[rig_id][sensor] @ rig_from_world
            images.append({"id": image_id, "camera": sensor, "pose": pose[:3].tolist()})
    images.sort(key=lambda image: int(image["id"]))
    names, source = _names(root, folder, model)
    if isinstance(names, dict):
        missing = [image["id"] for image in images if image["id"] not in names]
        if missing:
            raise DatasetError(f"{model}: database.db has no image {missing[0]}")
        return [{**image, "name": names[image["id"]]} for image in images]
    if len(names) != len(images):
        raise DatasetError(
            f"{model}: has no images file, and {len(images)} frames' images for {len(names)} "
            "pictures. Add its images file or database.db, which tell which is which"
        )
    notes["names"] = source
    return [{**image, "name": name} for image, name in zip(images, names, strict=True)]


def _names(root: Path, folder: str, model: Path) -> tuple[dict[int, str] | list[str], str]:
    for place in (model, model.parent, model.parent.parent, root / folder):
        database = place / "database.db"
        if database.is_file() and database.resolve().is_relative_to(root.resolve()):
            try:
                with sqlite3.connect(f"file:{database.resolve()}?mode=ro", uri=True) as connection:
                    rows = connection.execute(
                        f"SELECT image_id, name FROM images LIMIT {MAX_VIEWS + 1}"
                    ).fetchall()
            except (sqlite3.Error, OverflowError) as error:
                raise DatasetError(f"{database}: can't be read ({error})") from None
            return {int(key): str(name) for key, name in rows}, "database.db"
    base = root / folder / "images"
    if not base.is_dir():
        raise DatasetError(f"{root / folder}: has no images/ folder beside the model")
    paths = (path for path in base.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path.relative_to(base).as_posix() for path in paths), (
        "sorted order of the pictures (no images file, no database.db)"
    )


def _rigid(numbers: Any) -> Floats:
    """4 x 4 from qw qx qy qz tx ty tz."""
    w, x, y, z, *t = (float(value) for value in numbers)
    length = (w * w + x * x + y * y + z * z) ** 0.5
    if not 0 < length < 1e6:
        raise ValueError(f"a quaternion has length {length}")
    w, x, y, z = w / length, x / length, y / length, z / length
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = t
    return matrix


class _Bytes:
    """A little-endian file, read piece by piece."""

    def __init__(self, path: Path) -> None:
        self.data, self.at = path.read_bytes(), 0

    def __call__(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values


def _rigs_bin(model: Path) -> Iterator[tuple[int, dict[int, Floats]]]:
    take = _Bytes(model / "rigs.bin")
    (count,) = take("Q")
    for _ in range(count):  # a lying count runs into the end of the file
        rig, sensors = take("II")
        found: dict[int, Floats] = {}
        for k in range(sensors):
            _, sensor = take("iI")
            posed = k > 0 and take("B")[0]
            found[sensor] = _rigid(take("7d")) if posed else np.eye(4)
        yield rig, found


def _frames_bin(model: Path) -> Iterator[tuple[int, Floats, list[tuple[int, int]]]]:
    take = _Bytes(model / "frames.bin")
    (count,) = take("Q")
    for _ in range(count):
        _, rig = take("II")
        pose = _rigid(take("7d"))
        (length,) = take("I")
        data = [take("iIQ") for _ in range(length)]
        yield rig, pose, [(sensor, image) for kind, sensor, image in data if kind == 0]


def _lines(path: Path) -> Iterator[list[str]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.split()


def _rigs_txt(model: Path) -> Iterator[tuple[int, dict[int, Floats]]]:
    for words in _lines(model / "rigs.txt"):
        rig, count = int(words[0]), int(words[1])
        found = {int(words[3]): np.eye(4)} if count else {}
        at = 4
        for _ in range(count - 1):
            sensor, posed = int(words[at + 1]), int(words[at + 2])
            found[sensor] = _rigid(words[at + 3 : at + 10]) if posed else np.eye(4)
            at += 10 if posed else 3
        yield rig, found


def _frames_txt(model: Path) -> Iterator[tuple[int, Floats, list[tuple[int, int]]]]:
    for words in _lines(model / "frames.txt"):
        count = int(words[9])
        data = [words[10 + 3 * k : 13 + 3 * k] for k in range(count)]
        yield (
            int(words[1]),
            _rigid(words[2:9]),
            [(int(sensor), int(image)) for kind, sensor, image in data if kind == "CAMERA"],
        )
