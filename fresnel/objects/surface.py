"""Triangles with colours, and how they look under three fixed lights.

Colours are linear-light here.  A surface is Lambertian and drawn from both sides: its normal is
turned towards the viewer.  What leaves it is base colour x light + emission, where base colour =
vertex colour x texture (bilinear, sRGB); metalness, roughness, normal maps and so on are ignored.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fresnel.data.images import FORMATS, decoded
from fresnel.scene.colour import linear_to_srgb, srgb_to_linear

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Directions towards the lights in the world (Y up) and their strength; chosen so that white is
# not clipped where it is brightest (0.99) and stays visible from every side (0.32).
AMBIENT = 0.32
LIGHTS = (
    ((0.55, 0.70, 0.60), 0.58),  # key
    ((-0.75, 0.20, 0.55), 0.30),  # fill
    ((-0.10, 0.45, -0.90), 0.38),  # rim
)
# Where a file has no normals, faces that meet at less than this angle are shaded as one surface.
CREASE_DEG = 35.0
MAX_FACES = 2_000_000
"""Of a mesh: what comes of it takes about 1.5 GB."""
_FORMATS = (*FORMATS, "TGA", "DDS")
_MAX_TEXTURE_PIXELS = 1 << 26
_MAX_TEXTURE_SIDE = 4096  # larger ones are shrunk: linear floats take 16 bytes a pixel


@dataclass(frozen=True)
class Texture:
    """A linear image (h, w, 4), alpha last, and how it goes on outside of it along u and v."""

    image: Floats
    wrap: tuple[str, str] = ("repeat", "repeat")
    nearest: bool = False

    def __call__(self, uv: Floats) -> Floats:
        """Colours (n, 4) at texture coordinates (n, 2), whose origin is the image's lower left."""
        height, width = self.image.shape[:2]
        half = np.float32(0.5)
        x = _wrapped(uv[:, 0], self.wrap[0]) * width - half
        y = _wrapped(1 - uv[:, 1], self.wrap[1]) * height - half
        if self.nearest:
            x, y = np.floor(x + half), np.floor(y + half)
        x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        fx, fy = (x - x0)[:, None].astype(np.float32), (y - y0)[:, None].astype(np.float32)
        left, right = (_inside(i, width, self.wrap[0]) for i in (x0, x0 + 1))
        above, below = (_inside(i, height, self.wrap[1]) for i in (y0, y0 + 1))
        top = self.image[above, left] * (1 - fx) + self.image[above, right] * fx
        bottom = self.image[below, left] * (1 - fx) + self.image[below, right] * fx
        return top * (1 - fy) + bottom * fy


def _wrapped(t: Floats, how: str) -> Floats:
    if how == "clamp":
        return t.clip(0, 1)
    return t % 1 if how == "repeat" else 1 - np.abs(t % 2 - 1)


def _inside(index: NDArray[np.int64], size: int, how: str) -> NDArray[np.int64]:
    return index % size if how == "repeat" else index.clip(0, size - 1)


@dataclass(frozen=True)
class Material:
    """What the triangles of a mesh share.

    ``alpha``: "OPAQUE", "MASK" (nothing is drawn where alpha is below ``cutoff``) or "BLEND".
    ``emission`` is a factor of ``emissive``, or what is emitted where that is None.
    """

    texture: Texture | None = None
    emissive: Texture | None = None
    emission: Sequence[float] = (0.0, 0.0, 0.0)
    alpha: str = "OPAQUE"
    cutoff: float = 0.5
    unlit: bool = False


@dataclass(frozen=True)
class Part:
    """Faces (n, 3) of V vertices in the world that share a material.

    ``colors`` (V, 4) are linear, ``uvs`` (V, 4) of the texture and of the emissive texture.
    """

    vertices: Doubles
    faces: NDArray[np.int64]
    material: Material
    normals: Doubles | None = None
    colors: Floats | None = None
    uvs: Floats | None = None


