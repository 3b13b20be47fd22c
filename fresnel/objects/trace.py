"""Meshes: read, made triangles with colours, and ray-traced with Embree under three fixed lights.

Colours are linear-light here.  A surface is Lambertian and two-sided: its normal is turned towards
the viewer.  Base colour = base colour factor x vertex colour x base colour texture (bilinear,
wrap repeat, sRGB); transparency, metalness and roughness are ignored.  Every sample is encoded to
sRGB and the samples of a pixel are averaged there, because this library composites sRGB values.
"""

from __future__ import annotations

import io
import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fresnel.data.images import DatasetError
from fresnel.objects.assets import MAX_BYTES, MESHES, Asset
from fresnel.render import Views
from fresnel.scene.cameras import Cameras
from fresnel.scene.colour import linear_to_srgb, srgb_to_linear

if TYPE_CHECKING:
    import trimesh

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

# Directions towards the lights in the world (Y up) and their strength; chosen so that white is
# not clipped where it is brightest (0.99) and stays visible from every side (0.32).
AMBIENT = 0.32
LIGHTS = (
    ((0.55, 0.70, 0.60), 0.58),  # key
    ((-0.75, 0.20, 0.55), 0.30),  # fill
    ((-0.10, 0.45, -0.90), 0.38),  # rim
)
CREASE_DEG = 35.0
"""Where a file has no normals, faces that meet at less than this are shaded as one surface."""
MAX_FACES = 5_000_000
TEXTURE_FORMATS = ("PNG", "JPEG", "BMP", "TGA", "TIFF", "WEBP", "GIF")
_MAX_TEXTURE_PIXELS = 1 << 26
_MAX_TEXTURE_SIDE = 4096  # larger ones are shrunk: linear floats take 12 bytes a pixel
_LINEAR = "fresnel_linear_vertex_colors"  # scene metadata: vertex colours are linear (glTF)
_RAYS_AT_ONCE = 1 << 20  # bounds memory at about 300 MB


def load(source: str | Path | Asset) -> trimesh.Scene:
    """A scene from a mesh file (.glb, .gltf, .obj) or an asset.

    Materials and textures that the file names are read from its own folder or below only.

    Raises:
        DatasetError: if the file is missing, of another kind, too large, or can't be parsed.
    """
    import trimesh

    asset = source if isinstance(source, Asset) else Asset(Path(source).stem, Path(source))
    name = f"{asset.source}: {asset.member}" if asset.member else str(asset.source)
    suffix = Path(asset.member or asset.source).suffix.lower()
    if suffix not in MESHES:
        raise DatasetError(f"{name}: a {suffix or 'nameless'} file; want one of {MESHES}")
    data, is_gltf = asset.read(), suffix != ".obj"
    if not is_gltf and len(data) > MAX_BYTES // 4:
        raise DatasetError(f"{name}: larger than {MAX_BYTES >> 22} MB of text. Simplify it")
    beside: Any = _Beside(asset)
    try:
        if is_gltf and _absurd(data):
            raise ValueError("an absurd number of elements or nodes. Simplify it")
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type=suffix[1:], resolver=beside, process=False
        )
    except Exception as error:
        raise DatasetError(f"{name}: can't be read as {suffix[1:]} ({error!s:.200})") from error
    scene.metadata[_LINEAR] = is_gltf
    return scene


class _Beside:
    """trimesh's way of asking for a file that another file names."""

    def __init__(self, asset: Asset) -> None:
        self.asset = asset

    def get(self, key: Any) -> bytes:
        try:
            return self.asset.read(key.decode() if isinstance(key, bytes) else str(key))
        except DatasetError as error:  # trimesh goes on without: a plain surface
            raise FileNotFoundError(str(error)) from error

    __getitem__ = get


def _absurd(data: bytes) -> bool:
    """Whether a glTF's JSON claims more than any file can hold: asked before memory is set
    aside."""
    if data.startswith(b"glTF"):
        (size,) = struct.unpack_from("<I", data, 12)
        data = data[20 : 20 + size]
    header = json.loads(data)
    counts = [accessor.get("count", 0) for accessor in header.get("accessors", [])]
    absurd = any(not 0 <= count <= 3 * MAX_FACES for count in counts)
    return absurd or sum(counts) > 20 * MAX_FACES or len(header.get("nodes", [])) > 100_000


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
    texture: Indices
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
        corners = (self.corners.astype(np.float64) * factors).astype(np.float32)
        normals = (normals / length[..., None]).astype(np.float32)
        return replace(self, corners=corners, normals=normals)


