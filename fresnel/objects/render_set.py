"""3D objects in, multi-view data with known truth out."""

import contextlib
import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, MultiViewDataset, ObjectViews
from fresnel.data.layout import Record, canonical_json, image_folders, making, put, seal
from fresnel.data.records import write_object
from fresnel.host import files
from fresnel.host.machine import core_count
from fresnel.host.pool import processes
from fresnel.objects.assets import Asset, content_of
from fresnel.objects.trace import Model, load, render
from fresnel.scene.cameras import standard_orbit

_JOURNALS = ".object-*.json"
_ALGORITHM = 2  # raise it when the pictures of one configuration change


@dataclass(frozen=True)
class Settings:
    """How objects are rendered, every one from one or more random inputs and V views.

    Objects are centred, longest side 1; a `Model` has its own size.  Record "name__k" is input
    pose k, at a random azimuth and elevation.  Its views stand at azimuths 360 i / V relative to
    the input ("even") or at a random place in each of those V sectors ("random").
    What an object gets depends on the seed and its name alone, not on the other objects.

    Args:
        views: views a record, V.
        image_size: width and height of inputs and views in pixels.
        inputs_per_object: records of an object.
        samples: rays a pixel, a square number.
        azimuths: "even" or "random".
        stretch: in [1, 4].  The first record of an object shows it as it is, every further one
            with each axis scaled by a random factor between 1 / stretch and stretch (even in its
            logarithm), then centred and of longest side 1 again: training data of more shapes
            than there are objects.
        input_azimuths_deg, input_elevations_deg, view_elevations_deg: the ranges that these are
            drawn from; azimuth 0 looks at an object's front (+Z).
    """

    views: int = 8
    image_size: int = 64
    inputs_per_object: int = 1
    seed: int = 0
    samples: int = 4
    azimuths: str = "even"
    stretch: float = 1.0
    input_azimuths_deg: tuple[float, float] = (0.0, 360.0)
    input_elevations_deg: tuple[float, float] = (0.0, 30.0)
    view_elevations_deg: tuple[float, float] = (-30.0, 45.0)

    def __post_init__(self) -> None:
        for name, holds, want in (
            ("views", self.views >= 1, "at least 1"),
            ("image_size", self.image_size >= 1, "at least 1"),
            ("inputs_per_object", self.inputs_per_object >= 1, "at least 1"),
            ("azimuths", self.azimuths in ("even", "random"), '"even" or "random"'),
            ("stretch", 1 <= self.stretch <= 4, "a factor in [1, 4]"),
        ):
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want {want}")


@dataclass(frozen=True)
class _Job:
    first: int  # index of its first record
    asset: Asset
    settings: Settings
    folder: Path


def fingerprint(assets: Sequence[Asset], **settings: Any) -> str:
    """What a rendering is found again by: the bytes that it shows, and `render_set`'s settings."""
    known: dict[Path, str] = {}
    shown = [
        asset.content()
        if isinstance(asset, Model)
        else {**vars(asset), "source": content_of(asset, known), "root": None}
        for asset in assets
    ]
    said = [_ALGORITHM, asdict(Settings(**settings)), shown]
    return hashlib.sha256(canonical_json(said)).hexdigest()[:16]


def render_set(
    assets: Sequence[Asset],
    path: str | Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    reuse: bool = False,
    also: Mapping[str, str] | None = None,
    meta: Mapping[str, Any] | None = None,
    **settings: Any,
) -> MultiViewDataset:
    """Ground-truth multi-view data of 3D objects, by `Settings`, which see.

    Finished records wait in a hidden folder beside ``path``.  Whatever stops the work, a kill
    included: the same call goes on where it stopped, and its result has the same bytes.  A second
    process that wants the same waits for the first.

    Args:
        workers: processes to render with; None takes one for each core, or this one where
            the set is so small that starting others doesn't pay.
        overwrite: replace an existing dataset at ``path``.
        reuse: return an existing dataset at ``path``; the caller's path names what is in it.
        also: texts to lie in the folder, by file name.
        meta: more for the manifest's ``meta``.

    Raises:
        DatasetError: if there is no object, two share a name, none can be rendered, or the disk
            is full.  An object that can't be read is left out, with a warning; the others stand.
    """
    how, target = Settings(**settings), Path(path)
    if not assets or len({asset.name for asset in assets}) < len(assets):
        raise DatasetError("assets: no object given, or two share a name; want unique names")
    with making(target, overwrite=overwrite, reuse=reuse) as wanted:
        if wanted:
            _render_into(target, assets, how, workers, also or {}, meta or {})
        for said in target.glob(_JOURNALS):
            files.remove(said)
    return dataset.open(target)


