"""Objects to make data from: the 24 that come with the library, and other people's.

Folders, zip files, Sweet Home 3D libraries (.sh3f) and JSON manifests of glTF, GLB and OBJ files.
Nothing outside the folder or archive is read, whatever a manifest, a .gltf or a .mtl says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sized
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote

from fresnel.data.images import DatasetError
from fresnel.host.files import inside, sha256

MESHES = (".glb", ".gltf", ".obj")
MAX_BYTES = 1 << 28
"""Of a mesh, or of a file that it names."""
_MAX_LIST_BYTES = 1 << 26
_MAX_OBJECTS = 100_000
_ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Asset:
    """A 3D object, where it lies, and whom to thank for it.

    ``source`` is a mesh file, or a zip file with ``member`` naming the mesh inside.  ``origin``
    names the model in the collection it was taken from, so that one object can be known again in
    two sets.
    """

    name: str
    source: Path
    split: str = "all"
    licence: str = "unknown"
    attribution: str = "unknown"
    category: str = ""
    member: str = ""
    origin: str = ""

    def read(self, name: str | None = None) -> bytes:
        """The mesh itself, or a file that it names, looked for in its own folder or below.

        Raises:
            DatasetError: if there is no such file or member, or it is damaged or too large.
        """
        if self.member:
            wanted = self.member if name is None else str(PurePosixPath(self.member).parent / name)
            with _unzipped(self.source) as archive:
                data = _member(archive, wanted, MAX_BYTES)
        else:
            wanted = str(self.source)
            try:
                file = self.source
                if name is not None:
                    file = inside(file.parent, name.strip().replace("\\", "/"))
                if not file.is_file():
                    raise DatasetError(f"{file}: no such file (object {self.name!r})")
                with file.open("rb") as stream:
                    data = stream.read(MAX_BYTES + 1)
            except (OSError, ValueError) as error:
                if isinstance(error, DatasetError):
                    raise
                raise DatasetError(f"{self.source}: refuses {name!r}: {error}") from None
        if len(data) > MAX_BYTES:
            raise DatasetError(f"{wanted}: larger than {MAX_BYTES >> 20} MB. Simplify it")
        return data


@contextlib.contextmanager
def _unzipped(source: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(source) as archive:
            yield archive
    except DatasetError:
        raise
    except (
        OSError,
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        RuntimeError,  # encrypted, or compressed in another way
        EOFError,
        ValueError,
        zlib.error,
    ) as error:
        raise DatasetError(f"{source}: can't be read as a zip file ({error})") from error


def _member(archive: zipfile.ZipFile, wanted: str, limit: int) -> bytes:
    """At most limit + 1 bytes, whatever size the archive states."""
    try:
        info = archive.getinfo(wanted)
    except KeyError:  # file systems that these objects come from ignore case
        folded = {entry.lower(): entry for entry in archive.namelist()}
        if wanted.lower() not in folded:
            raise DatasetError(f"{archive.filename}: has no member {wanted!r}") from None
        info = archive.getinfo(folded[wanted.lower()])
    with archive.open(info) as stream:
        return stream.read(limit + 1)


_NAMED = {
    ".obj": re.compile(rb"^\s*mtllib\s+(.+?)\s*$", re.MULTILINE),
    ".mtl": re.compile(rb"^\s*(?:map_\w+|bump|disp|decal|refl|norm)\s+(.+?)\s*$", re.MULTILINE),
    ".gltf": re.compile(rb'"uri"\s*:\s*"(?!data:)([^"]+)"'),
}


def content_of(source: Path, known: dict[Path, str]) -> str:
    """sha256 of a file and, through the materials, of all that it names; "" where there is none.

    Args:
        known: what was found before, of files that many objects share.
    """
    if source in known or not source.is_file():
        return known.get(source, "")
    known[source] = sha256(source)  # what a file that names itself finds
    digest = hashlib.sha256(known[source].encode())
    pattern = _NAMED.get(source.suffix.lower())
    for found in sorted(set(pattern.findall(source.read_bytes()))) if pattern else ():
        text = found.decode("utf-8", "replace")
        for name in sorted({text, unquote(text), *text.split()}):  # options may stand before it
            with contextlib.suppress(ValueError, OSError):  # read by nobody: it leads out
                file = inside(source.parent, name.replace("\\", "/"))
                digest.update(f"{name}\0{content_of(file, known)}\n".encode())
    known[source] = digest.hexdigest()
    return known[source]


def embedded_assets(split: Literal["train", "held_out"] | None = None) -> list[Asset]:
    """The 24 CC0 objects that come with the library: 16 to train on, 8 held out."""
    entries = json.loads((_ASSETS / "objects.json").read_text())
    return [
        Asset(
            name=entry["name"],
            source=_ASSETS / entry["file"],
            split=entry["split"],
            licence=entry["licence"],
            attribution=f"{entry['title']} by {entry['creator']} ({entry['licence']})",
            category=entry["category"],
            origin=entry["source"].partition(": ")[2],
        )
        for entry in entries
        if split in (None, entry["split"])
    ]


def find_assets(path: str | Path) -> list[Asset]:
    """The objects that a file or folder holds; none if it is something else.

    * a .glb, .gltf or .obj file;
    * a .zip file: what its manifest.json lists, or every mesh in it;
    * a .sh3f file: what its catalogue lists, with names, authors and categories;
    * a .json manifest, or a folder with a manifest.json: a list (or {"assets": [...]}) of
      {"file": ..., "name", "split", "license", "creator", "copyright", "category": optional};
    * any other folder: every mesh, .sh3f and .zip in it or below it.

    Splits that nobody states are "all", licences "unknown".  A local copy of Objaverse is such a
    folder (tested on files of our own: the data set itself, several TB, has not been tried).

    Raises:
        DatasetError: if a list is damaged, leads out of its folder, or names too many objects.
    """
    source = Path(path)
    if source.is_dir():
        if (source / "manifest.json").is_file():
            return _listed(source / "manifest.json")
        found: list[Asset] = []
        kinds = (*MESHES, ".sh3f", ".zip")
        for file in sorted(p for p in source.rglob("*") if p.suffix.lower() in kinds):
            if not file.resolve().is_relative_to(source.resolve()) or not file.is_file():
                continue
            if file.suffix.lower() in MESHES:
                relative = file.relative_to(source).with_suffix("").as_posix()
                found.append(Asset(relative, file))
            else:
                found += find_assets(file)
            _check_count(source, found)
        return _named_apart(found)
    suffix = source.suffix.lower()
    if suffix in MESHES:
        return [Asset(source.stem, source)]
    if suffix == ".json":
        return _listed(source)
    if suffix == ".sh3f":
        return _library(source)
    return _archive(source) if suffix == ".zip" else []


def _check_count(source: Path, found: Sized) -> None:
    if len(found) > _MAX_OBJECTS:
        raise DatasetError(f"{source}: more than {_MAX_OBJECTS} objects. Split it up")


def _named_apart(assets: list[Asset]) -> list[Asset]:
    """Short names where they are unique: the last part of a path."""
    short = [asset.name.rsplit("/", 1)[-1] for asset in assets]
    names = short if len(set(short)) == len(short) else [asset.name for asset in assets]
    if len(set(names)) < len(names):
        names = [f"{asset.source.stem}/{name}" for asset, name in zip(assets, names, strict=True)]
    return [replace(asset, name=name) for asset, name in zip(assets, names, strict=True)]


def _listed(manifest: Path, archive: zipfile.ZipFile | None = None) -> list[Asset]:
    """The objects of a JSON manifest: of files beside it, or of members of its archive."""
    try:
        if archive:
            data = _member(archive, "manifest.json", _MAX_LIST_BYTES)
        else:
            with manifest.open("rb") as stream:
                data = stream.read(_MAX_LIST_BYTES + 1)
        if len(data) > _MAX_LIST_BYTES:
            raise ValueError(f"more than {_MAX_LIST_BYTES} bytes")
        entries = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{manifest}: not a readable JSON list ({error})") from None
    entries = entries.get("assets") if isinstance(entries, dict) else entries
    if not isinstance(entries, list):
        raise DatasetError(f'{manifest}: want a JSON list of objects, or {{"assets": [...]}}')
    _check_count(manifest, entries)
    return _named_apart([_entry(manifest, entry, archive is not None) for entry in entries])


def _entry(manifest: Path, entry: object, archived: bool) -> Asset:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise DatasetError(f'{manifest}: an entry has no "file"')
    text = {key: value for key, value in entry.items() if isinstance(value, str)}
    file = PurePosixPath(text["file"])
    try:
        source = inside(manifest.parent, text["file"])
    except ValueError:
        source = None
    if source is None or ".." in file.parts or "\0" in text["file"]:
        raise DatasetError(f"{manifest}: refuses {text['file']!r}: it leads out of the folder")
    if file.suffix.lower() not in MESHES:
        raise DatasetError(f"{manifest}: {text['file']!r} is not one of {MESHES}")
    if not archived and not source.is_file():
        raise DatasetError(f"{source}: no such file, but {manifest.name} lists it")
    licence = text.get("licence", text.get("license", "unknown"))
    by = " ".join(f"by {text[k]}" for k in ("creator", "copyright") if k in text)
    return Asset(
        name=file.with_suffix("").as_posix(),
        source=manifest if archived else source,
        split=text.get("split", "all"),
        licence=licence,
        attribution=f"{text.get('name', file.stem)} {by or 'by an unknown author'} ({licence})",
        category=text.get("category", ""),
        member=text["file"] if archived else "",
        origin=text.get("source", ""),
    )


def _archive(source: Path) -> list[Asset]:
    with _unzipped(source) as archive:
        names = archive.namelist()
        if "manifest.json" in names:
            return _listed(source, archive)
        _check_count(source, names)
    meshes = [name for name in names if name.lower().endswith(MESHES)]
    return _named_apart([Asset(str(Path(m).with_suffix("")), source, member=m) for m in meshes])


_PROPERTY = re.compile(r"^(model|name|creator|category|license)#(\d+)\s*=\s*(.*)$", re.MULTILINE)


def _library(source: Path) -> list[Asset]:
    """A Sweet Home 3D library: a zip file with a Java properties file that describes models."""
    catalogue = "PluginFurnitureCatalog.properties"
    with _unzipped(source) as archive:
        members = set(archive.namelist())
        if catalogue not in members:
            return _archive(source)
        data = _member(archive, catalogue, _MAX_LIST_BYTES)
    if len(data) > _MAX_LIST_BYTES:
        raise DatasetError(f"{source}: {catalogue} is too large")
    found: dict[str, dict[str, str]] = {}
    for key, number, value in _PROPERTY.findall(data.decode("latin-1").replace("\\\n", "")):
        found.setdefault(number, {})[key] = value.strip()
    _check_count(source, found)
    assets: dict[str, Asset] = {}
    for entry in found.values():
        member = entry.get("model", "").lstrip("/")
        if member not in members or not member.lower().endswith(MESHES):
            continue
        licence, author = entry.get("license", "unknown"), entry.get("creator", "unknown")
        assets[member] = Asset(
            name=str(Path(member).with_suffix("")),
            source=source,
            licence=licence,
            attribution=f"{entry.get('name', member)} by {author} ({licence})",
            category=entry.get("category", ""),
            member=member,
            origin=f"{source.stem}/{member}",
        )
    return _named_apart(list(assets.values()))
