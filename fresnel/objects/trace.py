"""Reading meshes and ray-tracing them with Embree.

Shading happens in linear light; every sample is encoded to sRGB and the samples of a pixel are
averaged there, because this library composites sRGB values.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fresnel.data.images import DatasetError, named
from fresnel.objects.assets import MAX_BYTES, MESHES, Asset
from fresnel.objects.surface import LINEAR_COLORS, Surface, check_gltf, shade, surface
from fresnel.render import Views
from fresnel.scene.cameras import Cameras

if TYPE_CHECKING:
    import trimesh

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
    data = asset.read()
    if suffix == ".obj" and len(data) > MAX_BYTES // 4:
        raise DatasetError(f"{name}: larger than {MAX_BYTES >> 22} MB of text. Simplify it")
    if suffix in (".glb", ".gltf"):
        with named(Path(name)):
            check_gltf(data)
    beside: Any = _Beside(asset)
    try:
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type=suffix[1:], resolver=beside, process=False
        )
    except Exception as error:
        raise DatasetError(f"{name}: can't be read as {suffix[1:]} ({error})") from error
    scene.metadata[LINEAR_COLORS] = suffix in (".glb", ".gltf")
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
    if len(cameras.batch_shape) != 1:
        raise ValueError(f"cameras: got batch shape {tuple(cameras.batch_shape)}, want (V,)")
    offsets = _sample_offsets(samples)
    solid = mesh if isinstance(mesh, Surface) else surface(mesh)
    viewmats, Ks = (t.detach().cpu().double().numpy() for t in (cameras.viewmats, cameras.Ks))
    turns = viewmats[:, :3, :3].transpose(0, 2, 1)
    # Directions have z-depth 1 in their camera, so a hit's ray parameter is its z-depth.
    world_from_pixel = (turns @ np.linalg.inv(Ks)).astype(np.float32)
    centers = -np.einsum("vij,vj->vi", turns, viewmats[:, :3, 3]).astype(np.float32)
    count, height, width = len(cameras), cameras.height, cameras.width
    out = np.zeros((count * height * width, 5), np.float32)
    tracer = _tracer(solid)
    touched = []  # flat indices (view, y, x)
    for view, (x0, x1, y0, y1) in enumerate(_pixel_boxes(solid, viewmats, Ks, width, height)):
        rows = (view * height + np.arange(y0, y1)) * width
        touched.append((rows[:, None] + np.arange(x0, x1)).ravel())
    indices, limit = np.concatenate(touched), max(_RAYS_AT_ONCE // samples, 1)
    for start in range(0, len(indices), limit):
        pixels = indices[start : start + limit]
        which, row, column = np.unravel_index(pixels, (count, height, width))
        which = np.repeat(which, samples)
        px = (column[:, None] + offsets[:, 0]).ravel()
        py = (row[:, None] + offsets[:, 1]).ravel()
        homogeneous = np.stack([px, py, np.ones_like(px)], axis=1).astype(np.float32)
        directions = np.einsum("nij,nj->ni", world_from_pixel[which], homogeneous)
        out[pixels] = _trace(tracer, solid, centers[which], directions, samples)
    image = torch.from_numpy(out.reshape(count, height, width, 5))
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


def _tracer(solid: Surface) -> Any:
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    scene = EmbreeScene()
    TriangleMesh(scene, np.ascontiguousarray(solid.corners))
    return scene


def _pixel_boxes(
    solid: Surface, viewmats: np.ndarray, Ks: np.ndarray, width: int, height: int
) -> Iterator[tuple[int, int, int, int]]:
    """Per view the pixels (x0, x1, y0, y1) that the mesh can touch; rays elsewhere are spared."""
    points = np.ascontiguousarray(solid.corners.reshape(-1, 3).T)
    for viewmat, K in zip(viewmats.astype(np.float32), Ks.astype(np.float32), strict=True):
        seen = viewmat[:3, :3] @ points + viewmat[:3, 3:]
        low, high = (0, 0), (width, height)
        if seen[2].min() >= 1e-3:  # else behind or at the camera: the projection bounds nothing
            pixels = (K[:2] @ seen) / seen[2]
            low = np.clip(np.floor(pixels.min(axis=1) - 0.01), 0, high).astype(int)
            high = np.clip(np.ceil(pixels.max(axis=1) + 0.01), 0, high).astype(int)
        yield low[0], high[0], low[1], high[1]


def _trace(
    tracer: Any, solid: Surface, origins: np.ndarray, directions: np.ndarray, samples: int
) -> np.ndarray:
    """rgb, alpha, depth of the pixels that so many rays each belong to, float32 (n, 5)."""
    hits = tracer.run(origins, directions, output=1)
    rows = np.nonzero(hits["primID"] >= 0)[0]
    face = hits["primID"][rows].astype(np.int64)
    result = np.zeros((len(origins), 5), np.float32)
    result[rows, :3] = shade(solid, face, hits["u"][rows], hits["v"][rows], -directions[rows])
    result[rows, 3] = 1
    result[rows, 4] = hits["tfar"][rows]
    mean = np.zeros((len(origins) // samples, 5), np.float32)
    for k in range(samples):
        mean += result[k::samples] / np.float32(samples)
    mean[:, 4] /= np.maximum(mean[:, 3], np.float32(0.5 / samples))
    return mean
