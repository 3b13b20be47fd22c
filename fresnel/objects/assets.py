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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from fresnel.data.images import DatasetError, read_bytes
from fresnel.host.files import inside, sha256

MESHES = (".glb", ".gltf", ".obj")
MAX_BYTES = 1 << 28
"""Of a mesh, or of a file that it names."""
_MAX_LIST_BYTES = 1 << 26
_CATALOGUE = "PluginFurnitureCatalog.properties"
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
                return _member(archive, wanted, MAX_BYTES)
        try:
            file = self.source
            if name is not None:
                file = inside(file.parent, name.strip().replace("\\", "/"))
            return read_bytes(file, MAX_BYTES)
        except DatasetError:
            raise
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.source}: refuses {name!r}: {error}") from None


@contextlib.contextmanager
def _unzipped(source: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(source) as archive:
            yield archive
    except DatasetError:
        raise
    except Exception as error:  # each compression has errors of its own
        raise DatasetError(f"{source}: can't be read as a zip file ({error})") from error


def _member(archive: zipfile.ZipFile, wanted: str, limit: int) -> bytes:
    """The bytes of a member, at most ``limit`` of them, whatever size the archive states."""
    try:
        info = archive.getinfo(wanted)
    except KeyError:  # file systems that these objects come from ignore case
        folded = {entry.lower(): entry for entry in archive.namelist()}
        if wanted.lower() not in folded:
            raise DatasetError(f"{archive.filename}: has no member {wanted!r}") from None
        info = archive.getinfo(folded[wanted.lower()])
    with archive.open(info) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise DatasetError(f"{archive.filename}: {wanted!r} has more than {limit} bytes")
    return data


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


def embedded_assets(split: str | None = None) -> list[Asset]:
    """The 24 CC0 objects that come with the library: 16 to "train" on, 8 "held_out"."""
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
        for entry in json.loads((_ASSETS / "objects.json").read_text())
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
        DatasetError: if a list is damaged, or leads out of its folder.
    """
    source = Path(path)
    suffix = source.suffix.lower()
    if source.is_dir():
        if (source / "manifest.json").is_file():
            return find_assets(source / "manifest.json")
        found: list[Asset] = []
        kinds = (*MESHES, ".sh3f", ".zip")
        for file in sorted(p for p in source.rglob("*") if p.suffix.lower() in kinds):
            if file.is_file() and file.resolve().is_relative_to(source.resolve()):
                name = file.relative_to(source).with_suffix("").as_posix()
                mesh = file.suffix.lower() in MESHES
                found += [Asset(name, file)] if mesh else find_assets(file)
    elif suffix in MESHES:
        found = [Asset(source.stem, source)]
    elif suffix == ".json":
        found = _listed(source, read_bytes(source, _MAX_LIST_BYTES))
    else:
        found = _packed(source) if suffix in (".sh3f", ".zip") else []
    return _named_apart(found)


def _named_apart(assets: list[Asset]) -> list[Asset]:
    """Short names where they are unique: the last part of a path."""
    short = [asset.name.rsplit("/", 1)[-1] for asset in assets]
    names = short if len(set(short)) == len(short) else [asset.name for asset in assets]
    if len(set(names)) < len(names):
        names = [f"{asset.source.stem}/{name}" for asset, name in zip(assets, names, strict=True)]
    return [replace(asset, name=name) for asset, name in zip(assets, names, strict=True)]


def _listed(manifest: Path, data: bytes, archived: bool = False) -> list[Asset]:
    """The objects of a JSON manifest: of files beside it, or of members of its archive."""
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{manifest}: not a readable JSON list ({error})") from None
    entries = entries.get("assets") if isinstance(entries, dict) else entries
    if not isinstance(entries, list):
        raise DatasetError(f'{manifest}: want a JSON list of objects, or {{"assets": [...]}}')
    return [_entry(manifest, entry, archived) for entry in entries]


def _entry(manifest: Path, entry: object, archived: bool) -> Asset:
    pairs = entry.items() if isinstance(entry, dict) else ()
    text = {key: value for key, value in pairs if isinstance(value, str)}
    if "file" not in text:
        raise DatasetError(f'{manifest}: an entry has no "file"')
    file, source = PurePosixPath(text["file"]), manifest
    if file.suffix.lower() not in MESHES:
        raise DatasetError(f"{manifest}: {text['file']!r} is not one of {MESHES}")
    if not archived:
        try:
            source = inside(manifest.parent, text["file"])
        except (OSError, ValueError):
            raise DatasetError(
                f"{manifest}: refuses {text['file']!r}: it leads out of the folder"
            ) from None
        if not source.is_file():
            raise DatasetError(f"{source}: no such file, but {manifest.name} lists it")
    licence = text.get("licence", text.get("license", "unknown"))
    by = " ".join(f"by {text[k]}" for k in ("creator", "copyright") if k in text)
    return Asset(
        name=file.with_suffix("").as_posix(),
        source=source,
        split=text.get("split", "all"),
        licence=licence,
        attribution=f"{text.get('name', file.stem)} {by or 'by an unknown author'} ({licence})",
        category=text.get("category", ""),
        member=text["file"] if archived else "",
        origin=text.get("source", ""),
    )


def _packed(source: Path) -> list[Asset]:
    """What a zip file's catalogue or manifest lists, or else every mesh in it."""
    with _unzipped(source) as archive:
        members = archive.namelist()
        if source.suffix.lower() == ".sh3f" and _CATALOGUE in members:
            return _catalogued(source, members, _member(archive, _CATALOGUE, _MAX_LIST_BYTES))
        if "manifest.json" in members:
            return _listed(source, _member(archive, "manifest.json", _MAX_LIST_BYTES), True)
    meshes = [name for name in members if name.lower().endswith(MESHES)]
    return [Asset(str(Path(mesh).with_suffix("")), source, member=mesh) for mesh in meshes]


_PROPERTY = re.compile(r"^(model|name|creator|category|license)#(\d+)\s*=\s*(.*)$", re.MULTILINE)


def _catalogued(source: Path, members: list[str], data: bytes) -> list[Asset]:
    """The models that the Java properties file of a Sweet Home 3D library describes."""
    found: dict[str, dict[str, str]] = {}
    for key, number, value in _PROPERTY.findall(data.decode("latin-1").replace("\\\n", "")):
        found.setdefault(number, {})[key] = value.strip()
    meshes = {name for name in members if name.lower().endswith(MESHES)}
    assets: dict[str, Asset] = {}
    for entry in found.values():
        member = entry.get("model", "").lstrip("/")
        if member in meshes:
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
    return list(assets.values())
