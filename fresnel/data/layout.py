"""How a dataset lies on disk: files of one record, poses, hashes; ours and the original's.

    image_0000/input.png  input_alpha.png  input_pose.json  [input_depth.png]
               [identity.png  identity_alpha.png]
               view_000/rgb.png  alpha.png  pose.json  [depth.png]

``pose.json`` holds R and t of an OpenGL world-to-camera transform, as the original's files do,
and in ours K, width, height, azimuth_deg (relative to the input) and depth_scale too.  Depth is
16-bit: depth = value * depth_scale, 0 where nothing is.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fresnel.data.images import DatasetError, as_depth, opened, read_bytes
from fresnel.host import files as _files
from fresnel.scene.cameras import Cameras, intrinsics

SCHEMA_VERSION = 2
"""1: sets whose content hash does not cover `meta`; they are read, and hashed anew."""
MANIFEST = "manifest.json"
_MAX_JSON_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 1 << 28
_MAX_RECORD_BYTES = 1 << 31
_BEYOND_FLOAT32 = 1e30
_FOLDER = re.compile(r"image_\d{4,}")
_FILE = re.compile(
    r"(input|input_alpha|input_depth|identity|identity_alpha)\.png|input_pose\.json"
    r"|view_\d{3,}/(rgb\.png|alpha\.png|depth\.png|pose\.json)"
)
# Not read, so not part of the data: the original's DINOv2 features and its relative depth.
_IGNORED = {"input_features.npy", "input_depth.npy"}
# At 256 px level 4 packs 4000 views into 72 MB in 18 s; 6 into 71 MB in 23 s, 1 into 84 MB in 12 s.
PNG_LEVEL = 4


class DatasetChanged(DatasetError):
    """The files on disk are not the ones whose hash was recorded."""


@dataclass(frozen=True)
class Record:
    """Where one object lies: its folder and the sha256 of each of its files (None: unknown)."""

    name: str
    folder: str
    attribution: str
    files: dict[str, str]


# --- bytes -------------------------------------------------------------------------------------


def png(image: Tensor | np.ndarray) -> bytes:
    """Lossless PNG of uint8 (H, W, 3) or (H, W), or of uint16 (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def depth_scale(depth: Tensor) -> float:
    """World units of one step: a power of two, so that writing again changes no bit."""
    largest = float(depth.numpy().max())
    return 2.0 ** math.ceil(math.log2(largest / 65535)) if largest > 0 else 2.0**-16


def depth_png(depth: Tensor) -> bytes:
    # numpy: torch would call all cores together for each of the encoding threads' small pictures
    values = np.rint(depth.numpy().astype(np.float64) / depth_scale(depth))
    np.clip(values, 1, 65535, out=values, where=depth.numpy() > 0)
    return png(values.astype(np.uint16))


def read_png(path: Path, mode: str, data: bytes) -> Tensor:
    """uint8 (H, W, 3) for mode "RGB", (H, W) for "L", uint16 (H, W) for "I;16".

    The bytes are decoded; ``path`` is only for messages; so below.
    """
    with opened(path, data) as image:
        if image.mode != mode:
            raise DatasetError(
                f"{path}: a PNG of mode {image.mode}, want {mode}. Write the dataset again with "
                "fresnel.data.dataset.write"
            )
        return torch.from_numpy(np.array(image))


def read_depth(path: Path, scale: float, data: bytes) -> Tensor:
    values = read_png(path, "I;16", data).numpy()
    if math.frexp(scale)[0] == 0.5 and 1e-30 < scale < 1e30:  # a power of two: nothing to round
        return torch.from_numpy(values.astype(np.float32) * np.float32(scale))
    return torch.from_numpy((values.astype(np.float64) * scale).astype(np.float32))


def read_json(
    path: Path, data: bytes | None = None, limit: int = _MAX_JSON_BYTES
) -> dict[str, Any]:
    data = read_bytes(path, limit) if data is None else data
    if len(data) > limit:
        raise DatasetError(f"{path}: more than {limit} bytes of JSON, which is the limit")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON ({error}). Restore or rewrite it") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{path}: holds a {type(value).__name__}, want a JSON object")
    return value


