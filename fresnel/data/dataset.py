"""Multi-view datasets on disk: read, write, hash.

A dataset is a set of objects, each with one input image and V views of it from known cameras.
`write` is atomic and binds what it wrote to a content hash; `open` reads that layout, the
original experiment's, and what other tools write (`FORMATS`); `export` writes
what other tools read, `write_shards` and `stream` what doesn't fit on a disk;
`MultiViewDataset.verify` tells whether a byte has changed since.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fresnel.data import captures as captured
from fresnel.data import co3d, colmap, shards, transforms
from fresnel.data import layout as _layouts
from fresnel.data.captures import Capture
from fresnel.data.images import DatasetError, InputImages, load_image, load_images, scaled
from fresnel.data.layout import MANIFEST, DatasetChanged, Record, canonical_json, sha256
from fresnel.data.records import (
    ObjectViews,
    ViewTensors,
    read_object,
    stack_cameras,
    stack_depths,
    view_folders,
)
from fresnel.data.shards import stream, write_shards
from fresnel.data.transforms import export
from fresnel.data.writing import store
from fresnel.host.files import locked
from fresnel.host.machine import cache_dir, core_count
from fresnel.host.pool import processes

__all__ = [
    "DatasetChanged",
    "DatasetError",
    "InputImages",
    "MultiViewDataset",
    "ObjectViews",
    "ViewTensors",
    "export",
    "load_image",
    "load_images",
    "open",
    "recognises",
    "stream",
    "write",
    "write_shards",
]


FORMATS = (transforms, colmap, co3d)
"""Readers of other tools' data: each `recognises` a folder, and `read`s its `Capture`s."""
_RECORDS_A_WORKER = 300  # about three seconds of decoding, which is what a process costs to start
_WANTED = (
    f"not a dataset; want a {MANIFEST} of ours, folders image_0000 ... with input.png and "
    "view_000/rgb.png, a transforms.json, a COLMAP model, CO3D's frame_annotations.jgz, a folder "
    "of such folders, or shards with a shards.json"
)


class NotADataset(DatasetError):
    """Nothing there that `open` knows; it may be 3D objects, which `objects.sources.open` reads."""


@dataclass(frozen=True, eq=False)
class _Part:
    """One object of a dataset that lies in a folder of another's."""

    dataset: MultiViewDataset
    row: int

    def __len__(self) -> int:
        record = self.dataset.records[self.row]
        return self.dataset.views_per_object if isinstance(record, Record) else len(record)


