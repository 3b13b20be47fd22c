"""How a dataset lies on disk: its paths, its JSON, its manifest and its hashes.

    image_0000/input.png  input_alpha.png  input_pose.json  [input_depth.png]
               [identity.png  identity_alpha.png]
               view_000/rgb.png  alpha.png  pose.json  [depth.png]

The original experiment's layout is that without manifest.json, alpha and input_pose.json; its
depth is depth.npy.  `records` reads and writes what is in a folder.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.data.images import DatasetError, read_bytes
from fresnel.host import files as _files

SCHEMA_VERSION = 2
"""1: sets whose content hash does not cover `meta`; they are read, and hashed anew."""
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 1 << 28
_MAX_RECORD_BYTES = 1 << 31
_FOLDER = re.compile(r"image_\d{4,}")
_FILE = re.compile(
    r"(input|input_alpha|input_depth|identity|identity_alpha)\.png|input_pose\.json"
    r"|view_\d{3,}/(rgb\.png|alpha\.png|depth\.png|pose\.json)"
)
# Not read, so not part of the data: the original's DINOv2 features and its relative depth.
_IGNORED = {"input_features.npy", "input_depth.npy"}


class DatasetChanged(DatasetError):
    """The files on disk are not the ones whose hash was recorded."""


@dataclass(frozen=True)
class Record:
    """Where one object lies: its folder and the sha256 of each of its files."""

    name: str
    folder: str
    attribution: str
    files: dict[str, str]


# --- JSON --------------------------------------------------------------------------------------

_WANTED = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number"}


def read_json(path: Path, data: bytes | None = None, kind: type = dict) -> Any:
    """What a JSON file says, an object or a list; of ``data``, ``path`` is only for messages."""
    data = read_bytes(path, MAX_JSON_BYTES) if data is None else data
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON ({error}). Restore or rewrite it") from None
    return entry({"the JSON": value}, "the JSON", kind, path)


def entry(values: Any, key: str, kind: type, where: str | Path, default: Any = None) -> Any:
    """``values[key]`` of what JSON says, which must be of that kind, numbers finite."""
    value: Any = values.get(key, default) if isinstance(values, dict) else None
    sound = isinstance(value, (int, float) if kind is float else kind)
    if not sound or isinstance(value, bool) or (kind is float and not abs(value) < 1e12):
        raise DatasetError(f"{where}: {key} is {str(value)[:80]!r}, want {_WANTED[kind]}")
    return value


def array(values: dict[str, Any], key: str, shape: tuple[int, ...], where: Path) -> np.ndarray:
    """``values[key]`` of what JSON says as finite float64 numbers of that shape."""
    try:
        found = np.asarray(values[key], dtype=np.float64)
    except KeyError:
        raise DatasetError(f"{where}: has no {key!r}; want {shape} numbers") from None
    except (TypeError, ValueError, OverflowError):
        raise DatasetError(f"{where}: {key!r} is not an array of numbers, want {shape}") from None
    if found.shape != shape:
        raise DatasetError(f"{where}: {key!r} has shape {found.shape}, want {shape}")
    if not (np.abs(found) < 1e30).all():  # float32's range; NaN is not less either
        said = "Fix what wrote it, or remove this object"
        raise DatasetError(f"{where}: {key!r} holds NaN or infinity. {said}")
    return found


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# --- paths -------------------------------------------------------------------------------------


def inside(root: Path, path: str) -> Path:
    """``root / path``, refused if links lead out of the dataset's folder."""
    try:
        return _files.inside(root, path)
    except ValueError as error:
        raise DatasetError(str(error)) from None


def relative(folder: str, file: Any, where: str | Path) -> str:
    """A description's path, relative to ``folder``, as one relative to the dataset's root.

    Raises:
        DatasetError: if it is no text, absolute, or leads out of the dataset's folder.
    """
    if not isinstance(file, str) or not 0 < len(file) <= 1000 or "\0" in file:
        raise DatasetError(f"{where}: {repr(file)[:80]} is not a path; want text")
    plain = file.replace("\\", "/")
    path = posixpath.normpath(posixpath.join(folder, plain))
    first = path.split("/")[0]
    if first in ("", ".", "..") or ":" in plain.split("/")[0]:
        raise DatasetError(f"{where}: refuses {file!r}; want a path that stays in the folder")
    return path


def image_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir())


def data_files(root: Path, folder: str) -> list[str]:
    """Paths, relative to ``root / folder``, of every data file that lies in it."""
    base = inside(root, folder)
    found = (path for path in base.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(base).as_posix() for path in found if path.name not in _IGNORED)


