"""Meshes in, multi-view data with known truth out.

glTF, GLB and OBJ objects are ray-traced with Embree: texture, vertex and material colours under
three lights fixed in the world.  Shading happens in linear light; every sample is encoded to sRGB
and the samples of a pixel are averaged there, because this library composites sRGB values.
"""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fresnel import dataset
from fresnel._layouts import Record, named
from fresnel._objects import Asset, Packed, embedded_assets, find_assets, zip_assets
from fresnel._records import record_folder, write_object
from fresnel._surfaces import LINEAR_COLORS, Surface, check_gltf, shade, surface
from fresnel.cameras import STANDARD_FOCAL, STANDARD_RADIUS, Cameras, orbit
from fresnel.dataset import DatasetError, MultiViewDataset, ObjectViews
from fresnel.render import Views

if TYPE_CHECKING:
    import trimesh

try:
    import fcntl
except ImportError:  # Windows: no lock, so don't start two renderings of one dataset
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Asset",
    "Packed",
    "embedded_assets",
    "find_assets",
    "load",
    "render",
    "render_set",
    "zip_assets",
]

_ALGORITHM = 1  # raise it when the pictures of one configuration change
_RAYS_AT_ONCE = 1 << 20  # bounds memory at about 300 MB
_MAX_FILE_BYTES = 1 << 28
_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
VIEW_ELEVATIONS_DEG = (-30.0, 45.0)
INPUT_ELEVATIONS_DEG = (0.0, 30.0)


def load(source: str | Path | bytes | Packed) -> trimesh.Scene:
    """A scene from a file (.glb, .gltf, .obj, .ply, .stl, .off), a mesh in a zip file, or a GLB.

    Materials and textures that the file names are read from its own folder or below only.

    Raises:
        DatasetError: if the file is missing, of another kind, too large, or can't be parsed.
    """
    import trimesh

    read: Callable[[str], bytes] | None = None
    if isinstance(source, bytes):
        name, suffix, data = "mesh bytes", ".glb", source
        if not source.startswith(b"glTF"):
            raise DatasetError("mesh bytes: not a binary glTF (GLB); want a file for other formats")
    elif isinstance(source, Packed):
        name, suffix = f"{source.source}: {source.member}", Path(source.member).suffix.lower()
        data, read = source.read(), source.read
    else:
        path = Path(source)
        name, suffix = str(path), path.suffix.lower()
        if suffix not in _SUFFIXES:
            raise DatasetError(f"{path}: a {suffix or 'nameless'} file; want one of {_SUFFIXES}")
        if not path.is_file():
            raise DatasetError(f"{path}: no such file")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise DatasetError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MB. Simplify it")
        data, read = path.read_bytes(), _beside(path)
    if suffix == ".obj" and len(data) > _MAX_FILE_BYTES // 4:
        raise DatasetError(f"{name}: larger than {_MAX_FILE_BYTES >> 22} MB of text. Simplify it")
    if suffix in (".glb", ".gltf"):
        named(Path(name), lambda: check_gltf(data))
    try:
        scene = trimesh.load_scene(
            io.BytesIO(data),
            file_type=suffix[1:],
            resolver=None if read is None else _resolver(read),
            process=False,
        )
    except Exception as error:
        raise DatasetError(f"{name}: can't be read as {suffix[1:]} ({error})") from error
    scene.metadata[LINEAR_COLORS] = suffix in (".glb", ".gltf")
    return scene


def _beside(path: Path) -> Callable[[str], bytes]:
    folder = path.parent.resolve()

    def read(name: str) -> bytes:
        file = (folder / name.strip().replace("\\", "/")).resolve()
        if not file.is_relative_to(folder):
            raise DatasetError(f"{path}: refuses {name!r}: it leads out of the folder")
        if file.is_file() and file.stat().st_size > _MAX_FILE_BYTES:
            raise DatasetError(f"{file}: larger than {_MAX_FILE_BYTES >> 20} MB. Simplify it")
        return file.read_bytes()

    return read


