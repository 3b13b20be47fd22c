"""MakeHuman's assets, from a folder or zip of the user's: skins, eyes, brows, lashes and hair.

A .mhclo file binds each vertex of an .obj to the base mesh: to one vertex, or to three with
weights and an offset, whose axes are scaled by distances on the head.
"""

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fresnel.data.images import DatasetError, decoded, read_bytes
from fresnel.heads import shape
from fresnel.heads.base import MAX_BYTES, VERTICES, Base, Doubles, Ints, read_obj
from fresnel.heads.person import KINDS
from fresnel.objects.assets import unzip
from fresnel.objects.surface import Floats, linear

_MOST_FILES = 4000


@dataclass(frozen=True)
class Piece:
    """A bound mesh: V vertices of ``refs`` (V, 3) rows of the whole base mesh, ``weights``,
    ``offsets`` (V, 3) and ``scales``: by axis two vertices and their distance on the base."""

    refs: Ints
    weights: Doubles
    offsets: Doubles
    scales: tuple[tuple[int, int, float], ...]
    mesh: shape.Split
    picture: str

    def known(self, base: Base) -> NDArray[np.bool_]:
        """Which vertices (V,) hang on the part of the base that is kept."""
        return np.all(base.place[self.refs] >= 0, axis=1)

    def fitted(self, base: Base, vertices: Doubles) -> Doubles:
        """Its vertices on a person whose base's rows are ``vertices``."""
        rows = base.place[self.refs]
        size = [
            abs(vertices[base.place[a], axis] - vertices[base.place[b], axis]) / distance
            for axis, (a, b, distance) in zip((0, 1, 2), self.scales, strict=True)
        ]
        return (vertices[rows] * self.weights[..., None]).sum(axis=1) + self.offsets * size


@dataclass(frozen=True)
class Wardrobe:
    """The files of a folder or zip by kind; ``digest`` stands for all their bytes."""

    source: Path
    names: tuple[str, ...]
    digest: str

    def read(self, name: str) -> bytes:
        if self.source.is_dir():
            return read_bytes(self.source / name, MAX_BYTES)
        return unzip(self.source, name, MAX_BYTES)[1]

    def of(self, kind: str, suffix: str) -> list[str]:
        return [n for n in self.names if f"/{kind}/" in f"/{n}" and n.endswith(suffix)]


@functools.lru_cache(4)
def open(source: str) -> Wardrobe:
    """The assets in a folder or zip.

    Raises:
        DatasetError: if there is none of use, or the zip can't be read.
    """
    path = Path(source)
    if path.is_dir():
        found = (p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
        names = [p.relative_to(path).as_posix() for p in found]
    elif path.is_file():
        names = [*unzip(path)[0].values()]
    else:
        raise DatasetError(f"{path}: no such folder or zip; want MakeHuman's assets")
    wanted = [n for n in names if n.endswith((".mhclo", ".obj", ".png")) and not n.startswith("/")]
    kept = tuple(sorted(n for n in wanted if any(f"/{kind}/" in f"/{n}" for kind in KINDS)))
    if not kept or len(kept) > _MOST_FILES:
        raise DatasetError(
            f"{path}: holds {len(kept)} files of MakeHuman's; want its folders "
            f"{', '.join(KINDS)} with .mhclo, .obj and .png files (at most {_MOST_FILES})"
        )
    worn, digest = Wardrobe(path, kept, ""), hashlib.sha256()
    for name in kept:
        digest.update(f"{name}\0{hashlib.sha256(worn.read(name)).hexdigest()}\n".encode())
    return replace(worn, digest=digest.hexdigest())


@functools.lru_cache(128)
def piece(worn: Wardrobe, name: str) -> Piece:
    """The bound mesh that a .mhclo file describes.

    Raises:
        DatasetError: if it or its .obj is damaged.
    """
    try:
        return _piece(worn, name)
    except (ValueError, IndexError, KeyError) as error:
        raise DatasetError(f"{worn.source}: {name} is no sound asset ({error})") from error


def _piece(worn: Wardrobe, name: str) -> Piece:
    said, rows, listing = dict[str, list[str]](), [], False
    for line in worn.read(name).decode("utf-8", "replace").splitlines():
        words = line.split()
        if listing and words and words[0].isdigit():
            numbers = [float(word) for word in words]
            rows.append(numbers if len(numbers) == 9 else [numbers[0]] * 3 + [1.0] + [0.0] * 5)
        elif words and words[0][:1] != "#":
            said[words[0]] = words[1:]
            listing = (listing or words[0] == "verts") and words[0] != "delete_verts"
    table = np.array(rows)
    refs = table[:, :3].astype(np.int64)
    if refs.min() < 0 or refs.max() >= VERTICES:
        raise ValueError("it names a vertex that the base mesh doesn't have")
    scales = tuple(
        (int(a), int(b), float(d)) for a, b, d in (said[f"{axis}_scale"][:3] for axis in "xyz")
    )
    folder = name.rpartition("/")[0]
    mesh = read_obj(worn.read(f"{folder}/{said['obj_file'][0]}"))
    if len(mesh.vertices) != len(refs):
        raise ValueError(f"binds {len(refs)} vertices, its mesh has {len(mesh.vertices)}")
    pictures = [n for n in worn.names if n.startswith(f"{folder}/") and n.endswith(".png")]
    split = shape.split(mesh.quads, mesh.quad_uvs, mesh.uvs)
    return Piece(refs, table[:, 3:6], table[:, 6:9], scales, split, (*pictures, "")[0])


@functools.lru_cache(128)
def texture(worn: Wardrobe, name: str, side: int, grey: bool = False) -> Floats:
    """A picture as linear rgb and alpha (h, w, 4) of half precision, at most so many pixels a
    side; ``grey``: its brightness over its mean, to be coloured."""
    image = decoded(f"{worn.source}: {name}", worn.read(name)).convert("RGBA")
    if max(image.size) > side:
        image = image.convert("RGBa").resize((side, side), Image.Resampling.BOX).convert("RGBA")
    rgba = np.asarray(image, np.float32) / 255
    color = linear(rgba[..., :3].astype(np.float64))
    if grey:
        light = color @ np.array([0.2126, 0.7152, 0.0722], np.float32)
        mean = max(float((light * rgba[..., 3]).sum() / max(rgba[..., 3].sum(), 1e-6)), 1e-3)
        color = np.repeat((light / mean).clip(0.25, 2.5)[..., None], 3, axis=2)
    return np.concatenate([color, rgba[..., 3:]], axis=2).astype(np.float16)


@functools.lru_cache(64)
def mean_tone(worn: Wardrobe, name: str) -> Doubles:
    """The mean colour (3,) of a skin's picture on the cheeks and forehead."""
    picture = texture(worn, name, 1024)
    height, width = picture.shape[:2]
    face = picture[int(0.44 * height) : int(0.6 * height), :, :3]
    face = face[:, int(0.76 * width) : int(0.94 * width)]
    return np.median(face.astype(np.float64), axis=(0, 1))