@dataclass(frozen=True)
class Surface:
    """F triangles, by corner: ``corners`` and unit ``normals`` (F, 3, 3), linear ``colors`` with
    alpha (F, 3, 4), ``uvs`` (F, 3, 4) as a `Part`'s; ``material`` (F,) indexes ``materials``.

    ``notes`` say, each in a sentence, what of the file is not drawn as it asks.
    """

    corners: Floats
    normals: Floats
    colors: Floats
    uvs: Floats
    material: NDArray[np.int64]
    materials: tuple[Material, ...]
    notes: tuple[str, ...] = ()

    @property
    def opaque(self) -> bool:
        return all(material.alpha == "OPAQUE" for material in self.materials)

    def normalised(self) -> Self:
        """Centred on its bounding box, longest side 1."""
        low, high = self.corners.min(axis=(0, 1)), self.corners.max(axis=(0, 1))
        side = float((high - low).max())
        if side <= 0:
            raise ValueError("mesh: all its vertices coincide; want a solid of some size")
        return replace(self, corners=(self.corners - (low + high) / 2) / side)

    def stretched(self, factors: Doubles) -> Self:
        """Each axis scaled by its factor (3,); normals stay perpendicular."""
        normals = self.normals.astype(np.float64) / factors
        x, y, z = np.moveaxis(normals, -1, 0)
        length = np.sqrt(x * x + y * y + z * z)  # the same bits on every machine, as a sum is not
        return replace(
            self,
            corners=(self.corners.astype(np.float64) * factors).astype(np.float32),
            normals=(normals / length[..., None]).astype(np.float32),
        )


def assemble(parts: Sequence[Part], notes: Iterable[str] = ()) -> Surface:
    """All triangles of a file.

    Raises:
        ValueError: if there is no triangle or there are too many, a vertex is not finite, or a face
            names one that doesn't exist.
    """
    parts = [part for part in parts if len(part.faces)]
    if not parts:
        raise ValueError("mesh: holds no triangle; want at least one mesh with faces")
    faces = sum(len(part.faces) for part in parts)
    if faces > MAX_FACES:
        raise ValueError(f"mesh: {faces} triangles, the limit is {MAX_FACES}. Simplify it")
    for part in parts:
        if part.faces.min() < 0 or part.faces.max() >= len(part.vertices):
            raise ValueError("mesh: a face names a vertex that doesn't exist; repair the file")
        if not (np.abs(part.vertices) < 1e30).all():  # beyond float32, or NaN
            raise ValueError("mesh: a vertex is NaN or infinite; repair the file")
    shown = [part.vertices[part.faces].reshape(-1, 3) for part in parts]
    low = np.min([corners.min(axis=0) for corners in shown], axis=0)
    high = np.max([corners.max(axis=0) for corners in shown], axis=0)
    # float32 has no digits left for what is small and far away, as in a map's coordinates
    far = np.abs((low + high) / 2).max() > 8 * (high - low).max()
    origin = (low + high) / 2 if far else np.zeros(3)
    materials = list(dict.fromkeys(id(part.material) for part in parts))
    return Surface(
        np.concatenate([(corners - origin).astype(np.float32) for corners in shown]).reshape(
            -1, 3, 3
        ),
        np.concatenate([_normals(part) for part in parts]),
        np.concatenate([_by_corner(part.colors, part, 1.0) for part in parts]),
        np.concatenate([_by_corner(part.uvs, part, 0.0) for part in parts]),
        np.repeat(
            [materials.index(id(part.material)) for part in parts],
            [len(part.faces) for part in parts],
        ),
        tuple({id(part.material): part.material for part in parts}.values()),
        tuple(dict.fromkeys(notes)),
    )


def _by_corner(values: Floats | None, part: Part, default: float) -> Floats:
    if values is None:
        return np.full((len(part.faces), 3, 4), default, np.float32)
    return np.nan_to_num(values[part.faces], posinf=0.0, neginf=0.0).astype(np.float32)


def _normals(part: Part) -> Floats:
    corners = part.vertices[part.faces]
    normals = _smooth(corners) if part.normals is None else part.normals[part.faces]
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    unit = np.where(length > 1e-12, normals / np.maximum(length, 1e-12), (0.0, 1.0, 0.0))
    return unit.astype(np.float32)


