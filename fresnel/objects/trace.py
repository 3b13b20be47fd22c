"""Ray-tracing of surfaces with Embree.

Shading happens in linear light; every sample is encoded to sRGB and the samples of a pixel are
averaged there, because this library composites sRGB values.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fresnel.data.images import DatasetError, named
from fresnel.objects import gltf, obj
from fresnel.objects.assets import MAX_BYTES, MESHES, Asset
from fresnel.objects.surface import Floats, Surface, shade
from fresnel.render import Views
from fresnel.scene.cameras import Cameras

_RAYS_AT_ONCE = 1 << 20  # bounds memory at about 300 MB
# Where surfaces let light through: at most so many, one behind the other; a ray starts again so far
# behind the last, and ends when less than this share of it is left.
_LAYERS, _STEP, _DARK = 64, 1e-4, 1 / 512


class Model(Asset):
    """An object that is made rather than read; it comes centred and has the size it is to have."""

    def surface(self) -> Surface:
        raise NotImplementedError

    def content(self) -> str:
        """What tells it from every other."""
        raise NotImplementedError


def load(source: str | Path | Asset) -> Surface:
    """The surface of a mesh file (.glb, .gltf, .obj) or an asset; its notes are warned of, too.

    Raises:
        DatasetError: if the file is missing, of another kind, too large, or can't be read.
    """
    if isinstance(source, Model):
        return source.surface()
    asset = source if isinstance(source, Asset) else Asset(Path(source).stem, Path(source))
    name = f"{asset.source}: {asset.member}" if asset.member else str(asset.source)
    suffix = Path(asset.member or asset.source).suffix.lower()
    if suffix not in MESHES:
        raise DatasetError(f"{name}: a {suffix or 'nameless'} file; want one of {MESHES}")
    data = asset.read()
    if suffix == ".obj" and len(data) > MAX_BYTES // 4:
        raise DatasetError(f"{name}: larger than {MAX_BYTES >> 22} MB of text. Simplify it")
    with named(Path(name)):
        made = (obj if suffix == ".obj" else gltf).read(data, asset.beside)
    for note in made.notes:
        warnings.warn(f"{name}: {note}", stacklevel=2)
    return made


def render(solid: Surface, cameras: Cameras, *, samples: int = 4) -> Views:
    """Ray-trace a surface from V cameras at once.

    Args:
        solid: what `load` gives.
        cameras: batch shape (V,).
        samples: rays a pixel, a square number; they lie on a rotated grid, the same in every
            pixel, so the result is deterministic.

    Returns:
        Views float32 on the CPU: rgb (V, H, W, 3) over black, alpha (V, H, W, 1) the covered
        fraction of the pixel, depth (V, H, W, 1) the mean z-depth of what covers it.

    Raises:
        ValueError: if an argument is out of range.
    """
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    if len(cameras.batch_shape) != 1:
        raise ValueError(f"cameras: got batch shape {tuple(cameras.batch_shape)}, want (V,)")
    offsets = _sample_offsets(samples)
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
        seen = _seen(tracer, solid, centers[which], directions)
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
) -> NDArray[np.int64]:
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


def _seen(tracer: Any, solid: Surface, origins: np.ndarray, directions: np.ndarray) -> Floats:
    """rgb, alpha and alpha-weighted depth along rays, (n, 5); on through what is transparent."""
    seen = np.zeros((len(origins), 5), np.float32)
    passed = np.ones(len(origins), np.float32)  # the share of a ray that nothing has stopped yet
    start = np.zeros(len(origins), np.float32)
    rays = np.arange(len(origins))
    for _ in range(1 if solid.opaque else _LAYERS):
        begin = origins[rays] + directions[rays] * start[rays, None]
        hits = tracer.run(begin, directions[rays], output=1)
        hit = np.nonzero(hits["primID"] >= 0)[0]
        rays, face = rays[hit], hits["primID"][hit].astype(np.int64)
        color = shade(solid, face, hits["u"][hit], hits["v"][hit], -directions[rays])
        share, depth = passed[rays] * color[:, 3], start[rays] + hits["tfar"][hit]
        seen[rays, :3] += color[:, :3] * share[:, None]
        seen[rays, 3] += share
        seen[rays, 4] += depth * share
        passed[rays] *= 1 - color[:, 3]
        start[rays] = depth + _STEP
        rays = rays[passed[rays] > _DARK]
        if not len(rays):
            break
    return seen