def surface(scene: trimesh.Scene | trimesh.Trimesh) -> Surface:
    """All triangles of a scene, its graph's transforms applied.

    Raises:
        ValueError: if there is no triangle, or a vertex is not finite.
    """
    import trimesh

    scene = trimesh.Scene(scene) if isinstance(scene, trimesh.Trimesh) else scene
    placed = [scene.graph[node] for node in sorted(scene.graph.nodes_geometry)]
    meshes = [(matrix, scene.geometry[name]) for matrix, name in placed]
    meshes = [(matrix, mesh) for matrix, mesh in meshes if len(getattr(mesh, "faces", ()))]
    count = sum(len(mesh.faces) for _, mesh in meshes)
    if not 0 < count <= MAX_FACES:
        raise ValueError(f"mesh: {count or 'no'} triangles; want 1 to {MAX_FACES:,}")
    parts, textures = [], list[Floats]()
    for matrix, mesh in meshes:
        vertices = np.asarray(mesh.vertices, np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
        if not (np.abs(vertices) < 1e30).all():  # beyond float32, or NaN
            raise ValueError("mesh: a vertex is NaN or infinite; repair the file")
        faces = np.asarray(mesh.faces)
        if faces.min() < 0 or faces.max() >= len(vertices):
            raise ValueError("mesh: a face names a vertex that doesn't exist; repair the file")
        corners = vertices[faces]
        if "vertex_normals" in mesh._cache:  # given by the file, not computed from the faces
            normals = (np.asarray(mesh.vertex_normals) @ np.linalg.pinv(matrix[:3, :3]))[faces]
        else:
            normals = _smooth_normals(corners)
        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        normals = np.where(length > 1e-12, normals / np.maximum(length, 1e-12), (0.0, 1.0, 0.0))
        linear = bool(scene.metadata.get(_LINEAR, False))
        colors, uvs, texture = _appearance(mesh, faces, linear)
        index = np.full(len(faces), -1 if texture is None else len(textures))
        textures += [] if texture is None else [texture]
        parts.append((corners.astype(np.float32), normals.astype(np.float32), colors, uvs, index))
    joined: Any = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Surface(*joined, textures=(*textures,))


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
    normals = np.empty_like(total)
    normals[order] = total + 1e-6 * area_normals[face]
    return normals.reshape(-1, 3, 3)


def _appearance(
    mesh: trimesh.Trimesh, faces: Indices, linear: bool
) -> tuple[Floats, Floats, Floats | None]:
    """Corner colours (F, 3, 3), corner uvs (F, 3, 2), texture (h, w, 3) or None; all linear."""
    visual: Any = mesh.visual
    colors, uvs = np.ones((len(faces), 3, 3), np.float32), np.zeros((len(faces), 3, 2), np.float32)
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
    mapped = visual.uv is not None and len(visual.uv) == len(mesh.vertices)
    is_gltf = hasattr(material, "baseColorTexture")
    image = material.baseColorTexture if is_gltf else material.image
    if is_gltf and material.baseColorFactor is not None:  # factors are linear, textures sRGB
        colors *= _linear(material.baseColorFactor, True)
    if not is_gltf and (image is None or not mapped):  # OBJ: else it replaces the diffuse colour
        colors *= _linear(material.main_color, False)
    if image is None or not mapped:
        return colors, uvs, None
    uvs = np.nan_to_num(np.asarray(visual.uv, np.float32)[faces][..., :2], posinf=0.0, neginf=0.0)
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
    top = np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1.0
    top = 255.0 if array.dtype.kind == "i" else top
    unit = (array[..., :3] / top).astype(np.float32).clip(0.0, 1.0)
    return unit if already else srgb_to_linear(unit)


def render(
    mesh: trimesh.Scene | trimesh.Trimesh | Surface, cameras: Cameras, *, samples: int = 4
) -> Views:
    """Ray-trace a mesh from V cameras at once.

    Args:
        mesh: a scene from `load`, a single mesh, or an already prepared surface.
        cameras: batch shape (V,).
        samples: rays a pixel, a square number; they lie on a rotated grid, the same in every
            pixel, so the result is deterministic.

    Returns:
        Views float32 on the CPU: rgb (V, H, W, 3) over black, alpha (V, H, W, 1) the covered
        fraction of the pixel, depth (V, H, W, 1) the mean z-depth of what covers it.

    Raises:
        ValueError: if the mesh has no triangle or a vertex that isn't finite, or an argument is
            out of range.
    """
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    if len(cameras.batch_shape) != 1:
        raise ValueError(f"cameras: got batch shape {tuple(cameras.batch_shape)}, want (V,)")
    offsets = _sample_offsets(samples)
    solid = mesh if isinstance(mesh, Surface) else surface(mesh)
    tracer = EmbreeScene()
    TriangleMesh(tracer, np.ascontiguousarray(solid.corners))
    viewmats, Ks = (t.detach().cpu().double().numpy() for t in (cameras.viewmats, cameras.Ks))
    turns = viewmats[:, :3, :3].transpose(0, 2, 1)
    # Directions have z-depth 1 in their camera, so a hit's ray parameter is its z-depth.
    world_from_pixel = (turns @ np.linalg.inv(Ks)).astype(np.float32)
    centers = -np.einsum("vij,vj->vi", turns, viewmats[:, :3, 3]).astype(np.float32)
    size = len(cameras), cameras.height, cameras.width
    out = np.zeros((math.prod(size), 5), np.float32)
    indices, limit = _touched(solid, viewmats, Ks, size), max(_RAYS_AT_ONCE // samples, 1)
    for start in range(0, len(indices), limit):
        pixels = indices[start : start + limit]
        which, row, column = np.unravel_index(pixels, size)
        which = np.repeat(which, samples)
        px = (column[:, None] + offsets[:, 0]).ravel()
        py = (row[:, None] + offsets[:, 1]).ravel()
        homogeneous = np.stack([px, py, np.ones_like(px)], axis=1).astype(np.float32)
        directions = np.einsum("nij,nj->ni", world_from_pixel[which], homogeneous)
        hits = tracer.run(centers[which], directions, output=1)
        rows = np.nonzero(hits["primID"] >= 0)[0]
        face = hits["primID"][rows].astype(np.int64)
        seen = np.zeros((len(which), 5), np.float32)  # rgb, alpha, depth
        seen[rows, :3] = shade(solid, face, hits["u"][rows], hits["v"][rows], -directions[rows])
        seen[rows, 3] = 1
        seen[rows, 4] = hits["tfar"][rows]
        out[pixels] = sum(seen[k::samples] / np.float32(samples) for k in range(samples))
    out[:, 4] /= np.maximum(out[:, 3], np.float32(0.5 / samples))
    image = torch.from_numpy(out.reshape(*size, 5))
    return Views(image[..., :3], image[..., 3:4], image[..., 4:5])


def _sample_offsets(samples: int) -> np.ndarray:
    """Positions in the pixel, (samples, 2): a stratified grid whose rows and columns all differ."""
    side = round(samples**0.5)
    if samples < 1 or side * side != samples:
        raise ValueError(f"samples: got {samples}, want a square number (1, 4, 9, 16, ...)")
    i, j = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    x = (i + (j + 0.5) / side) / side
    y = (j + (side - 1 - i + 0.5) / side) / side
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _touched(
    solid: Surface, viewmats: np.ndarray, Ks: np.ndarray, size: tuple[int, int, int]
) -> Indices:
    """Flat indices (view, y, x) of the pixels that the mesh can touch; other rays are spared."""
    points, found = np.ascontiguousarray(solid.corners.reshape(-1, 3).T), []
    _, height, width = size
    for view, (viewmat, K) in enumerate(
        zip(viewmats.astype(np.float32), Ks.astype(np.float32), strict=True)
    ):
        seen = viewmat[:3, :3] @ points + viewmat[:3, 3:]
        low, high = np.zeros(2, int), np.array([width, height])
        if seen[2].min() >= 1e-3:  # else behind or at the camera: the projection bounds nothing
            pixels = (K[:2] @ seen) / seen[2]
            low = np.clip(np.floor(pixels.min(axis=1) - 0.01), 0, high).astype(int)
            high = np.clip(np.ceil(pixels.max(axis=1) + 0.01), 0, high).astype(int)
        rows = (view * height + np.arange(low[1], high[1])) * width
        found.append((rows[:, None] + np.arange(low[0], high[0])).ravel())
    return np.concatenate(found)


def shade(surface: Surface, face: Indices, u: Floats, v: Floats, towards_viewer: Floats) -> Floats:
    """sRGB colours (n, 3) of n points: face index, barycentrics u, v, direction to the viewer."""

    def at(corners: Floats, rows: Any = slice(None)) -> Floats:
        """Values at the points of triangles whose corners have (n, 3, k) values."""
        a, b = u[rows, None], v[rows, None]
        return corners[:, 0] * (1 - a - b) + corners[:, 1] * a + corners[:, 2] * b

    normal = at(surface.normals[face])
    facing = np.einsum("ij,ij->i", normal, towards_viewer)
    length = np.sqrt(np.einsum("ij,ij->i", normal, normal))
    normal *= (np.where(facing < 0, -1, 1) / np.maximum(length, 1e-12))[:, None]
    light = np.full((len(face), 1), AMBIENT, np.float32)
    for direction, strength in LIGHTS:
        unit = np.asarray(direction, np.float32) / np.float32(math.hypot(*direction))
        light += np.float32(strength) * np.maximum(normal @ unit[:, None], 0)
    color, texture = at(surface.colors[face]), surface.texture[face]
    for index, image in enumerate(surface.textures):
        rows = np.nonzero(texture == index)[0]
        if len(rows):
            color[rows] *= _bilinear(image, at(surface.uvs[face[rows]], rows))
    return linear_to_srgb(color * light)


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