def object_name(record: str) -> str:
    """The object a record shows: several input poses of one object are records "name__k"."""
    stem, separator, suffix = record.rpartition("__")
    return stem if separator and suffix.isdigit() else record


# --- the manifest ------------------------------------------------------------------------------


def is_ours(root: Path) -> bool:
    """Whether the folder has a manifest of ours; other tools write files of that name too."""
    if not (root / MANIFEST).is_file():
        return False
    with inside(root, MANIFEST).open("rb") as file:
        start = file.read(1 << 16)
    keys = (b'"schema_version"', b'"views_per_object"')
    return bool(image_folders(root)) or all(key in start for key in keys)


def parse_manifest(root: Path) -> tuple[dict[str, Any], tuple[Record, ...]]:
    path = inside(root, MANIFEST)
    manifest = read_json(path)
    if manifest.get("schema_version") not in (1, SCHEMA_VERSION):
        raise DatasetError(
            f"{path}: schema_version is {manifest.get('schema_version')!r}, this version of "
            f"fresnel reads 1 and {SCHEMA_VERSION}"
        )
    background = array(manifest, "background", (3,), path)
    if (background < 0).any() or (background > 1).any():
        raise DatasetError(f"{path}: background {background.tolist()}, want sRGB in [0, 1]")
    size, views = (entry(manifest, key, int, path) for key in ("image_size", "views_per_object"))
    if size < 1 or views < 1 or 4 * views * size**2 > _MAX_RECORD_BYTES:
        raise DatasetError(
            f"{path}: says {views} views of {size} px an object; want at least one, and at most "
            f"{_MAX_RECORD_BYTES >> 20} MB an object. Write fewer or smaller views"
        )
    entry(manifest, "meta", dict, path)
    records = tuple(_record(said, path) for said in entry(manifest, "objects", list, path))
    for what in ("name", "folder"):
        if not records or len({getattr(record, what) for record in records}) < len(records):
            raise DatasetError(f"{path}: lists no objects, or two share a {what}")
    return manifest, records


def _record(said: Any, path: Path) -> Record:
    name, folder, maker = (entry(said, key, str, path) for key in ("name", "folder", "attribution"))
    if not _FOLDER.fullmatch(folder):
        raise DatasetError(f"{path}: refuses folder {folder!r}; want image_0000 and the like")
    files = entry(said, "files", dict, path)
    for file in files:
        if not _FILE.fullmatch(file):
            raise DatasetError(f"{path}: refuses file {file!r} of {name!r}: not of this layout")
    return Record(name, folder, maker, {file: entry(files, file, str, path) for file in files})


# --- hashes ------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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


def read_checked(root: Path, file: str, digest: str) -> bytes:
    """The bytes of a file whose sha256 was recorded.

    Raises:
        DatasetChanged: if they are others, or the file is gone: what is decoded is what was hashed.
    """
    path = inside(root, file)
    if not path.is_file():
        raise DatasetChanged(f"{path}: was removed after the dataset was opened. Restore it")
    data = read_bytes(path)
    if sha256(data) != digest:
        raise DatasetChanged(
            f"{path}: was changed after its hash was recorded. Restore it, or write and gate the "
            "dataset anew"
        )
    return data


def digests(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """sha256 of files by path relative to ``root``; those that are gone are left out."""
    ordered = [path for path in sorted(set(paths)) if inside(root, path).is_file()]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda path: _files.sha256(root / path), ordered)
        return dict(zip(ordered, found, strict=True))


def compare(root: Path, want: dict[str, str], found: Iterable[str] = ()) -> None:
    """Read files again, by path relative to ``root``, and what was ``found`` there.

    Raises:
        DatasetChanged: of the first that is not as wanted.
    """
    got = digests(root, {*want, *found})
    for path in sorted({*want, *got}):
        if got.get(path) != want.get(path):
            how = "removed" if path not in got else "changed" if path in want else "added"
            raise changed(root / path, how)


def changed(path: Path, how: str) -> DatasetChanged:
    said = "Restore it, or write and gate the dataset anew"
    return DatasetChanged(f"{path}: was {how} after the dataset was written. {said}")


def hashed(root: Path) -> tuple[Record, ...]:
    """The records of a folder of the original's layout."""
    files = {folder: data_files(root, folder) for folder in image_folders(root)}
    for folder, names in files.items():
        if "input.png" not in names:
            raise DatasetError(f"{root / folder}: has no input.png. Restore or remove this folder")
    found = digests(root, (f"{folder}/{name}" for folder in files for name in files[folder]))
    return tuple(
        Record(folder, folder, "", {name: found[f"{folder}/{name}"] for name in names})
        for folder, names in files.items()
    )
