"""Objects to make data from: the 24 that come with the library, and other people's.

Folders, zip files, Sweet Home 3D libraries (.sh3f) and JSON manifests of glTF, GLB and OBJ files.
Nothing outside the folder or archive is read, whatever a manifest, a .gltf or a .mtl says.
"""

import contextlib
import functools
import hashlib
import json
import os
import posixpath
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from fresnel.data.images import DatasetError, read_bytes
from fresnel.host.files import below, from_json, inside, sha256

MESHES = (".glb", ".gltf", ".obj")
MAX_BYTES = 1 << 28
"""Of a mesh, or of a file that it names."""
_MAX_LIST_BYTES = 1 << 26
_MOST_NAMED, MOST_WORDS = 10_000, 100
"""How many files a mesh may name, and of how many words the line that names some."""
_CATALOGUE = "PluginFurnitureCatalog.properties"
_PROPERTY = re.compile(r"^(model|name|creator|category|license)#(\d+)\s*=\s*(.*)$", re.MULTILINE)
_ASSETS = Path(__file__).parents[1] / "assets"
_NAMED = re.compile(
    r"^\s*(?:mtllib|map_\w+|bump|disp|decal|refl|norm)\s+([^#\n]+)", re.MULTILINE | re.IGNORECASE
)


@dataclass(frozen=True)
class Asset:
    """A 3D object, where it lies, and whom to thank for it.

    ``source`` is a mesh file, or a zip file with ``member`` naming the mesh inside; ``origin``
    names the model in the collection it was taken from, so that one object can be known again in
    two sets.  ``root`` is the collection's folder (None: the mesh's): textures may lie in it.
    """

    name: str
    source: Path
    split: str = "all"
    licence: str = "unknown"
    attribution: str = "unknown"
    category: str = ""
    member: str = ""
    origin: str = ""
    root: Path | None = None

    def read(self) -> bytes:
        """The mesh itself.

        Raises:
            DatasetError: if there is no such file or member, or it is damaged or too large.
        """
        return self._bytes(self.member or self.source.name, self.source.parent)

    def beside(self, name: str) -> bytes | None:
        """A file that the mesh names, by `where`; None where there is none.

        Raises:
            DatasetError: if it is damaged or too large.
        """
        place = self.where(name)
        return None if place is None else self._bytes(place, self.folder)

    def _bytes(self, place: str, folder: Path) -> bytes:
        if self.member:
            return unzip(self.source, place, MAX_BYTES)[1]
        return read_bytes(folder / place, MAX_BYTES)

    @property
    def folder(self) -> Path:
        """The collection's."""
        return self.root or self.source.parent

    def where(self, name: str) -> str | None:
        """Where in the collection (``root``, or the archive) a file lies that the mesh names.

        From the mesh's folder, then from the collection's; else a file of that name beside the
        mesh, or in another folder of the same object (ShapeNet's images/, Google Scanned
        Objects' materials/textures/).  Never outside of the collection.
        """
        files: dict[str, str] = {}
        if self.member:
            files = unzip(self.source)[0]
            home = posixpath.dirname(self.member)
        else:
            home = self.source.parent.relative_to(self.folder).as_posix().removeprefix(".")
        plain = name.strip().strip('"').replace("\\", "/")
        last = plain.rsplit("/", 1)[-1]
        tried = [posixpath.join(home, plain), plain, posixpath.join(home, last)]
        for path in map(posixpath.normpath, (*tried, *map(unquote, tried))):
            if self.member and path.casefold() in files:
                return files[path.casefold()]
            with contextlib.suppress(OSError, ValueError):  # it leads out, or no name can be so
                if not self.member and inside(self.folder, path).is_file():
                    return path
        around, found = posixpath.dirname(home), set()
        own, near = (f"{folder}/" if folder else "" for folder in (home, around))
        for path in files.values() if self.member else self._files_below(around):
            if path.lower().endswith(MESHES) and not path.startswith(own):
                return None  # another object's folder is as near: the file may be its own
            if path.startswith(near) and posixpath.basename(path).casefold() == last.casefold():
                found.add(path)
        return found.pop() if len(found) == 1 else None

    def _files_below(self, place: str) -> Iterator[str]:
        files = filter(Path.is_file, below(self.folder / place))
        return (path.relative_to(self.folder).as_posix() for path in files)


def credited(assets: Iterable[Asset]) -> dict[str, str]:
    """ATTRIBUTION.txt: whom to thank for these objects, a line each."""
    lines = sorted({asset.attribution for asset in assets})
    return {"ATTRIBUTION.txt": "\n".join(lines) + "\n"}