def _resolver(read: Callable[[str], bytes]) -> Any:
    """trimesh's way of asking for a file that another file names."""
    from trimesh.resolvers import Resolver

    class Reader(Resolver):
        def __init__(self) -> None:
            pass

        def get(self, key: Any) -> bytes:
            name = key.decode() if isinstance(key, bytes) else str(key)
            try:
                return read(name)
            except (DatasetError, OSError) as error:  # trimesh goes on without: a plain surface
                raise FileNotFoundError(str(error)) from error

        def write(self, name: str, data: Any) -> None:
            raise NotImplementedError

        def namespaced(self, namespace: str) -> Any:
            return self

        def keys(self) -> list[str]:
            return []

    return Reader()


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
    viewmats = cameras.viewmats.detach().cpu().double().numpy()
    inverse_Ks = np.linalg.inv(cameras.Ks.detach().cpu().double().numpy())
    Ks = cameras.Ks.detach().cpu().double().numpy()
    count, height, width = len(cameras), cameras.height, cameras.width
    out = np.zeros((count * height * width, 5), np.float32)
    tracer = _tracer(solid)
    boxes = _pixel_boxes(solid, viewmats, Ks, width, height)
    limit = max(_RAYS_AT_ONCE // samples, 1)
    for pixels in _chunks(boxes, width, height, limit):
        out[pixels] = _trace(tracer, solid, pixels, offsets, viewmats, inverse_Ks, width, height)
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
) -> list[tuple[int, int, int, int]]:
    """Per view the pixels (x0, x1, y0, y1) that the mesh can touch; rays elsewhere are spared."""
    points = np.ascontiguousarray(solid.corners.reshape(-1, 3).T)
    boxes = []
    for viewmat, K in zip(viewmats, Ks, strict=True):
        seen = viewmat[:3, :3].astype(np.float32) @ points + viewmat[:3, 3:].astype(np.float32)
        if seen[2].min() < 1e-3:  # behind or at the camera: the projection bounds nothing
            boxes.append((0, width, 0, height))
            continue
        pixels = (K[:2].astype(np.float32) @ seen) / seen[2]
        low, high = np.floor(pixels.min(axis=1) - 0.01), np.ceil(pixels.max(axis=1) + 0.01)
        x0, y0 = (int(value) for value in np.clip(low, 0, (width, height)))
        x1, y1 = (int(value) for value in np.clip(high, 0, (width, height)))
        boxes.append((x0, x1, y0, y1))
    return boxes


