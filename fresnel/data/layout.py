"""How a dataset lies on disk: its paths, its JSON, its manifest and its hashes, put there whole.

docs/data.md shows ours.  The original experiment's has no manifest.json, alpha and input_pose.json;
its depth is depth.npy.  `records` reads and writes what is in a folder.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import posixpath
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.data.images import DatasetError, named, read_bytes
from fresnel.host import files as _files

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 1 << 28
_MAX_ITEM = 1 << 20
_BETWEEN = re.compile(r"\s*([\[\],])\s*")
_FOLDER = re.compile(r"image_\d{4,}")
# Not read, so not part of the data: the original's DINOv2 features and its relative depth.
_IGNORED = {"input_features.npy", "input_depth.npy"}
_WANTED = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number"}


class DatasetChanged(DatasetError):
    """The files on disk are not the ones whose hash was recorded."""

    def __init__(self, path: Path, how: str = "changed") -> None:
        said = f"{path}: was {how} after its hash was recorded"
        super().__init__(f"{said}. Restore it, or write and gate the dataset anew")


@dataclass(frozen=True)
class Record:
    """Where one object lies: its folder and the sha256 of each of its files."""

    name: str
    folder: str
    attribution: str
    files: dict[str, str]

    @property
    def paths(self) -> dict[str, str]:
        """``files`` by path in the dataset."""
        return {f"{self.folder}/{file}": digest for file, digest in self.files.items()}


def read_json(path: Path, data: bytes | None = None) -> Any:
    """The object that a JSON file says; of ``data``, ``path`` is only for messages."""
    data = read_bytes(path, MAX_JSON_BYTES) if data is None else data
    try:
        value = _files.from_json(data)
    except ValueError as error:
        raise DatasetError(f"{path}: not valid JSON ({error}). Restore or rewrite it") from None
    return entry({"the JSON": value}, "the JSON", dict, path)


def read_items(path: Path, data: bytes) -> Iterator[Any]:
    """The items of a JSON list, one at a time, as all of a category's would take gigabytes;
    DatasetError if it is none, is damaged, or one of them has more than 1 MB."""
    stream, decoder = io.TextIOWrapper(io.BytesIO(data), "utf-8"), json.JSONDecoder()
    text, at, mark = "", 0, "["
    try:
        while True:
            if len(text) - at < _MAX_ITEM and (more := stream.read(4 * _MAX_ITEM)):
                text, at = text[at:] + more, 0
            found = _BETWEEN.match(text, at)
            if found and found[1] == "]" and mark == ",":
                return
            if not found or found[1] != mark:
                raise ValueError(f"want {mark!r} before {text[at : at + 20]!r}")
            item, at = decoder.raw_decode(text, found.end())
            yield item
            mark = ","
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not valid JSON ({error})") from None


def entry(
    values: Any, key: str, kind: type | tuple[int, ...], where: str | Path, default: Any = None
) -> Any:
    """``values[key]`` of what JSON says, which must be of that kind, numbers finite; of a shape:
    the numbers as a float64 array."""
    value: Any = values.get(key, default) if isinstance(values, dict) else None
    if isinstance(kind, tuple):
        wanted = f"finite numbers of shape {kind}"
        try:
            found = np.asarray(value, dtype=np.float64)
            if found.shape == kind and (np.abs(found) < 1e30).all():  # float32's range, no NaN
                return found
        except (TypeError, ValueError, OverflowError):
            pass
    else:
        wanted = _WANTED[kind]
        sound = isinstance(value, (int, float) if kind is float else kind)
        if sound and not isinstance(value, bool) and (kind is not float or abs(value) < 1e12):
            return value
    raise DatasetError(f"{where}: {key} is {str(value)[:80]!r}, want {wanted}")


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def inside(root: Path, path: str) -> Path:
    """``root / path``, refused if links lead out of the dataset's folder."""
    with named(root):
        return _files.inside(root, path)