def read_checked(path: Path, digest: str) -> bytes:
    """The bytes of a file whose sha256 was recorded.

    Raises:
        DatasetChanged: if they are others, or the file is gone: what is decoded is what was hashed.
    """
    if not path.is_file():
        raise DatasetChanged(f"{path}: was removed after the dataset was opened. Restore it")
    data = read_bytes(path)
    if sha256(data) != digest:
        raise DatasetChanged(
            f"{path}: was changed after its hash was recorded. Restore it, or write and gate the "
            "dataset anew"
        )
    return data


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def object_name(record: str) -> str:
    """The object a record shows: several input poses of one object are records "name__k"."""
    stem, separator, suffix = record.rpartition("__")
    return stem if separator and suffix.isdigit() else record


# --- poses -------------------------------------------------------------------------------------


def pose_json(camera: Cameras, azimuth_deg: float, scale: float | None, **more: Any) -> bytes:
    rotation, translation = camera.to_opengl()
    pose = {
        "R": rotation.tolist(),
        "t": translation.tolist(),
        "K": camera.Ks.tolist(),
        "width": camera.width,
        "height": camera.height,
        "azimuth_deg": round(azimuth_deg, 4),
        "depth_scale": scale,
        **more,
    }
    return json.dumps(pose, indent=1).encode()


