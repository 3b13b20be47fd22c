"""Triangles with colours, and how they look under three fixed lights.

Colours are linear-light here.  A surface is Lambertian and two-sided: its normal is turned towards
the viewer.  Base colour = base colour factor x vertex colour x base colour texture (bilinear,
wrap repeat, sRGB); transparency, metalness and roughness are ignored.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fresnel.scene.colour import linear_to_srgb, srgb_to_linear

if TYPE_CHECKING:
    import trimesh

Floats = NDArray[np.float32]

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
MAX_FACES = 5_000_000
TEXTURE_FORMATS = ("PNG", "JPEG", "BMP", "TGA", "TIFF", "WEBP", "GIF")
_MAX_TEXTURE_PIXELS = 1 << 26
_MAX_TEXTURE_SIDE = 4096  # larger ones are shrunk: linear floats take 12 bytes a pixel
LINEAR_COLORS = "fresnel_linear_vertex_colors"
"""Scene metadata key: vertex colours are linear (glTF), not sRGB."""


@dataclass(frozen=True)
class Surface:
    """F triangles: corners, unit normals, linear base colours, texture coordinates.

    ``corners``, ``normals``, ``colors`` (F, 3, 3) and ``uvs`` (F, 3, 2) by corner; ``texture``
    (F,) indexes ``textures``, linear (h, w, 3) images, or is -1.
    """

    corners: Floats
    normals: Floats
    colors: Floats
    uvs: Floats
    texture: NDArray[np.int64]
    textures: tuple[Floats, ...]

    def normalised(self) -> Surface:
        """Centred on its bounding box, longest side 1."""
        low, high = self.corners.min(axis=(0, 1)), self.corners.max(axis=(0, 1))
        side = float((high - low).max())
        if side <= 0:
            raise ValueError("mesh: all its vertices coincide; want a solid of some size")
        return replace(self, corners=(self.corners - (low + high) / 2) / side)

    def stretched(self, factors: NDArray[np.float64]) -> Surface:
        """Each axis scaled by its factor (3,); normals stay perpendicular."""
        normals = self.normals.astype(np.float64) / factors
        x, y, z = np.moveaxis(normals, -1, 0)
        length = np.sqrt(x * x + y * y + z * z)  # the same bits on every machine, as a sum is not
        return replace(
            self,
            corners=(self.corners.astype(np.float64) * factors).astype(np.float32),
            normals=(normals / length[..., None]).astype(np.float32),
        )


def surface(scene: trimesh.Scene | trimesh.Trimesh) -> Surface:
    """All triangles of a scene, its graph's transforms applied.

    Raises:
        ValueError: if there is no triangle, or a vertex is not finite.
    """
    import trimesh

    if isinstance(scene, trimesh.Trimesh):
        scene = trimesh.Scene(scene)
    linear = bool(scene.metadata.get(LINEAR_COLORS, False))
    placed = [scene.graph[node] for node in sorted(scene.graph.nodes_geometry)]
    meshes = [(matrix, scene.geometry[name]) for matrix, name in placed]
    meshes = [(matrix, mesh) for matrix, mesh in meshes if len(getattr(mesh, "faces", ()))]
    faces = sum(len(mesh.faces) for _, mesh in meshes)
    if faces > MAX_FACES:
        raise ValueError(f"mesh: {faces} triangles, the limit is {MAX_FACES}. Simplify it")
    if not meshes:
        raise ValueError("mesh: holds no triangle; want at least one mesh with faces")
    parts = [_part(mesh, np.asarray(matrix, np.float64), linear) for matrix, mesh in meshes]
    textures: list[Floats] = []
    indices = []
    for part in parts:
        indices.append(np.where(part.texture >= 0, part.texture + len(textures), -1))
        textures += part.textures
    corners, normals, colors, uvs = (
        np.concatenate([getattr(part, field) for part in parts])
        for field in ("corners", "normals", "colors", "uvs")
    )
    return Surface(corners, normals, colors, uvs, np.concatenate(indices), tuple(textures))


def _part(mesh: trimesh.Trimesh, matrix: NDArray[np.float64], linear: bool) -> Surface:
    vertices = np.asarray(mesh.vertices, np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
    if not (np.abs(vertices) < 1e30).all():  # beyond float32, or NaN
        raise ValueError("mesh: a vertex is NaN or infinite; repair the file")
    faces = np.asarray(mesh.faces)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError("mesh: a face names a vertex that doesn't exist; repair the file")
    corners = vertices[faces]
    if "vertex_normals" in mesh._cache:  # given by the file, not computed from the faces
        given = np.asarray(mesh.vertex_normals) @ np.linalg.pinv(matrix[:3, :3])
        normals = given[faces]
    else:
        normals = _smooth_normals(corners)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    normals = np.where(length > 1e-12, normals / np.maximum(length, 1e-12), (0.0, 1.0, 0.0))
    colors, uvs, texture = _appearance(mesh, faces, linear)
    return Surface(
        corners.astype(np.float32),
        normals.astype(np.float32),
        colors,
        uvs,
        np.full(len(faces), -1 if texture is None else 0),
        () if texture is None else (texture,),
    )


def _smooth_normals(corners: NDArray[np.float64]) -> NDArray[np.float64]:
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


def _appearance(
    mesh: trimesh.Trimesh, faces: NDArray[np.int64], linear: bool
) -> tuple[Floats, Floats, Floats | None]:
    """Corner colours (F, 3, 3), corner uvs (F, 3, 2), texture (h, w, 3) or None; all linear."""
    visual: Any = mesh.visual
    colors = np.ones((len(faces), 3, 3), np.float32)
    uvs = np.zeros((len(faces), 3, 2), np.float32)
    material = getattr(visual, "material", None)
    if material is None:
        if visual.kind == "face":
            colors *= _linear(visual.face_colors, linear)[:, None]
        elif visual.kind == "vertex":
            colors *= _linear(visual.vertex_colors, linear)[faces]
        return colors, uvs, None
    extra = visual.vertex_attributes.get("color")
    if extra is not None and len(extra) == len(mesh.vertices):
        colors *= _linear(extra, linear)[faces]
    uv = visual.uv
    mapped = uv is not None and len(uv) == len(mesh.vertices)
    if hasattr(material, "baseColorTexture"):  # glTF: factors are linear, textures sRGB
        image, factor = material.baseColorTexture, material.baseColorFactor
        if factor is not None:
            colors *= _linear(factor, True)
    else:  # OBJ: a texture, if laid out, takes the place of the diffuse colour, which is sRGB
        image = material.image
        if image is None or not mapped:
            colors *= _linear(material.main_color, False)
    if image is None or not mapped:
        return colors, uvs, None
    uvs = np.nan_to_num(np.asarray(uv, np.float32)[faces][..., :2], posinf=0.0, neginf=0.0)
    if image.format not in (*TEXTURE_FORMATS, None):  # not decoded yet: EPS would run Ghostscript
        raise ValueError(f"mesh: a texture is {image.format}, want one of {TEXTURE_FORMATS}")
    if image.width * image.height > _MAX_TEXTURE_PIXELS:
        raise ValueError(f"mesh: a texture has {image.width} x {image.height} pixels. Shrink it")
    if max(image.size) > _MAX_TEXTURE_SIDE:
        image = image.copy()
        image.thumbnail((_MAX_TEXTURE_SIDE, _MAX_TEXTURE_SIDE))
    levels = srgb_to_linear((np.arange(256) / 255).astype(np.float32))
    return colors, uvs, levels[np.asarray(image.convert("RGB"))]


def _linear(values: Any, already: bool) -> Floats:
    """Colours of any integer or float type as linear float32 (..., 3)."""
    array = np.asarray(values)
    top = np.iinfo(array.dtype).max if array.dtype.kind in "ui" else 1.0
    top = 255.0 if array.dtype.kind == "i" else top
    unit = (array[..., :3] / top).astype(np.float32).clip(0.0, 1.0)
    return unit if already else srgb_to_linear(unit)


def shade(
    surface: Surface, face: NDArray[np.int64], u: Floats, v: Floats, towards_viewer: Floats
) -> Floats:
    """sRGB colours (n, 3) of n points: face index, barycentrics u, v, direction to the viewer."""
    normal = _interpolate(surface.normals[face], u, v)
    facing = np.einsum("ij,ij->i", normal, towards_viewer)
    length = np.sqrt(np.einsum("ij,ij->i", normal, normal))
    normal *= (np.where(facing < 0, -1, 1) / np.maximum(length, 1e-12))[:, None]
    light = np.full((len(face), 1), AMBIENT, np.float32)
    for direction, strength in LIGHTS:
        unit = np.asarray(direction, np.float32) / np.float32(math.hypot(*direction))
        light += np.float32(strength) * np.maximum(normal @ unit[:, None], 0)
    color = _interpolate(surface.colors[face], u, v)
    texture = surface.texture[face]
    for index, image in enumerate(surface.textures):
        rows = np.nonzero(texture == index)[0]
        if len(rows):
            uv = _interpolate(surface.uvs[face[rows]], u[rows], v[rows])
            color[rows] *= _bilinear(image, uv)
    return linear_to_srgb(color * light)


def _interpolate(corners: Floats, u: Floats, v: Floats) -> Floats:
    """Values at barycentrics u, v of triangles whose corners have (n, 3, k) values."""
    u, v = u[:, None], v[:, None]
    return corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v


def _bilinear(image: Floats, uv: Floats) -> Floats:
    """Texture lookup, repeating; uv's origin is the image's lower left."""
    height, width = image.shape[:2]
    x = (uv[:, 0] % 1) * width - np.float32(0.5)
    y = ((1 - uv[:, 1]) % 1) * height - np.float32(0.5)
    x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = (x - x0)[:, None].astype(np.float32), (y - y0)[:, None].astype(np.float32)
    left, right = x0 % width, (x0 + 1) % width
    above, below = y0 % height, (y0 + 1) % height
    top = image[above, left] * (1 - fx) + image[above, right] * fx
    bottom = image[below, left] * (1 - fx) + image[below, right] * fx
    return top * (1 - fy) + bottom * fy


def check_gltf(data: bytes) -> None:
    """Refuse a glTF whose JSON claims more than its file can hold, before memory is set aside.

    Raises:
        ValueError: if an accessor has more than ``3 * MAX_FACES`` elements, or the scene more than
            100,000 nodes.
    """
    try:
        if data.startswith(b"glTF"):
            (size,) = struct.unpack_from("<I", data, 12)
            data = data[20 : 20 + size]
        header = json.loads(data)
        counts = [accessor.get("count", 0) for accessor in header.get("accessors", [])]
        absurd = any(not 0 <= count <= 3 * MAX_FACES for count in counts)
        absurd |= sum(counts) > 20 * MAX_FACES or len(header.get("nodes", [])) > 100_000
    except (struct.error, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"can't be read as glTF ({str(error)[:100]})") from None
    if absurd:
        raise ValueError("mesh: an absurd number of elements or nodes. Simplify it")