@dataclass(frozen=True)
class MultiViewDataset:
    """A dataset on disk; objects are read when asked for.

    ``layout`` is "fresnel", "original", "captures" or "set" (folders of these).  ``image_size`` is
    the side of its (square) views in pixels, ``views_per_object`` the most that an object has
    (captures may differ).  Every view comes over black, whatever it is stored over.
    ``content_hash`` stands for the whole dataset, for a `subset` too: see `is_subset`.  What is
    decoded is compared with the hashes of its files first: other bytes are a `DatasetChanged`.
    """

    path: Path
    layout: str
    names: tuple[str, ...]
    content_hash: str
    meta: dict[str, Any]
    image_size: int
    views_per_object: int
    is_subset: bool = False
    records: tuple[Record | Capture | _Part, ...] = field(default=(), repr=False)
    stored_over: tuple[float, ...] = (0.0, 0.0, 0.0)
    """The sRGB colour that the files' views are over; readers need not care."""

    background = (0.0, 0.0, 0.0)
    """What views come over."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ObjectViews:
        record = self.records[index]
        if isinstance(record, Capture):
            return captured.read(self.path, record, self.image_size)
        if isinstance(record, _Part):
            views = record.dataset[record.row]
            return replace(views, name=self.names[index], **scaled(views, self.image_size))
        base = _layouts.inside(self.path, record.folder)

        def load(file: str) -> bytes:
            if file not in record.files:
                raise DatasetError(f"{base / file}: is not among the dataset's files")
            return _layouts.read_checked(self.path, f"{record.folder}/{file}", record.files[file])

        shape = (self.image_size, self.views_per_object)
        original = self.layout == "original"
        return read_object(base, record, *shape, load, self.stored_over, original)

    def subset(self, which: Sequence[int] | Sequence[str] | slice) -> MultiViewDataset:
        """The same dataset with only some objects, by index or by name."""
        if isinstance(which, slice):
            rows = list(range(len(self)))[which]
        else:
            known = {name: row for row, name in enumerate(self.names)}
            missing = [w for w in which if isinstance(w, str) and w not in known]
            if missing:
                raise DatasetError(f"{self.path}: has no object named {missing[0]!r}")
            rows = [known[w] if isinstance(w, str) else range(len(self))[int(w)] for w in which]
        if not rows:
            raise DatasetError(f"{self.path}: the subset is empty; want at least one object")
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            records=tuple(self.records[row] for row in rows),
            is_subset=True,
        )

    def inputs(self) -> InputImages:
        """The input images; scaled to ``image_size`` if they are not all of one size."""
        return self._inputs(self._read_all())

    def tensors(self, size: int | None = None, device: torch.device | str = "cpu") -> ViewTensors:
        """Everything in memory, inputs and views scaled to ``size`` (None: as stored).

        Raises:
            DatasetError: if the objects differ in their number of views; open with ``views=``.
        """
        counts = {len(record) for record in self.records if not isinstance(record, Record)}
        if len(counts) > 1:
            raise DatasetError(
                f"{self.path}: objects have {min(counts)} to {max(counts)} views; want as many of "
                f"each. Open it with views={min(counts)} or fewer"
            )
        objects = self._read_all()
        inputs = self._inputs(objects)
        found = ViewTensors(
            names=self.names,
            inputs=inputs if size is None else inputs.resized(size),
            rgb=torch.stack([o.rgb for o in objects]),
            alpha=torch.stack([o.alpha for o in objects]),
            cameras=stack_cameras([o.cameras for o in objects]),
            pivots=torch.stack([o.pivot for o in objects]),
            depth=stack_depths([o.depth for o in objects]),
            content_hash=self.content_hash,
        )
        return replace(found, **scaled(found, size or self.image_size)).to(device)

    def verify(self) -> None:
        """Read every byte again.

        Raises:
            DatasetChanged: if a file of the whole dataset (not only of a subset) was edited,
                added or removed since it was written (since `open`, for what others wrote; of
                captures only what is read counts, and a subset checks its own).
        """
        parts = {r.dataset.path: r.dataset for r in self.records if isinstance(r, _Part)}
        for dataset in parts.values():
            dataset.verify()
        captures = [record.files for record in self.records if isinstance(record, Capture)]
        _layouts.compare(self.path, {path: each[path] for each in captures for path in each})
        if self.layout not in ("fresnel", "original"):
            return
        now = open(self.path)  # the original's layout is hashed anew here
        if self.layout == "fresnel":
            listed = [record for record in now.records if isinstance(record, Record)]
            want = {f"{r.folder}/{file}": r.files[file] for r in listed for file in r.files}
            folders = _layouts.image_folders(self.path)
            found = [f"{f}/{file}" for f in folders for file in _layouts.data_files(self.path, f)]
            _layouts.compare(self.path, want, found)
        if now.content_hash != self.content_hash:
            raise _layouts.changed(self.path, "changed")

    def _read_all(self) -> list[ObjectViews]:
        # Records are many small files, whose decoding is Python's work: more threads than two only
        # slow each other down, so a large set goes to processes.
        light = all(isinstance(record, Record) for record in self.records)
        workers = min(core_count(), len(self) // _RECORDS_A_WORKER)
        if not light or workers < 3:
            with ThreadPoolExecutor(2 if light else None) as pool:
                return list(pool.map(self.__getitem__, range(len(self))))
        rows = np.array_split(np.arange(len(self)), workers)
        with processes(workers) as pool:
            parts = pool.map(_read_part, [self.subset(part.tolist()) for part in rows])
            return [views for part in parts for views in part]

    def _inputs(self, objects: list[ObjectViews]) -> InputImages:
        singles = [views.input() for views in objects]
        shapes = {single.rgb.shape[1:3] for single in singles}
        if len(shapes) > 1 or len({*next(iter(shapes))}) > 1:
            singles = [single.resized(self.image_size) for single in singles]
        return InputImages(
            self.names,
            torch.cat([single.rgb for single in singles]),
            torch.cat([single.alpha for single in singles]),
            stack_cameras([single.cameras[0] for single in singles]),
            stack_depths([None if s.depth is None else s.depth[0] for s in singles]),
            bool(self.meta.get("elevation_is_assumed", False)),
        )


def _read_part(part: MultiViewDataset) -> list[ObjectViews]:
    return [part[i] for i in range(len(part))]


def open(
    path: str | Path,
    *,
    image_size: int | None = None,
    views: int | None = None,
    cache: str | Path | None = None,
) -> MultiViewDataset:
    """Open multi-view data, whoever wrote it.

    * Our layout: a folder with a manifest.json.
    * The original experiment's: views have no alpha, so it is estimated as "any channel > 0" and
      ``meta["alpha_source"]`` says so.  Its input camera stands at the world origin and looks
      along -Z; focal lengths equal the image size; the orbit's pivot is the world origin.
    * Captures (`FORMATS`): a transforms.json of nerfstudio or Blender, a COLMAP
      model, a CO3D category, or a folder of such folders, one object each (stored
      datasets may be among them; their objects are resized where they differ).  ``meta`` tells
      which view acts as the input, where alpha came from ("mask", "file", or "none": opaque
      photographs), where the pivot was estimated, and how the world was turned to put Y up.
    * WebDataset shards (`write_shards`), unpacked once, into ``cache``; `stream` needs no disk.

    Args:
        image_size: side of the views in pixels, for captures (None: the smallest capture's, at most
            512, less where an object's views would not fit into memory).
        views: take so many evenly spaced views of each capture (None: all).
        cache: folder for what is unpacked; None: ~/.cache/fresnel (or below
            $XDG_CACHE_HOME).

    Raises:
        NotADataset: if nothing is recognised.
        DatasetError: if a description is damaged, or a stored set is asked for another size.
        DatasetChanged: if our manifest was edited.
    """
    root = Path(path)
    if not root.is_dir():
        if root.exists():
            raise NotADataset(f"{path}: {_WANTED}")
        raise DatasetError(f"{path}: no such folder or file")
    if shards.recognises(root) and not _layouts.is_ours(root):
        return open(_unpacked(root, cache), image_size=image_size, views=views)
    if _is_stored(root):
        if image_size is not None or views is not None:
            raise DatasetError(
                f"{root}: image_size= and views= are for captures, this set is stored. Read it "
                "with tensors(size=), or write it anew"
            )
        return _open_ours(root) if _layouts.is_ours(root) else _open_original(root)
    if here := captures_in(root, ""):
        return _open_captures(root, here, image_size, views)
    inner = [root / name for name in _folders(root) if _is_stored(root / name)]
    if inner:
        return _open_set(root, inner, image_size)
    return _open_captures(root, captures_below(root), image_size, views)


def _open_ours(root: Path) -> MultiViewDataset:
    manifest, records = _layouts.parse_manifest(root)
    if _layouts.content_hash(records, manifest) != manifest.get("content_hash"):
        raise DatasetChanged(
            f"{root / MANIFEST}: was edited: its content_hash doesn't match its entries. "
            "Restore it, or write the dataset anew"
        )
    manifest["schema_version"] = _layouts.SCHEMA_VERSION  # an older one's hash left out `meta`
    return MultiViewDataset(
        path=root,
        layout="fresnel",
        names=tuple(record.name for record in records),
        content_hash=_layouts.content_hash(records, manifest),
        meta=manifest["meta"],
        image_size=manifest["image_size"],
        views_per_object=manifest["views_per_object"],
        records=records,
        stored_over=tuple(float(value) for value in manifest["background"]),
    )


def _open_original(root: Path) -> MultiViewDataset:
    records = _layouts.hashed(root)
    folders = view_folders(records[0])
    if not folders:
        raise DatasetError(f"{root / records[0].folder}: has no view_000. Restore or remove it")
    first = _layouts.inside(root, f"{records[0].folder}/{folders[0]}/rgb.png")
    return MultiViewDataset(
        path=root,
        layout="original",
        names=tuple(record.name for record in records),
        content_hash=_layouts.content_hash(records, None),
        meta={"alpha_source": "estimated", "elevation_is_assumed": True},
        image_size=load_image(first)[0].shape[0],
        views_per_object=len(folders),
        records=records,
    )


def _unpacked(root: Path, cache: str | Path | None) -> Path:
    """The folder of the dataset that these shards hold, unpacked unless that was done before."""
    index = shards.index_of(root)
    key = sha256(canonical_json(index))[:16]
    target = (Path(cache) if cache is not None else cache_dir()) / f"{root.resolve().stem}-{key}"
    with locked(target.with_name(f".{target.name}.lock"), f"{target}: another process unpacks it"):
        if not (target / MANIFEST).is_file():
            meta = {**index["meta"], "unpacked_from": root.name}
            store(target, shards.checked(root, index), meta=meta)
    return target


def _open_captures(
    root: Path, found: list[Capture], image_size: int | None, views: int | None
) -> MultiViewDataset:
    if not found:
        raise NotADataset(f"{root}: {_WANTED}")
    names = tuple(capture.name for capture in found)
    if len(set(names)) < len(names):
        raise DatasetError(f"{root}: two captures share a name; rename a folder")
    chosen, side, meta = captured.prepare(root, found, image_size, views)
    digests = _layouts.digests(root, (path for capture in chosen for path in capture.paths))
    records = []
    for capture in chosen:
        missing = [path for path in capture.paths if path not in digests]
        if missing:
            raise DatasetError(
                f"{root / missing[0]}: no such file, but {capture.descriptions[0]} names it. "
                "Restore it, or describe the capture anew"
            )
        records.append(replace(capture, files={path: digests[path] for path in capture.paths}))
    lines = [f"{file}\0{digest}" for file, digest in sorted(digests.items())]
    taken = [[capture.name, [view.image for view in capture.views]] for capture in chosen]
    said = {"image_size": side, "views": taken}  # what is read of the files
    lines.append(f"open\0{sha256(canonical_json(said))}")
    return MultiViewDataset(
        path=root,
        layout="captures",
        names=names,
        content_hash="sha256:" + sha256("\n".join(lines).encode()),
        meta=meta,
        image_size=side,
        views_per_object=max(len(capture) for capture in chosen),
        records=tuple(records),
    )


def captures_in(root: Path, folder: str) -> list[Capture]:
    """What other tools' description in ``root / folder`` says; [] where no reader knows it.

    Raises:
        DatasetError: if a description is recognised but damaged.
    """
    reader = next((each for each in FORMATS if each.recognises(root / folder)), None)
    return reader.read(root, folder) if reader else []


def captures_below(root: Path) -> list[Capture]:
    """The captures in the folders directly inside ``root``."""
    return [capture for name in _folders(root) for capture in captures_in(root, name)]


def _folders(root: Path) -> list[str]:
    """Folders directly inside ``root`` that are neither hidden nor links out of it."""
    found = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return sorted(p.name for p in found if p.resolve().is_relative_to(root.resolve()))


def _is_stored(folder: Path) -> bool:
    """Whether a folder is a dataset of our layout or the original's."""
    return _layouts.is_ours(folder) or bool(_layouts.image_folders(folder))


def _open_set(root: Path, stored: list[Path], image_size: int | None) -> MultiViewDataset:
    """Stored datasets, and captures beside them, as one; objects are named FOLDER/NAME."""
    parts = [open(folder) for folder in stored]
    others = [root / name for name in _folders(root) if root / name not in stored]
    found = [(folder, captures_in(folder, "")) for folder in others]
    parts += [_open_captures(folder, inner, None, None) for folder, inner in found if inner]
    side = image_size or min(part.image_size for part in parts)
    hashes = sorted([part.path.name, part.content_hash] for part in parts)
    assumed = any(part.meta.get("elevation_is_assumed", False) for part in parts)
    rows = [(part, row) for part in parts for row in range(len(part))]
    return MultiViewDataset(
        path=root,
        layout="set",
        names=tuple(f"{part.path.name}/{part.names[row]}" for part, row in rows),
        content_hash="sha256:" + sha256(canonical_json([hashes, side])),
        meta={
            "source": "set",
            "elevation_is_assumed": assumed,
            "parts": {part.path.name: part.meta for part in parts},
        },
        image_size=side,
        views_per_object=max(part.views_per_object for part in parts),
        records=tuple(_Part(part, row) for part, row in rows),
    )


def recognises(path: str | Path) -> bool:
    """Whether `open` reads what is there; else it may be 3D objects (`objects.sources.open`)."""
    root = Path(path)
    if not root.is_dir():
        return False
    if _is_stored(root) or shards.recognises(root):
        return True
    inner = any(_is_stored(root / name) for name in _folders(root))
    return inner or bool(captures_in(root, "") or captures_below(root))


def write(
    path: str | Path,
    objects: Iterable[ObjectViews],
    *,
    background: Sequence[float] = (0.0, 0.0, 0.0),
    meta: dict[str, Any],
    overwrite: bool = False,
    total: int | None = None,
) -> MultiViewDataset:
    """Write objects as they come, as one dataset folder that appears only when it is complete.

    Encoding runs in background threads beside whatever yields the objects.  Everything goes to a
    hidden folder next to ``path`` that is renamed at the end, and removed if anything fails.

    Args:
        background: sRGB colour in [0, 1] that the views were composited over.
        meta: anything JSON can hold about how the data came to be.
        overwrite: replace an existing dataset (never a folder that isn't one).
        total: how many objects will come, for the progress bar.

    Raises:
        DatasetError: if ``path`` is taken, no object came, objects differ in size or number of
            views, two share a name, or the disk is full.
    """
    made = store(path, objects, meta=meta, background=background, overwrite=overwrite, total=total)
    return open(made)