def array(pose: dict[str, Any], key: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    try:
        array = np.asarray(pose[key], dtype=np.float64)
    except KeyError:
        raise DatasetError(f"{path}: has no {key!r}; want {shape} numbers") from None
    except (TypeError, ValueError):
        raise DatasetError(f"{path}: {key!r} is not an array of numbers, want {shape}") from None
    if array.shape != shape:
        raise DatasetError(f"{path}: {key!r} has shape {array.shape}, want {shape}")
    if not (np.abs(array) < _BEYOND_FLOAT32).all():  # NaN is not less either
        raise DatasetError(
            f"{path}: {key!r} holds NaN or infinity. Fix what wrote it, or remove this object"
        )
    return array


def read_camera(path: Path, width: int, height: int, data: bytes) -> tuple[Cameras, dict[str, Any]]:
    """The camera of a pose file for an image of width x height, and the file's other entries."""
    pose = read_json(path, data)
    rotation, translation = array(pose, "R", (3, 3), path), array(pose, "t", (3,), path)
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error > 1e-3 or np.linalg.det(rotation) < 0:
        raise DatasetError(
            f"{path}: R is not a rotation (R R^T is off by {error:.3g}, determinant "
            f"{np.linalg.det(rotation):.3g}). Want an OpenGL world-to-camera rotation without "
            "scale or mirror"
        )
    if "K" in pose:
        Ks = array(pose, "K", (3, 3), path)
        if Ks[0, 0] <= 0 or Ks[1, 1] <= 0 or Ks[2].tolist() != [0, 0, 1]:
            raise DatasetError(f"{path}: K is not a pinhole matrix with focal lengths > 0")
        K = torch.from_numpy(Ks).float()
        if (pose.get("width", width), pose.get("height", height)) != (width, height):
            raise DatasetError(
                f"{path}: is for {pose.get('width')} x {pose.get('height')} pixels, the image "
                f"beside it has {width} x {height}. Write both again"
            )
    else:
        K = intrinsics(float(width), width, height)  # the original: focal length = image size
    camera = Cameras.from_opengl(
        torch.from_numpy(rotation).float(), torch.from_numpy(translation).float(), K, width, height
    )
    return camera, pose


def stack_cameras(cameras: list[Cameras]) -> Cameras:
    first = cameras[0]
    return Cameras(
        torch.stack([c.viewmats for c in cameras]),
        torch.stack([c.Ks for c in cameras]),
        first.width,
        first.height,
    )


# --- our layout --------------------------------------------------------------------------------


def inside(root: Path, relative: str) -> Path:
    """``root / relative``, refused if links lead out of the dataset's folder."""
    try:
        return _files.inside(root, relative)
    except ValueError as error:
        raise DatasetError(str(error)) from None


def relative(root: Path, folder: str, file: Any, where: str | Path) -> str:
    """A path of a description, relative to ``folder``, as one relative to the dataset's ``root``.

    Raises:
        DatasetError: if it is no text, absolute, or leads out of the dataset's folder.
    """
    if not isinstance(file, str) or not file or len(file) > 1000 or "\0" in file:
        shown = repr(file)[:80]
        raise DatasetError(f"{where}: {shown} is not a path; want text")
    path = PurePosixPath(file.replace("\\", "/"))
    parts: list[str] = [part for part in folder.split("/") if part not in ("", ".")]
    for part in path.parts:
        if part == "..":
            if not parts:
                raise DatasetError(f"{where}: refuses {file!r}: it leads out of the folder")
            parts.pop()
        elif part != ".":
            parts.append(part)
    if path.is_absolute() or ":" in path.parts[0] or not parts:
        raise DatasetError(f"{where}: refuses {file!r}; want a path relative to the folder")
    return "/".join(parts)


def is_ours(root: Path) -> bool:
    """Whether the folder has a manifest of ours; other tools write files of that name too."""
    path = root / MANIFEST
    if not path.is_file():
        return False
    if any(_FOLDER.fullmatch(entry.name) for entry in root.iterdir()):
        return True
    with inside(root, MANIFEST).open("rb") as file:
        start = file.read(1 << 16)
    return b'"schema_version"' in start and b'"views_per_object"' in start


def parse_manifest(root: Path) -> tuple[dict[str, Any], tuple[Record, ...]]:
    path = inside(root, MANIFEST)
    manifest = read_json(path, limit=_MAX_MANIFEST_BYTES)
    if manifest.get("schema_version") not in (1, SCHEMA_VERSION):
        raise DatasetError(
            f"{path}: schema_version is {manifest.get('schema_version')!r}, this version of "
            f"fresnel reads 1 and {SCHEMA_VERSION}"
        )
    background = array(manifest, "background", (3,), path)
    if (background < 0).any() or (background > 1).any():
        raise DatasetError(f"{path}: background {background.tolist()}, want sRGB in [0, 1]")
    for key in ("image_size", "views_per_object"):
        if not isinstance(manifest.get(key), int) or not 1 <= manifest[key] <= 100_000:
            raise DatasetError(f"{path}: {key} is {manifest.get(key)!r}, want a positive integer")
    if 4 * manifest["views_per_object"] * manifest["image_size"] ** 2 > _MAX_RECORD_BYTES:
        raise DatasetError(
            f"{path}: {manifest['views_per_object']} views of {manifest['image_size']} px an "
            f"object take more than {_MAX_RECORD_BYTES >> 20} MB. Write fewer or smaller views"
        )
    if not isinstance(manifest.get("meta"), dict):
        raise DatasetError(f"{path}: meta is not a JSON object")
    objects = manifest.get("objects")
    if not isinstance(objects, list) or not objects:
        raise DatasetError(f"{path}: lists no objects")
    records = tuple(_record(entry, path) for entry in objects)
    for what in ("name", "folder"):
        if len({getattr(record, what) for record in records}) < len(records):
            raise DatasetError(f"{path}: two objects share a {what}")
    return manifest, records


def _record(entry: Any, path: Path) -> Record:
    try:
        name, folder, files = entry["name"], entry["folder"], entry["files"]
        attribution = entry["attribution"]
        texts = [name, folder, attribution, *files.keys(), *files.values()]
    except (TypeError, KeyError, AttributeError):
        raise DatasetError(
            f"{path}: an object's entry is damaged; want name, folder, attribution, files"
        ) from None
    if not all(isinstance(text, str) for text in texts):
        raise DatasetError(f"{path}: an object's entry holds something other than text")
    if not _FOLDER.fullmatch(folder):
        raise DatasetError(f"{path}: refuses folder {folder!r}; want image_0000 and the like")
    for file in files:
        if not _FILE.fullmatch(file):
            raise DatasetError(f"{path}: refuses file {file!r} of {name!r}: not of this layout")
    return Record(name, folder, attribution, dict(files))


def content_hash(records: Iterable[Record], manifest: dict[str, Any] | None) -> str:
    """sha256 over the sorted lines "path, NUL, sha256 of the bytes" of every data file.

    For our layout a last line covers all else that is read of the manifest: background, sizes,
    names and attributions, and ``meta`` (which splits, cameras and assumptions are taken from).
    """
    records = list(records)
    lines = sorted(f"{r.folder}/{f}\0{digest}" for r in records for f, digest in r.files.items())
    if manifest is not None:
        said = {
            "background": [float(value) for value in manifest["background"]],
            "image_size": manifest["image_size"],
            "views_per_object": manifest["views_per_object"],
            "objects": [[r.name, r.folder, r.attribution] for r in records],
        }
        if manifest["schema_version"] > 1:
            said["meta"] = manifest["meta"]
        lines.append(f"{MANIFEST}\0{sha256(canonical_json(said))}")
    return "sha256:" + sha256("\n".join(lines).encode())


def data_files(root: Path, folder: str) -> Iterator[str]:
    """Paths, relative to the object's folder, of every data file that lies in it."""
    base = inside(root, folder)
    for path in sorted(base.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.name not in _IGNORED:
            yield path.relative_to(base).as_posix()


def image_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir())


# --- hashes of files ---------------------------------------------------------------------------


def changed(path: Path, what: str) -> DatasetChanged:
    return DatasetChanged(
        f"{path}: {what} after the dataset was written. Restore it, or write and gate the dataset "
        "anew"
    )


def compare(root: Path, want: dict[str, str]) -> None:
    """Read files again, by path relative to ``root``; the first that is another is an error."""
    got = digests(root, want)
    for path in sorted(want):
        if got.get(path) != want[path]:
            raise changed(root / path, "was changed" if path in got else "was removed")


def hashed(root: Path, record: Record) -> Record:
    paths = {file: f"{record.folder}/{file}" for file in data_files(root, record.folder)}
    return replace(record, files={f: _files.sha256(inside(root, p)) for f, p in paths.items()})


def digests(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """sha256 of files by path relative to ``root``; those that are gone are left out."""
    ordered = [path for path in sorted(set(paths)) if inside(root, path).is_file()]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda path: _files.sha256(inside(root, path)), ordered)
        return dict(zip(ordered, found, strict=True))


# --- the original's layout ---------------------------------------------------------------------


def scan_original(root: Path) -> tuple[Record, ...]:
    """Records of a folder of the original's layout, without hashes."""
    records = []
    for folder in image_folders(root):
        files = {file: "" for file in data_files(root, folder)}
        if "input.png" not in files:
            raise DatasetError(f"{root / folder}: has no input.png. Restore or remove this folder")
        records.append(Record(folder, folder, "", files))
    return tuple(records)


def read_npy_depth(path: Path, shape: tuple[int, int], data: bytes) -> Tensor:
    """The original's depth.npy, (H, W) or (1, H, W) floats."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: not a readable .npy array ({error}). Make it again") from None
    if not isinstance(array, np.ndarray) or array.shape not in (shape, (1, *shape)):
        got = getattr(array, "shape", type(array).__name__)
        raise DatasetError(f"{path}: has shape {got}, want {shape} like the image beside it")
    if array.dtype.kind not in "fiu":
        raise DatasetError(f"{path}: has dtype {array.dtype}, want floats")
    return named(path, lambda: as_depth(array.astype(np.float32).reshape(shape), "depth", shape))


def named(path: Path, check: Callable[[], Any]) -> Any:
    """Runs ``check``, putting the file's name in front of its complaint."""
    try:
        return check()
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(f"{path}: {error}") from None