def _render_into(
    target: Path,
    assets: Sequence[Asset],
    settings: Settings,
    workers: int | None,
    also: Mapping[str, str],
    more: Mapping[str, Any],
) -> None:
    key, every = fingerprint(assets, **asdict(settings)), settings.inputs_per_object
    folder = target.with_name(f".{target.name}.rendering-{key}")
    for old in files.abandoned(target.parent, target.name, "rendering"):
        # of other settings, or without a word on what is done: the set that this one has replaced
        if old != folder or not any(folder.glob(_JOURNALS)):
            files.remove(old)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [_Job(k * every, asset, settings, folder) for k, asset in enumerate(assets)]
    meta: dict[str, Any] = {
        "source": "meshes",
        "elevation_is_assumed": False,
        **{name: getattr(settings, name) for name in ("seed", "samples", "azimuths")},
        "inputs_per_object": every,
        **({"stretch": settings.stretch} if settings.stretch > 1 else {}),
        "splits": sorted({asset.split for asset in assets}),
        "object_splits": {asset.name: asset.split for asset in assets},
        "object_classes": {a.name: a.category for a in assets if a.category},
        "licences": sorted({asset.licence for asset in assets}),
        **more,
    }
    rays = len(assets) * every * (settings.views + 1) * settings.image_size**2 * settings.samples
    # Processes take about three seconds to start and trace two million rays a second each.
    workers = min(workers or (core_count() if rays > 30_000_000 else 1), len(jobs))
    title, many = f"rendering {target.name}", len(jobs)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.own(folder))
            spread = stack.enter_context(processes(workers)).map if workers > 1 else map
            made = list(tqdm(spread(_render_object, jobs), title, many, unit="object", delay=2))
        records = [record for one in made for record in one.records]
        lost = {job.asset.name: one.lost for job, one in zip(jobs, made, strict=True) if one.lost}
        if not records:
            raise DatasetError(f"object {next(iter(lost))!r}: {next(iter(lost.values()))}")
        for stray in {*image_folders(folder)} - {record.folder for record in records}:
            files.remove(folder / stray)  # begun, of what is left out
        notes = defaultdict[str, list[str]](list)
        for job, one in zip(jobs, made, strict=True):
            for note in one.notes:
                notes[note].append(job.asset.name)
        meta["warnings"] = [
            f"{name!r} can't be read and is left out, as one of {many}: {why}"
            for name, why in lost.items()
        ]
        meta["warnings"] += [
            f"{note} ({len(names)} of {many} objects, {names[0]!r} for one)"
            for note, names in notes.items()
        ]
        for sentence in meta["warnings"]:
            warnings.warn(f"{target.name}: {sentence}", stacklevel=4)
        for name, text in also.items():
            files.write_atomic(folder / name, text)
        seal(folder, records, settings.image_size, settings.views, (0.0, 0.0, 0.0), meta)
        put(folder, target)
    except BrokenProcessPool:
        raise DatasetError(
            "rendering: a worker was killed, perhaps for want of memory. Call again: it goes on"
        ) from None
    except OSError as error:
        raise DatasetError(
            f"{target}: can't be written ({error}). Mend that and call again: it goes on from here"
        ) from error
    finally:
        if not any(folder.glob("image_*")):
            files.remove(folder)


class _Made(NamedTuple):
    """What came of an object: its records, what of it is not drawn, or why it is left out."""

    records: list[Record]
    notes: list[str]
    lost: str = ""


def _render_object(job: _Job) -> _Made:
    """Render one object, and say at last what was written of it. What an earlier call finished is
    kept if its files are as it left them: after a crash of the machine one may be empty."""
    asset, say, said = job.asset, job.settings, job.folder / f".object-{job.first}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json.loads(said.read_text("utf-8"))
        records = [Record(**entry) for entry in earlier["records"]]
        if all(
            files.sha256(job.folder / record.folder / file) == was
            for record in records
            for file, was in record.files.items()
        ):
            return _Made(records, earlier["notes"])
    records = []
    try:
        with warnings.catch_warnings(action="ignore"):  # said of all objects together
            whole = load(asset)
        solid = whole if isinstance(asset, Model) else whole.normalised()
        for k in range(say.inputs_per_object):
            random, shape = chance(say.seed, asset.name, str(k)), solid
            start = random.uniform(*say.input_azimuths_deg)
            input_elevation = random.uniform(*say.input_elevations_deg)
            others = random.uniform(*say.view_elevations_deg, say.views)
            elevations = np.append(input_elevation, others)
            jitter = random.uniform(0.0, 1.0, say.views) if say.azimuths == "random" else 0.0
            relative = (np.arange(say.views) + jitter) * (360.0 / say.views)
            azimuths = torch.from_numpy(np.append(start, start + relative))
            cameras = standard_orbit(azimuths, torch.from_numpy(elevations), say.image_size)
            if k and say.stretch > 1:
                power = chance(say.seed, asset.name, f"{k}/stretch").uniform(-1.0, 1.0, 3)
                # the last bits of a power depend on the machine, and with them the data's hash
                shape = solid.stretched(np.round(say.stretch**power * 4096) / 4096).normalised()
            pictures = render(shape, cameras, samples=say.samples)
            rgb, alpha = _bytes(pictures.rgb), _bytes(pictures.alpha[..., 0])
            depth = pictures.depth[..., 0]
            views = ObjectViews(
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
            records.append(write_object(job.folder, job.first + k, views))
    except ValueError as error:
        return _Made([], [], str(error))
    done = {"records": [vars(record) for record in records], "notes": whole.notes}
    files.write_atomic(said, json.dumps(done))
    return _Made(records, list(whole.notes))


def chance(seed: int, name: str, what: str) -> np.random.Generator:
    """Random numbers for one thing of one object, whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}/{name}/{what}".encode()).digest()
    return np.random.default_rng(list(digest))


def _bytes(values: Tensor) -> Tensor:
    return (values * 255 + 0.5).floor().to(torch.uint8)