def _hidden(path: str) -> bool:
    """Whether a path leads through a dot file or folder, or what macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def unzip(source: Path, wanted: str = "", limit: int = 0) -> tuple[dict[str, str], bytes]:
    """The names in a zip file, and one member: at most so many bytes, whatever size it states."""
    data = b""
    try:
        said = source.stat()
        if not stat.S_ISREG(said.st_mode):
            raise DatasetError(f"{source}: is no regular file")
        archive, names = _archive(source, said.st_mtime_ns, said.st_size, os.getpid())
        if wanted:  # where these objects come from, case is ignored
            if wanted.casefold() not in names:
                raise DatasetError(f"{source}: has no member {wanted!r}")
            exact = wanted if wanted in archive.NameToInfo else names[wanted.casefold()]
            with archive.open(exact) as stream:
                data = stream.read(limit + 1)
    except DatasetError:
        raise
    except Exception as error:  # each compression has errors of its own
        raise DatasetError(f"{source}: can't be read as a zip file ({error})") from error
    if len(data) > limit:
        raise DatasetError(f"{source}: {wanted!r} has more than {limit} bytes")
    return names, data


@functools.lru_cache(maxsize=8)
def _archive(
    source: Path, changed_ns: int, size: int, process: int
) -> tuple[zipfile.ZipFile, dict[str, str]]:
    """A zip file as it is, and its names by what they are without case: its directory, which may
    be long, is parsed once a process."""
    archive = zipfile.ZipFile(source)
    return archive, {name.casefold(): name for name in archive.namelist()}


def content_of(asset: Asset, known: dict[Path, str]) -> str:
    """sha256 of a mesh and of all that it names, through its materials too; of a member, of its
    whole archive; "" where there is no file.

    Args:
        known: sha256 of files that were read before.
    """
    lines, waiting = set[str](), [asset.source]
    while waiting:
        path = waiting.pop()
        if not path.is_file():
            return ""
        if path not in known:
            known[path] = sha256(path)
        line = f"{path.name}\0{known[path]}"
        found = () if asset.member or line in lines else _named_in(path)
        lines.add(line)
        folder = os.path.relpath(path.parent, asset.source.parent)
        if len(named := {named.strip() for named in found}) > _MOST_NAMED:
            raise DatasetError(f"{path}: names {len(named)} files, the limit is {_MOST_NAMED}")
        for words in (each.split(None, MOST_WORDS)[:MOST_WORDS] for each in sorted(named)):
            ends = {" ".join(words[k:]) for k in range(len(words))}  # options may stand before it
            for name in sorted(ends | {*words}):
                place = asset.where(posixpath.join(folder, name)) or asset.where(name)
                lines.add(f"{name}\0{place}")
                waiting += [asset.folder / place] if place else []
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _named_in(path: Path) -> list[str]:
    """The files that a mesh or its materials name, as their readers find them."""
    suffix, data = path.suffix.lower(), b""
    if suffix in (*MESHES, ".mtl"):
        data = read_bytes(path, MAX_BYTES)
    if suffix in (".obj", ".mtl"):
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        return _NAMED.findall(re.sub(r"\\\r?\n", " ", text))
    if data.startswith(b"glTF"):  # binary: its JSON comes first
        data = data[20 : 20 + int.from_bytes(data[12:16], "little")]
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        said = from_json(data)
        linked = [each.get("uri") for key in ("images", "buffers") for each in said.get(key, ())]
        return [uri for uri in linked if isinstance(uri, str) and not uri.startswith("data:")]
    return []  # no mesh, or a damaged one, which is refused where it is read


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

    Dot files and what macOS adds to archives are passed over.  Splits that nobody states are
    "all", licences "unknown".  A local copy of Objaverse is such a
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
        for file in sorted(p for p in below(source) if p.suffix.lower() in kinds):
            shown = file.relative_to(source).as_posix()
            inner = file.is_file() and file.resolve().is_relative_to(source.resolve())
            if inner and not _hidden(shown):
                one = Asset(shown.removesuffix(file.suffix), file, root=source)
                found += [one] if file.suffix.lower() in MESHES else find_assets(file)
    elif suffix in MESHES:
        found = [Asset(source.stem, source)]
    elif suffix == ".json":
        found = _listed(source, read_bytes(source, _MAX_LIST_BYTES))
    elif suffix in (".sh3f", ".zip"):
        members = unzip(source)[0].values()
        meshes = [n for n in members if n.lower().endswith(MESHES) and not _hidden(n)]
        if suffix == ".sh3f" and _CATALOGUE in members:
            found = _catalogued(source, meshes)
        elif "manifest.json" in members:
            _, data = unzip(source, "manifest.json", _MAX_LIST_BYTES)
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
        entries = from_json(data)
    except ValueError as error:
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
                there = source.is_file()
            except (OSError, ValueError) as error:
                raise DatasetError(f"{manifest}: refuses {file!r}: {error}") from None
            if not there:
                raise DatasetError(f"{source}: no such file, but {manifest.name} lists it")
        found.append(_asset(source, file, said, file if archived else ""))
    return found


def _catalogued(source: Path, meshes: list[str]) -> list[Asset]:
    """The models that the Java properties file of a Sweet Home 3D library describes."""
    _, data = unzip(source, _CATALOGUE, _MAX_LIST_BYTES)
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