def _chunks(
    boxes: Sequence[tuple[int, int, int, int]], width: int, height: int, limit: int
) -> Iterator[np.ndarray]:
    """Flat indices (view, y, x) of the pixels in the boxes, at most ``limit`` at a time."""
    waiting: list[np.ndarray] = []
    size = 0
    for view, (x0, x1, y0, y1) in enumerate(boxes):
        rows = (view * height + np.arange(y0, y1)) * width
        box = (rows[:, None] + np.arange(x0, x1)).ravel()
        for part in np.array_split(box, max(1, -(-len(box) // limit))):
            if size + len(part) > limit and waiting:
                yield np.concatenate(waiting)
                waiting, size = [], 0
            waiting.append(part)
            size += len(part)
    if size:
        yield np.concatenate(waiting)


def _trace(
    tracer: Any,
    solid: Surface,
    pixels: np.ndarray,
    offsets: np.ndarray,
    viewmats: np.ndarray,
    inverse_Ks: np.ndarray,
    width: int,
    height: int,
) -> np.ndarray:
    """rgb, alpha, depth of some pixels, float32 (n, 5)."""
    view, rest = np.divmod(pixels, width * height)
    y, x = np.divmod(rest, width)
    samples = len(offsets)
    view = np.repeat(view, samples)
    px = (x[:, None] + offsets[:, 0]).ravel()
    py = (y[:, None] + offsets[:, 1]).ravel()
    # Directions have z-depth 1 in their camera, so a hit's ray parameter is its z-depth.
    world_from_pixel = (viewmats[:, :3, :3].transpose(0, 2, 1) @ inverse_Ks).astype(np.float32)
    homogeneous = np.stack([px, py, np.ones_like(px)], axis=1).astype(np.float32)
    directions = np.einsum("nij,nj->ni", world_from_pixel[view], homogeneous)
    centers = -np.einsum("vji,vj->vi", viewmats[:, :3, :3], viewmats[:, :3, 3]).astype(np.float32)
    hits = tracer.run(centers[view], directions, output=1)
    rows = np.nonzero(hits["primID"] >= 0)[0]
    face = hits["primID"][rows].astype(np.int64)
    result = np.zeros((len(view), 5), np.float32)
    result[rows, :3] = shade(solid, face, hits["u"][rows], hits["v"][rows], -directions[rows])
    result[rows, 3] = 1
    result[rows, 4] = hits["tfar"][rows]
    mean = np.zeros((len(pixels), 5), np.float32)
    for k in range(samples):
        mean += result[k::samples] / np.float32(samples)
    mean[:, 4] /= np.maximum(mean[:, 3], np.float32(0.5 / samples))
    return mean


# --- data from objects -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    first: int  # index of its first record
    asset: Asset
    views: int
    image_size: int
    inputs: int
    seed: int
    samples: int
    azimuths: str


def render_set(
    assets: Iterable[Asset],
    path: str | Path,
    *,
    views: int = 8,
    image_size: int = 64,
    inputs_per_object: int = 1,
    seed: int = 0,
    samples: int = 4,
    azimuths: Literal["even", "random"] = "even",
    workers: int | None = None,
    split: str | None = None,
    overwrite: bool = False,
) -> MultiViewDataset:
    """Ground-truth multi-view data: every object from one or more random inputs and V views.

    Objects are centred, longest side 1.  Record "name__k" is input pose k: a random azimuth and
    an elevation in [0, 30] degrees.  Its views stand at azimuths 360 i / V relative to the input
    ("even") or at a random place in each of those V sectors ("random"), elevations in [-30, 45].
    What an object gets depends on the seed and its name alone, not on the other objects.

    Finished records wait in a hidden folder beside ``path``.  Whatever stops the work, a kill
    included: the same call goes on where it stopped, and its result has the same bytes.

    Args:
        views: views a record, V.
        image_size: width and height of inputs and views in pixels.
        samples: rays a pixel, a square number.
        workers: processes to render with; None takes one for each core, or this one where
            the set is so small that starting others doesn't pay.
        split: keep only the assets of this split.
        overwrite: replace an existing dataset at ``path``.

    Raises:
        DatasetError: if there is no object, two share a name, one can't be rendered, another
            process is writing this dataset, or the disk is full.
    """
    chosen = [asset for asset in assets if split in (None, asset.split)]
    names = [asset.name for asset in chosen]
    if not chosen:
        raise DatasetError(f"assets: no object{f' of split {split!r}' if split else ''} given")
    if len(set(names)) < len(names):
        raise DatasetError("assets: two objects share a name; want unique names")
    for name, value in (
        ("views", views),
        ("image_size", image_size),
        ("inputs", inputs_per_object),
    ):
        if value < 1:
            raise ValueError(f"{name}: got {value}, want at least 1")
    if azimuths not in ("even", "random"):
        raise ValueError(f'azimuths: got {azimuths!r}, want "even" or "random"')
    target = Path(path)
    dataset.check_target(target, overwrite)
    jobs = [
        _Job(
            k * inputs_per_object,
            asset,
            views,
            image_size,
            inputs_per_object,
            seed,
            samples,
            azimuths,
        )
        for k, asset in enumerate(chosen)
    ]
    meta = {
        "source": "meshes",
        "elevation_is_assumed": False,
        "seed": seed,
        "samples": samples,
        "azimuths": azimuths,
        "inputs_per_object": inputs_per_object,
        "splits": sorted({asset.split for asset in chosen}),
        "object_splits": {asset.name: asset.split for asset in chosen},
        "licences": sorted({asset.licence for asset in chosen}),
    }
    with _workplace(target, jobs) as folder:
        try:
            records = _render_all(jobs, folder, workers, f"rendering {target.name}")
            (folder / _LOCK).unlink(missing_ok=True)
            _tidy(folder)
            dataset.assemble(folder, target, records, image_size, views, (0.0, 0.0, 0.0), meta)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DatasetError(
                f"{target}: the disk is full. Free some space and call again: it goes on from here"
                if full
                else f"{target}: can't be written ({error})"
            ) from error
    return dataset.open(target)


_LOCK = ".lock"


@contextmanager
def _workplace(target: Path, jobs: Sequence[_Job]) -> Iterator[Path]:
    """The hidden folder beside ``target`` that collects these jobs' records, locked."""
    said = hashlib.sha256(f"{_ALGORITHM}\n".encode())
    for job in jobs:
        source = job.asset.source
        about = source.stat() if source.is_file() else None
        stamp = (about.st_size, about.st_mtime_ns) if about else ()
        said.update(f"{job!r}{stamp}\n".encode())
    folder = target.parent / f".{target.name}.rendering-{said.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DatasetError(f"{target}: another process is rendering it") from None
        for old in target.parent.glob(f".{target.name}.rendering-*"):
            if old != folder and not _is_locked(old):
                shutil.rmtree(old, ignore_errors=True)  # of other settings: never to be resumed
        try:
            yield folder
        finally:
            if not any(folder.glob("image_*")):
                shutil.rmtree(folder, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove what killed workers left half done."""
    for scratch in folder.glob(".working-*"):
        shutil.rmtree(scratch, ignore_errors=True)


def _is_locked(folder: Path) -> bool:
    if fcntl is None:
        return False
    try:
        with (folder / _LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _render_all(
    jobs: Sequence[_Job], folder: Path, workers: int | None, title: str
) -> list[Record]:
    done: dict[int, list[Record]] = {}
    waiting = []
    for job in jobs:
        found = [_finished(folder, job, k) for k in range(job.inputs)]
        if all(found):
            done[job.first] = [record for record in found if record]
        else:
            waiting.append(job)
    if workers is None:
        pictures = sum(job.inputs * (job.views + 1) for job in waiting)
        rays = pictures * jobs[0].image_size ** 2 * jobs[0].samples
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # A process takes about three seconds to start and traces about two million rays a second.
        workers = cores or 1 if rays > 30_000_000 else 1
    bar = tqdm(total=len(jobs), initial=len(done), desc=title, unit="object", delay=2)
    with bar:
        for job, records in _rendered(waiting, folder, workers):
            done[job.first] = records
            bar.update()
    return [record for job in jobs for record in done[job.first]]


def _rendered(
    jobs: Sequence[_Job], folder: Path, workers: int
) -> Iterator[tuple[_Job, list[Record]]]:
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, _write_object(job, folder)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(jobs)), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            yield from zip(jobs, pool.map(_write_object, jobs, repeat(folder)), strict=True)
        except BrokenProcessPool:
            raise DatasetError(
                "rendering: a worker was killed, perhaps for want of memory. Call again: it goes on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _write_object(job: _Job, folder: Path) -> list[Record]:
    """Render one object; each record appears in ``folder`` by a rename, whole or not at all."""
    records = []
    with tempfile.TemporaryDirectory(prefix=".working-", dir=folder) as scratch:
        for k, views in enumerate(_render_object(job)):
            record = write_object(Path(scratch), job.first + k, views)
            place = folder / record.folder
            if place.exists():
                shutil.rmtree(place)
            (Path(scratch) / record.folder).rename(place)
            records.append(record)
    return records


def _finished(folder: Path, job: _Job, k: int) -> Record | None:
    """The record of pose k, if an earlier call finished it."""
    name = record_folder(job.first + k)
    if not (folder / name).is_dir():
        return None
    files = {
        path.relative_to(folder / name).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }
    return Record(f"{job.asset.name}__{k}", name, job.asset.attribution, files)


def _render_object(job: _Job) -> list[ObjectViews]:
    asset, size = job.asset, job.image_size
    try:
        solid = surface(load(asset.load())).normalised()
    except ValueError as error:
        raise DatasetError(f"object {asset.name!r}: {error}") from error
    sets = [_cameras(job, k) for k in range(job.inputs)]
    together = Cameras(
        torch.cat([cameras.viewmats for cameras in sets]),
        torch.cat([cameras.Ks for cameras in sets]),
        size,
        size,
    )
    pictures = render(solid, together, samples=job.samples)
    rgb, alpha = _bytes(pictures.rgb), _bytes(pictures.alpha[..., 0])
    depth = pictures.depth[..., 0]
    records = []
    for k, cameras in enumerate(sets):
        at = k * (job.views + 1)
        rest = slice(at + 1, at + 1 + job.views)
        records.append(
            ObjectViews(
                name=f"{asset.name}__{k}",
                input_rgb=rgb[at],
                input_alpha=alpha[at],
                input_camera=cameras[0],
                rgb=rgb[rest],
                alpha=alpha[rest],
                cameras=cameras[1:],
                pivot=torch.zeros(3),
                depth=depth[rest],
                input_depth=depth[at],
                attribution=asset.attribution,
            )
        )
    return records


def _bytes(values: Tensor) -> Tensor:
    return (values * 255 + 0.5).floor().to(torch.uint8)


def _cameras(job: _Job, k: int) -> Cameras:
    """The input camera of pose k, followed by its views' cameras."""
    digest = hashlib.sha256(f"{job.seed}/{job.asset.name}/{k}".encode()).digest()
    generator = np.random.default_rng(list(digest))
    start = generator.uniform(0.0, 360.0)
    input_elevation = generator.uniform(*INPUT_ELEVATIONS_DEG)
    elevations = generator.uniform(*VIEW_ELEVATIONS_DEG, job.views)
    jitter = generator.uniform(0.0, 1.0, job.views) if job.azimuths == "random" else 0.0
    relative = (np.arange(job.views) + jitter) * (360.0 / job.views)
    azimuths = np.concatenate([[start], start + relative])
    return orbit(
        torch.from_numpy(azimuths),
        torch.from_numpy(np.concatenate([[input_elevation], elevations])),
        STANDARD_RADIUS,
        pivot=(0.0, 0.0, 0.0),
        focal_px=STANDARD_FOCAL * job.image_size,
        width=job.image_size,
        height=job.image_size,
    )
