"""Objects to make data from: the 24 that come with the library, and other people's.

Folders, zip files, Sweet Home 3D libraries (.sh3f) and JSON manifests of glTF, GLB and OBJ files.
Nothing outside the folder or archive is read, whatever a manifest, a .gltf or a .mtl says.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from fresnel.data.images import DatasetError
from fresnel.objects.surface import srgb_to_linear

_MAX_MESH_BYTES = 1 << 27
_MAX_OBJECTS = 100_000
_MAX_LIST_BYTES = 1 << 26
MESHES = (".glb", ".gltf", ".obj")
_ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Packed:
    """A mesh in a zip file, beside the materials and textures that it names."""

    source: Path
    member: str

    def read(self, name: str | None = None) -> bytes:
        """The mesh itself, or a file it names, looked for from its own folder.

        Raises:
            DatasetError: if there is no such member, it is damaged or too large.
        """
        wanted = self.member if name is None else str(PurePosixPath(self.member).parent / name)
        try:
            with zipfile.ZipFile(self.source) as archive:
                try:
                    info = archive.getinfo(wanted)
                except KeyError:  # file systems that these objects come from ignore case
                    folded = {entry.lower(): entry for entry in archive.namelist()}
                    info = archive.getinfo(folded[wanted.lower()])
                if info.file_size > _MAX_MESH_BYTES:
                    raise DatasetError(f"{self.source}: {wanted} is too large")
                return archive.read(info)
        except KeyError:
            raise DatasetError(f"{self.source}: has no member {wanted!r}") from None
        except _UNZIPPING as error:
            raise DatasetError(f"{self.source}: can't be read as a zip file ({error})") from error


_UNZIPPING = (
    OSError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    RuntimeError,  # encrypted
    NotImplementedError,  # compressed in another way
    EOFError,
    ValueError,
    zlib.error,
)


@dataclass(frozen=True)
class Asset:
    """A 3D object, where it lies, and whom to thank for it.

    ``source`` is a mesh file, or a zip file with ``member`` naming the mesh inside.
    ``srgb_factors``: the GLB's base colour factors are sRGB (against the standard) and are
    converted by `load`.  ``origin`` names the model in the collection it was taken from, so that
    one object can be known again in two sets.
    """

    name: str
    source: Path
    split: str
    licence: str
    attribution: str
    category: str = ""
    member: str = ""
    srgb_factors: bool = False
    origin: str = ""

    def load(self) -> Path | bytes | Packed:
        """What `meshes.load` takes: a file's path, the bytes of a GLB, or a mesh in a zip file.

        Raises:
            DatasetError: if the file or the zip's member is missing, damaged or too large.
        """
        if not self.member:
            if not self.source.is_file():
                raise DatasetError(f"{self.source}: no such file (object {self.name!r})")
            return self.source
        packed = Packed(self.source, self.member)
        if not self.member.lower().endswith(".glb"):
            return packed
        data = packed.read()
        return linear_factors(data) if self.srgb_factors else data


def linear_factors(glb: bytes) -> bytes:
    """A GLB whose base colour factors are sRGB values, made to hold linear ones as it should."""
    try:
        (size,) = struct.unpack_from("<I", glb, 12)
        header = json.loads(glb[20 : 20 + size])
        for material in header.get("materials", []):
            pbr = material.get("pbrMetallicRoughness", {})
            if "baseColorFactor" in pbr:
                r, g, b, a = pbr["baseColorFactor"]
                pbr["baseColorFactor"] = [*srgb_to_linear(np.array([r, g, b])).tolist(), a]
    except (struct.error, ValueError, AttributeError, TypeError) as error:
        raise DatasetError(f"mesh bytes: not a binary glTF (GLB) ({error})") from None
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    rest = glb[20 + size :]
    total = 20 + len(text) + len(rest)
    return b"".join([glb[:8], struct.pack("<II", total, len(text)), b"JSON", text, rest])


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


def zip_assets(path: str | Path, split: str | None = None) -> list[Asset]:
    """The objects of a zip file of GLBs with a manifest.json (the furniture set).

    Args:
        split: "train", "val", "test", or None for all.
    """
    source = Path(path)
    try:
        with zipfile.ZipFile(source) as archive:
            if archive.getinfo("manifest.json").file_size > _MAX_LIST_BYTES:
                raise DatasetError(f"{source}: its manifest.json is too large")
            entries = json.loads(archive.read("manifest.json"))
        assets = [
            Asset(
                name=Path(entry["file"]).stem,
                source=source,
                split=entry["split"],
                licence=entry["license"],
                attribution=f"{entry['name']} by {entry['creator']}, {entry['copyright']} "
                f"({entry['license']})",
                category=entry["category"],
                member=entry["file"],
                srgb_factors=True,
                origin=entry.get("source", ""),
            )
            for entry in entries
            if split in (None, entry["split"])
        ]
    except FileNotFoundError:
        raise DatasetError(f"{source}: no such file") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{source}: can't be read as a zip file ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{source}: its manifest.json is missing or damaged ({error})") from None
    if not assets:
        raise DatasetError(f"{source}: holds no object of split {split!r}")
    return assets


# --- other people's objects --------------------------------------------------------------------


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
                found.append(_unlabelled(relative, file))
            else:
                found += find_assets(file)
            _check_count(source, found)
        return _named_apart(found)
    suffix = source.suffix.lower()
    if suffix in MESHES:
        return [_unlabelled(source.stem, source)]
    if suffix == ".json":
        return _listed(source)
    if suffix == ".sh3f":
        return _library(source)
    return _archive(source) if suffix == ".zip" else []


def _unlabelled(name: str, source: Path, member: str = "") -> Asset:
    return Asset(name, source, "all", "unknown", "unknown", member=member)


def _check_count(source: Path, found: Iterable[Any]) -> None:
    if len(list(found)) > _MAX_OBJECTS:
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
        size = archive.getinfo("manifest.json").file_size if archive else manifest.stat().st_size
        if size > _MAX_LIST_BYTES:
            raise DatasetError(f"{manifest}: a manifest of {size} bytes is too large")
        entries = json.loads(archive.read("manifest.json") if archive else manifest.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{manifest}: not a readable JSON list ({error})") from None
    entries = entries.get("assets") if isinstance(entries, dict) else entries
    if not isinstance(entries, list):
        raise DatasetError(f'{manifest}: want a JSON list of objects, or {{"assets": [...]}}')
    _check_count(manifest, entries)
    assets = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            raise DatasetError(f'{manifest}: an entry has no "file"')
        text = {key: str(value) for key, value in entry.items() if isinstance(value, str)}
        file = PurePosixPath(text["file"])
        if file.is_absolute() or ".." in file.parts or "\0" in text["file"]:
            raise DatasetError(f"{manifest}: refuses {text['file']!r}: it leads out of the folder")
        if file.suffix.lower() not in MESHES:
            raise DatasetError(f"{manifest}: {text['file']!r} is not one of {MESHES}")
        source = manifest if archive else manifest.parent / file
        if not archive and not source.resolve().is_relative_to(manifest.parent.resolve()):
            raise DatasetError(f"{manifest}: refuses {text['file']!r}: it leads out of the folder")
        if not archive and not source.is_file():
            raise DatasetError(f"{source}: no such file, but {manifest.name} lists it")
        licence = text.get("licence", text.get("license", "unknown"))
        title = text.get("name", file.stem)
        by = " ".join(f"by {text[k]}" for k in ("creator", "copyright") if k in text)
        assets.append(
            Asset(
                name=file.with_suffix("").as_posix(),
                source=source,
                split=text.get("split", "all"),
                licence=licence,
                attribution=f"{title} {by or 'by an unknown author'} ({licence})",
                category=text.get("category", ""),
                member=text["file"] if archive else "",
                origin=text.get("source", ""),
            )
        )
    return _named_apart(assets)


def _archive(source: Path) -> list[Asset]:
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            if "manifest.json" in names:
                entries = _listed(source, archive)
                # The furniture set's factors are sRGB, against the standard: see `zip_assets`.
                furniture = all(asset.origin.endswith(".obj") for asset in entries)
                return zip_assets(source) if entries and furniture else entries
            _check_count(source, names)
            meshes = [name for name in names if name.lower().endswith(MESHES)]
    except _UNZIPPING as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{source}: can't be read as a zip file ({error})") from error
    return _named_apart([_unlabelled(str(Path(m).with_suffix("")), source, m) for m in meshes])


_PROPERTY = re.compile(r"^(model|name|creator|category|license)#(\d+)\s*=\s*(.*)$", re.MULTILINE)


def _library(source: Path) -> list[Asset]:
    """A Sweet Home 3D library: a zip file with a Java properties file that describes models."""
    catalogue = "PluginFurnitureCatalog.properties"
    try:
        with zipfile.ZipFile(source) as archive:
            if catalogue not in archive.namelist():
                return _archive(source)
            if archive.getinfo(catalogue).file_size > _MAX_LIST_BYTES:
                raise DatasetError(f"{source}: {catalogue} is too large")
            text = archive.read(catalogue).decode("latin-1").replace("\\\n", "")
            members = set(archive.namelist())
    except _UNZIPPING as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{source}: can't be read as a zip file ({error})") from error
    found: dict[str, dict[str, str]] = {}
    for key, number, value in _PROPERTY.findall(text):
        found.setdefault(number, {})[key] = value.strip()
    _check_count(source, found)
    assets: dict[str, Asset] = {}
    for entry in found.values():
        member = entry.get("model", "").lstrip("/")
        if member not in members or not member.lower().endswith(MESHES):
            continue
        licence = entry.get("license", "unknown")
        assets[member] = Asset(
            name=str(Path(member).with_suffix("")),
            source=source,
            split="all",
            licence=licence,
            attribution=f"{entry.get('name', member)} by {entry.get('creator', 'unknown')} "
            f"({licence})",
            category=entry.get("category", ""),
            member=member,
            origin=f"{source.stem}/{member}",
        )
    return _named_apart(list(assets.values()))
