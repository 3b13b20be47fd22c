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
from collections.abc import Mapping
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
_PROPERTY = re.compile(r"^(model|name|creator|category|license)#(\d+)\s*=\s*(.*)$", re.MULTILINE)
_ASSETS = Path(__file__).parents[1] / "assets"
_NAMED = {
    ".obj": re.compile(rb"^\s*mtllib\s+(.+?)\s*$", re.MULTILINE),
    ".mtl": re.compile(rb"^\s*(?:map_\w+|bump|disp|decal|refl|norm)\s+(.+?)\s*$", re.MULTILINE),
    ".gltf": re.compile(rb'"uri"\s*:\s*"(?!data:)([^"]+)"'),
}


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
            wanted = PurePosixPath(self.member)
            return _unzip(self.source, str(wanted.parent / name if name else wanted), MAX_BYTES)[1]
        try:
            named = (name or self.source.name).strip().replace("\\", "/")
            return read_bytes(inside(self.source.parent, named) if name else self.source, MAX_BYTES)
        except DatasetError:
            raise
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.source}: refuses {name!r}: {error}") from None


def _unzip(source: Path, wanted: str = "", limit: int = 0) -> tuple[list[str], bytes]:
    """The names in a zip file, and one member: at most so many bytes, whatever size it states."""
    data = b""
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            if wanted and wanted not in names:  # where these objects come from, case is ignored
                folded = {name.lower(): name for name in names}
                if wanted.lower() not in folded:
                    raise DatasetError(f"{source}: has no member {wanted!r}")
                wanted = folded[wanted.lower()]
            if wanted:
                with archive.open(wanted) as stream:
                    data = stream.read(limit + 1)
    except DatasetError:
        raise
    except Exception as error:  # each compression has errors of its own
        raise DatasetError(f"{source}: can't be read as a zip file ({error})") from error
    if len(data) > limit:
        raise DatasetError(f"{source}: {wanted!r} has more than {limit} bytes")
    return names, data


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


def _asset(source: Path, file: str, said: Mapping[str, str], member: str = "") -> Asset:
    """An object by what a list says of it."""
    path, licence = PurePosixPath(file), said.get("licence", said.get("license", "unknown"))
    by = " ".join(f"by {said[key]}" for key in ("creator", "copyright") if key in said)
    return Asset(
        name=str(path.with_suffix("")),
        source=source,
        split=said.get("split", "all"),
        licence=licence,
        attribution=f"{said.get('name', path.stem)} {by or 'by an unknown author'} ({licence})",
        category=said.get("category", ""),
        member=member,
        origin=said.get("source", ""),
    )


def embedded_assets(split: str | None = None) -> list[Asset]:
    """The 24 CC0 objects that come with the library: 16 to "train" on, 8 "held_out"."""
    listed = json.loads((_ASSETS / "objects.json").read_text())
    known = [{**e, "name": e["title"], "source": e["source"].partition(": ")[2]} for e in listed]
    return [_asset(_ASSETS / e["file"], e["file"], e) for e in known if split in (None, e["split"])]


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
    source, found = Path(path), list[Asset]()
    suffix = source.suffix.lower()
    if source.is_dir():
        if (source / "manifest.json").is_file():
            return find_assets(source / "manifest.json")
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
    elif suffix in (".sh3f", ".zip"):
        names, _ = _unzip(source)
        meshes = [name for name in names if name.lower().endswith(MESHES)]
        if suffix == ".sh3f" and _CATALOGUE in names:
            found = _catalogued(source, meshes)
        elif "manifest.json" in names:
            _, data = _unzip(source, "manifest.json", _MAX_LIST_BYTES)
            found = _listed(source, data, archived=True)
        else:
            found = [Asset(str(Path(mesh).with_suffix("")), source, member=mesh) for mesh in meshes]
    names = [asset.name.rsplit("/", 1)[-1] for asset in found]  # short ones, where they are unique
    names = names if len({*names}) == len(names) else [asset.name for asset in found]
    if len({*names}) < len(names):
        names = [f"{asset.source.stem}/{asset.name}" for asset in found]
    return [replace(asset, name=name) for asset, name in zip(found, names, strict=True)]


def _listed(manifest: Path, data: bytes, archived: bool = False) -> list[Asset]:
    """The objects of a JSON manifest: of files beside it, or of members of its archive."""
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{manifest}: not a readable JSON list ({error})") from None
    entries = entries.get("assets") if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DatasetError(f'{manifest}: want a JSON list of objects, or {{"assets": [...]}}')
    found = []
    for entry in entries:
        said = {key: value for key, value in entry.items() if isinstance(value, str)}
        file, source = said.get("file", ""), manifest
        if not file.lower().endswith(MESHES):
            raise DatasetError(f'{manifest}: "file" of an entry, {file!r}, is not one of {MESHES}')
        if not archived:
            try:
                source = inside(manifest.parent, file)
            except (OSError, ValueError) as error:
                raise DatasetError(f"{manifest}: refuses {file!r}: {error}") from None
            if not source.is_file():
                raise DatasetError(f"{source}: no such file, but {manifest.name} lists it")
        found.append(_asset(source, file, said, file if archived else ""))
    return found


def _catalogued(source: Path, meshes: list[str]) -> list[Asset]:
    """The models that the Java properties file of a Sweet Home 3D library describes."""
    _, data = _unzip(source, _CATALOGUE, _MAX_LIST_BYTES)
    entries, assets = dict[str, dict[str, str]](), dict[str, Asset]()
    for key, number, value in _PROPERTY.findall(data.decode("latin-1").replace("\\\n", "")):
        entries.setdefault(number, {})[key] = value.strip()
    known = set(meshes)
    for entry in entries.values():
        member = entry.get("model", "").lstrip("/")
        if member in known:
            said = {**entry, "source": f"{source.stem}/{member}"}
            assets[member] = _asset(source, member, said, member)
    return list(assets.values())