def relative(folder: str, file: Any, where: str | Path) -> str:
    """A description's path, relative to ``folder``, as one relative to the dataset's root;
    DatasetError if it is no text, absolute, or leads out of it."""
    if isinstance(file, str) and 0 < len(file) <= 1000 and "\0" not in file:
        plain = file.replace("\\", "/")
        path = posixpath.normpath(posixpath.join(folder, plain))
        if path.split("/")[0] not in ("", ".", "..") and ":" not in plain.split("/")[0]:
            return path
    raise DatasetError(f"{where}: refuses {repr(file)[:80]}; want a path that stays in the folder")


def image_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if _FOLDER.fullmatch(p.name) and p.is_dir())


def data_files(root: Path) -> list[str]:
    """Paths, relative to ``root``, of every data file in its image folders."""
    bases = [inside(root, folder) for folder in image_folders(root)]
    found = (path for base in bases for path in _files.below(base) if path.name not in _IGNORED)
    kept = (path for path in found if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(root).as_posix() for path in kept)


def is_ours(root: Path) -> bool:
    """Whether the folder is of our layout; other tools write files named as the manifest too."""
    return (root / MANIFEST).is_file() and bool(image_folders(root))


def object_name(record: str) -> str:
    """The object a record shows: several input poses of one object are records "name__k"."""
    stem, separator, suffix = record.rpartition("__")
    return stem if separator and suffix.isdigit() else record