def _smooth(corners: Doubles) -> Doubles:
    """Corner normals: the area-weighted mean over the faces at that point within the crease."""
    area_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    unit = area_normals / np.maximum(np.linalg.norm(area_normals, axis=1, keepdims=True), 1e-30)
    points = corners.reshape(-1, 3)
    scale = np.ptp(points, axis=0).max() or 1.0
    keys = np.round((points - points.min(axis=0)) / scale * (1 << 20)).astype(np.int64)
    _, point = np.unique(keys @ np.array([1, 1 << 21, 1 << 42]), return_inverse=True)
    order = np.argsort(point, kind="stable")
    face = order // 3
    first = np.searchsorted(point[order], point[order])
    count = np.bincount(point)[point[order]]
    total = np.zeros((len(order), 3))
    # Corner i meets the k-th corner of its point; fans of more than 64 faces are rare and the
    # faces beyond add nothing visible.
    for k in range(min(int(count.max()), 64)):
        rows = np.nonzero(count > k)[0]
        other = face[first[rows] + k]
        cosine = np.einsum("ij,ij->i", unit[face[rows]], unit[other])
        close = cosine > math.cos(math.radians(CREASE_DEG))
        total[rows] += area_normals[other] * close[:, None]
    total += 1e-6 * area_normals[face]
    normals = np.empty_like(total)
    normals[order] = total
    return normals.reshape(-1, 3, 3)


def linear(srgb: Doubles) -> Floats:
    """sRGB colours in [0, 1], of any shape, as linear float32."""
    return srgb_to_linear(srgb.astype(np.float32).clip(0.0, 1.0))


def texture_image(name: str, data: bytes) -> Floats:
    """A texture's file as a linear image (h, w, 4), its last channel alpha.

    Raises:
        ValueError: if it is damaged, of a format that isn't read, or too large; names ``name``.
    """
    image = decoded(f"texture {name}", data, formats=_FORMATS)
    if image.width * image.height > _MAX_TEXTURE_PIXELS:
        raise ValueError(f"texture {name}: {image.width} x {image.height} pixels. Shrink it")
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip them, not scale
        top = 65535.0 if image.mode.startswith("I") else 1.0
        grey = (np.asarray(image, np.float64) / top * 255 + 0.5).clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    if max(image.size) > _MAX_TEXTURE_SIDE:
        image = image.copy()
        image.thumbnail((_MAX_TEXTURE_SIDE, _MAX_TEXTURE_SIDE))
    rgba = np.asarray(image.convert("RGBA"))
    levels = srgb_to_linear((np.arange(256) / 255).astype(np.float32))
    alpha = rgba[..., 3:].astype(np.float32) / np.float32(255)
    return np.concatenate([levels[rgba[..., :3]], alpha], axis=-1)


def shade(
    surface: Surface, face: NDArray[np.int64], u: Floats, v: Floats, towards_viewer: Floats
) -> Floats:
    """sRGB colours and alpha (n, 4) of n points: face index, barycentrics u, v, direction to the
    viewer."""
    normal = _interpolate(surface.normals[face], u, v)
    facing = np.einsum("ij,ij->i", normal, towards_viewer)
    length = np.sqrt(np.einsum("ij,ij->i", normal, normal))
    normal *= (np.where(facing < 0, -1, 1) / np.maximum(length, 1e-12))[:, None]
    light = np.full((len(face), 1), AMBIENT, np.float32)
    for direction, strength in LIGHTS:
        unit = np.asarray(direction, np.float32) / np.float32(math.hypot(*direction))
        light += np.float32(strength) * np.maximum(normal @ unit[:, None], 0)
    color = _interpolate(surface.colors[face], u, v)
    emitted = np.zeros((len(face), 3), np.float32)
    used = surface.material[face]
    for index, material in enumerate(surface.materials):
        rows = np.nonzero(used == index)[0]
        if not len(rows):
            continue
        uv = _interpolate(surface.uvs[face[rows]], u[rows], v[rows])
        if material.texture is not None:
            color[rows] *= material.texture(uv[:, :2])
        if any(material.emission):
            glow = np.asarray(material.emission, np.float32)
            seen = material.emissive(uv[:, 2:])[:, :3] if material.emissive is not None else 1
            emitted[rows] = glow * seen
        if material.unlit:
            light[rows] = 1
        if material.alpha == "OPAQUE":
            color[rows, 3] = 1
        elif material.alpha == "MASK":
            color[rows, 3] = color[rows, 3] >= material.cutoff
    color[:, :3] = linear_to_srgb(color[:, :3] * light + emitted)
    return color


def _interpolate(corners: Floats, u: Floats, v: Floats) -> Floats:
    """Values at barycentrics u, v of triangles whose corners have (n, 3, k) values."""
    u, v = u[:, None], v[:, None]
    return corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v
