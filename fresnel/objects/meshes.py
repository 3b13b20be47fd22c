"""Meshes in, multi-view data with known truth out.

glTF, GLB and OBJ objects are ray-traced with Embree: texture, vertex and material colours under
three lights fixed in the world.  Shading happens in linear light; every sample is encoded to sRGB
and the samples of a pixel are averaged there, because this library composites sRGB values.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, MultiViewDataset, ObjectViews
from fresnel.data.layout import Record
from fresnel.data.records import record_folder, write_object
from fresnel.data.writing import assemble, check_target
from fresnel.host.locks import lock_if_free
from fresnel.host.provenance import core_count
from fresnel.objects.assets import Asset, Packed, embedded_assets, find_assets, zip_assets
from fresnel.objects.surface import surface
from fresnel.objects.trace import load, render
from fresnel.scene.cameras import STANDARD_FOCAL, STANDARD_RADIUS, Cameras, orbit

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
VIEW_ELEVATIONS_DEG = (-30.0, 45.0)
INPUT_ELEVATIONS_DEG = (0.0, 30.0)


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
    stretch: float = 1.0


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
    stretch: float = 1.0,
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
        stretch: at least 1.  The first record of an object shows it as it is, every further one
            with each axis scaled by a random factor between 1 / stretch and stretch (even in its
            logarithm), then centred and of longest side 1 again: training data of more shapes
            than there are objects.
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
    if not 1 <= stretch <= 4:
        raise ValueError(f"stretch: got {stretch}, want a factor in [1, 4]")
    target = Path(path)
    check_target(target, overwrite)
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
            stretch,
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
        **({"stretch": stretch} if stretch > 1 else {}),
        "splits": sorted({asset.split for asset in chosen}),
        "object_splits": {asset.name: asset.split for asset in chosen},
        "object_classes": {a.name: a.category for a in chosen if a.category},
        "licences": sorted({asset.licence for asset in chosen}),
    }
    with _workplace(target, jobs) as folder:
        try:
            records = _render_all(jobs, folder, workers, f"rendering {target.name}")
            (folder / _LOCK).unlink(missing_ok=True)
            _tidy(folder)
            assemble(folder, target, records, image_size, views, (0.0, 0.0, 0.0), meta)
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
    with lock_if_free(folder / _LOCK) as mine:
        if not mine:
            raise DatasetError(f"{target}: another process is rendering it")
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
    if not (folder / _LOCK).exists():
        return False
    with lock_if_free(folder / _LOCK) as free:
        return not free


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
        # A process takes about three seconds to start and traces about two million rays a second.
        workers = core_count() if rays > 30_000_000 else 1
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
    asset = job.asset
    try:
        solid = surface(load(asset.load())).normalised()
        records = []
        for k in range(job.inputs):
            shape, cameras = solid, _cameras(job, k)
            if k and job.stretch > 1:
                shape = solid.stretched(_factors(job, k)).normalised()
            pictures = render(shape, cameras, samples=job.samples)
            rgb, alpha = _bytes(pictures.rgb), _bytes(pictures.alpha[..., 0])
            depth = pictures.depth[..., 0]
            records.append(
                ObjectViews(
                    name=f"{asset.name}__{k}",
                    input_rgb=rgb[0],
                    input_alpha=alpha[0],
                    input_camera=cameras[0],
                    rgb=rgb[1:],
                    alpha=alpha[1:],
                    cameras=cameras[1:],
                    pivot=torch.zeros(3),
                    depth=depth[1:],
                    input_depth=depth[0],
                    attribution=asset.attribution,
                )
            )
    except ValueError as error:
        raise DatasetError(f"object {asset.name!r}: {error}") from error
    return records


def _factors(job: _Job, k: int) -> np.ndarray:
    """By how much record k's object is longer along each axis, (3,)."""
    digest = hashlib.sha256(f"{job.seed}/{job.asset.name}/{k}/stretch".encode()).digest()
    power = np.random.default_rng(list(digest)).uniform(-1.0, 1.0, 3)
    # the last bits of a power depend on the machine, and with them the data's hash
    return np.round(job.stretch**power * 4096) / 4096


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