def parse_manifest(root: Path) -> tuple[dict[str, Any], list[Record]]:
    """What our manifest says; as it has its own hash, it says what `dataset.write` wrote."""
    path = inside(root, MANIFEST)
    manifest = read_json(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        said = f"schema_version is {manifest.get('schema_version')!r}, want {SCHEMA_VERSION}"
        raise DatasetError(f"{path}: {said}. Write the dataset with this version of fresnel")
    try:
        records = [Record(**said) for said in manifest["objects"]]
        sound = content_hash(records, manifest) == manifest["content_hash"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        sound = False
    if not sound:
        raise DatasetChanged(path, "edited")
    return manifest, records


def scan(root: Path) -> list[Record]:
    """The records of a folder of the original's layout."""
    files: dict[str, dict[str, str]] = {folder: {} for folder in image_folders(root)}
    for path, digest in digests(root, data_files(root)).items():
        folder, _, file = path.partition("/")
        files[folder][file] = digest
    for folder, found in files.items():
        if "input.png" not in found:
            raise DatasetError(f"{root / folder}: has no input.png. Restore or remove this folder")
    return [Record(folder, folder, "", found) for folder, found in files.items()]


def content_hash(records: Sequence[Record], manifest: dict[str, Any]) -> str:
    """`hash_of` every data file of stored records and, for our layout, all else that is read of the
    manifest: sizes, background, names, attributions and ``meta`` (splits, cameras, assumptions)."""
    files = {path: digest for record in records for path, digest in record.paths.items()}
    if not manifest:
        return hash_of(files)
    said = {key: manifest[key] for key in ("image_size", "views_per_object", "meta")}
    said["background"] = [float(value) for value in manifest["background"]]
    said["objects"] = [[r.name, r.folder, r.attribution] for r in records]
    return hash_of(files, {MANIFEST: said})


def hash_of(files: dict[str, str], more: dict[str, Any] | None = None) -> str:
    """sha256 over the sorted lines "path, NUL, sha256 of the bytes", then those of JSON values."""
    lines = sorted(f"{path}\0{digest}" for path, digest in files.items())
    lines += [f"{name}\0{sha256(canonical_json(said))}" for name, said in (more or {}).items()]
    return "sha256:" + sha256("\n".join(lines).encode())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_checked(root: Path, file: str, digest: str) -> bytes:
    """The bytes of a file whose sha256 was recorded: what is decoded is what was hashed."""
    path = inside(root, file)
    if not path.is_file():
        raise DatasetChanged(path, "removed")
    data = read_bytes(path)
    if sha256(data) != digest:
        raise DatasetChanged(path)
    return data


def digests(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """sha256 of files by path relative to ``root``; those that are gone are left out."""
    ordered = [path for path in sorted(set(paths)) if inside(root, path).is_file()]
    return {path: _files.sha256(root / path) for path in ordered}


def seal(
    folder: Path,
    records: list[Record],
    image_size: int,
    views: int,
    background: Sequence[float],
    meta: dict[str, Any],
) -> None:
    """Give a folder of finished records its manifest."""
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "background": list(background),
        "image_size": image_size,
        "views_per_object": views,
        "meta": meta,
    }
    manifest["content_hash"] = content_hash(records, manifest)
    manifest["objects"] = [vars(record) for record in records]
    _files.flush(folder)  # what a manifest names is on the disk before it
    _files.write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse to replace what isn't a dataset of ours, or is one and wasn't to be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target.is_dir() and is_ours(target)):
        raise DatasetError(f"{target}: exists and is not of ours. Choose another path")
    if not overwrite:
        raise DatasetError(f"{target}: exists. Choose another path or pass overwrite=True")


@contextlib.contextmanager
def making(target: Path, *, overwrite: bool, reuse: bool) -> Iterator[bool]:
    """The sole right to make the dataset `target`: whether that is to be done.  Who wants the same
    waits; what a process that was killed left beside the target is put back or removed first.

    Args:
        reuse: not if a dataset is there.
    """
    lock, there = _beside(target, "lock"), target / MANIFEST
    # with a lock file there, one is at work or was killed
    if reuse and there.is_file() and not (lock.exists() and os.access(target.parent, os.W_OK)):
        yield False
        return
    with _files.locked(lock, f"{target}: another process makes it; waiting"):
        try:
            _put_back(target)
            for left in _files.abandoned(target.parent, target.name):
                _files.remove(left)
            if wanted := not (reuse and there.is_file()):
                check_target(target, overwrite)
            yield wanted
        finally:
            lock.unlink(missing_ok=True)


def recover(target: Path) -> None:
    """Put a dataset back that isn't there because a process was killed while it replaced it."""
    if not target.exists() and any(_files.abandoned(target.parent, target.name, "replaced")):
        with contextlib.suppress(OSError), _files.locked(_beside(target, "lock")):
            _put_back(target)
            _beside(target, "lock").unlink()


def _put_back(target: Path) -> None:
    for old in _files.abandoned(target.parent, target.name, "replaced"):
        if not target.exists() and is_ours(old):
            old.rename(target)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of ``target`` at the end, and goes if anything fails."""
    try:
        with _files.scratch(target, folder=True) as partial:
            yield partial
            put(partial, target)
    except BrokenProcessPool:
        said = "a worker process was killed, perhaps for want of memory"
        raise DatasetError(f"{target}: {said}. Nothing was kept") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        said = "the disk is full; free some space or write less" if full else str(error)
        raise DatasetError(f"{target}: can't be written ({said}). Nothing was kept") from error


def put(made: Path, target: Path) -> None:
    """Put a finished set in the place of ``target``, in one step where the system has one; what was
    there is removed.  The very same set, whole, is left in peace: others may be reading it."""
    if not target.exists() or not any(target.iterdir()):
        made.rename(target)
        return
    with contextlib.suppress(DatasetError):
        (said, _), (now, records) = parse_manifest(made), parse_manifest(target)
        if said["content_hash"] == now["content_hash"]:
            for path, digest in [pair for r in records for pair in r.paths.items()]:
                read_checked(target, path, digest)
            _files.remove(made)
            return
    if not _files.exchange(made, target):
        old = _beside(target, f"replaced-{uuid.uuid4().hex[:12]}")
        target.rename(old)
        try:
            made.rename(target)
        except OSError:
            old.rename(target)
            raise
        old.rename(made)  # no longer to be put back
    _files.remove(made)
