"""Multi-view datasets on disk: read, write, hash.

A dataset is a set of objects, each with one input image and V views of it from known cameras.
`write` is atomic and binds what it wrote to a content hash; `open` reads that layout, the
original experiment's, and what other tools write (`formats`); `export` writes what they read;
`MultiViewDataset.verify` tells whether a byte has changed since.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fresnel.data import captures as captured
from fresnel.data import formats, writing
from fresnel.data import layout as _layouts
from fresnel.data.captures import Capture
from fresnel.data.images import DatasetError, InputImages, load_image, scaled
from fresnel.data.images import load_images as load_images
from fresnel.data.layout import MANIFEST, DatasetChanged, Record, canonical_json, sha256
from fresnel.data.records import ObjectViews, ViewTensors, read_object, stack_cameras, stack_depths
from fresnel.data.writing import export as export
from fresnel.host.machine import core_count
from fresnel.host.pool import processes

_RECORDS_A_WORKER = 300  # about three seconds of decoding, which is what a process costs to start


class NotADataset(DatasetError):
    """Nothing there that `open` knows; it may be 3D objects, which `objects.sources.open` reads."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(
            f"{path}: not a dataset; want a {MANIFEST} of ours, folders image_0000 ... with "
            "input.png and view_000/rgb.png, a transforms.json, a COLMAP model, CO3D's "
            "frame_annotations.jgz, or a folder of such folders"
        )


@dataclass(frozen=True, eq=False)
class _Object:
    """One object of a dataset: its number of views, what reads it, and the sha256 of its files."""

    views: int
    read: Callable[[], ObjectViews]
    files: dict[str, str]

    def __call__(self) -> ObjectViews:
        return self.read()


@dataclass(frozen=True)
class MultiViewDataset:
    """A dataset on disk; objects are read when asked for, always over black.

    ``layout`` is "fresnel", "original", "captures" or "set" (folders of these).  ``image_size`` is
    the side of its (square) views in pixels, ``views_per_object`` the most that an object has
    (captures may differ).  ``content_hash`` stands for the whole dataset, for a `subset` too: see
    `is_subset`.  What is decoded is compared with the hashes of its files first: other bytes are a
    `DatasetChanged`.
    """

    path: Path
    layout: str
    names: tuple[str, ...]
    content_hash: str
    meta: dict[str, Any]
    image_size: int
    views_per_object: int
    objects: tuple[_Object, ...] = field(repr=False, compare=False)
    parts: tuple[MultiViewDataset, ...] = field(default=(), repr=False)
    is_subset: bool = False

    background = (0.0, 0.0, 0.0)
    """What views come over."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ObjectViews:
        return self.objects[index]()

    def subset(self, which: Sequence[int] | Sequence[str] | slice) -> MultiViewDataset:
        """The same dataset with only some objects, by index or by name."""
        if isinstance(which, slice):
            which = range(len(self))[which]
        known = {name: row for row, name in enumerate(self.names)}
        missing = [w for w in which if isinstance(w, str) and w not in known]
        if missing or not len(which):
            said = f"no object named {missing[0]!r}" if missing else "an empty subset"
            raise DatasetError(f"{self.path}: {said}; want one of {len(self)} objects or more")
        rows = [known[w] if isinstance(w, str) else int(w) for w in which]
        names = tuple(self.names[row] for row in rows)
        objects = tuple(self.objects[row] for row in rows)
        return replace(self, names=names, objects=objects, is_subset=True)

    def inputs(self) -> InputImages:
        """The input images; scaled to ``image_size`` if they are not all of one size."""
        return self._inputs(self._read_all())

    def tensors(self, size: int | None = None, device: torch.device | str = "cpu") -> ViewTensors:
        """Everything in memory, inputs and views scaled to ``size`` (None: as stored).

        Raises:
            DatasetError: if the objects differ in their number of views; open with ``views=``.
        """
        counts = sorted({each.views for each in self.objects})
        if len(counts) > 1:
            said = f"objects have {counts[0]} to {counts[-1]} views; want as many of each"
            raise DatasetError(f"{self.path}: {said}. Open it with views={counts[0]} or fewer")
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
                captures only what is read counts).
        """
        for part in self.parts:
            part.verify()
        now = open(self.path) if self.layout in ("fresnel", "original") else self
        if now.content_hash != self.content_hash:  # the original's layout was hashed anew
            raise DatasetChanged(self.path)
        found = _layouts.data_files(self.path) if self.layout == "fresnel" else ()
        if self.layout != "original":
            _layouts.compare(
                self.path, {p: d for o in now.objects for p, d in o.files.items()}, found
            )

    def _read_all(self) -> list[ObjectViews]:
        # Records are many small files, whose decoding is Python's work: more threads than two only
        # slow each other down, so a large set goes to processes.
        light = self.layout in ("fresnel", "original")
        workers = min(core_count(), len(self) // _RECORDS_A_WORKER)
        if not light or workers < 3:
            with ThreadPoolExecutor(2 if light else None) as threads:
                return list(threads.map(_Object.__call__, self.objects))
        with processes(workers) as pool:
            each = -(-len(self) // workers)
            return list(pool.map(_Object.__call__, self.objects, chunksize=each))

    def _inputs(self, objects: list[ObjectViews]) -> InputImages:
        singles = [views.input() for views in objects]
        if len({side for single in singles for side in single.rgb.shape[1:3]}) > 1:
            singles = [single.resized(self.image_size) for single in singles]
        return InputImages(
            self.names,
            torch.cat([single.rgb for single in singles]),
            torch.cat([single.alpha for single in singles]),
            stack_cameras([single.cameras[0] for single in singles]),
            stack_depths([None if s.depth is None else s.depth[0] for s in singles]),
            bool(self.meta.get("elevation_is_assumed", False)),
        )


def open(
    path: str | Path, *, image_size: int | None = None, views: int | None = None
) -> MultiViewDataset:
    """Open multi-view data, whoever wrote it.

    * Our layout: a folder with a manifest.json.
    * The original experiment's: views have no alpha, so it is estimated as "any channel > 0" and
      ``meta["alpha_source"]`` says so.  Its input camera stands at the world origin and looks
      along -Z; focal lengths equal the image size; the orbit's pivot is the world origin.
    * Captures (`formats`): a transforms.json of nerfstudio or Blender, a COLMAP
      model, a CO3D category, or a folder of such folders, one object each (stored
      datasets may be among them; their objects are resized where they differ).  ``meta`` tells
      which view acts as the input, where alpha came from ("mask", "file", or "none": opaque
      photographs), where the pivot was estimated, and how the world was turned to put Y up.

    Args:
        image_size: side of the views in pixels, for captures (None: the smallest capture's, at most
            512, less where an object's views would not fit into memory).
        views: take so many evenly spaced views of each capture (None: all).

    Raises:
        NotADataset: if nothing is recognised.
        DatasetError: if a description is damaged, or a stored set is asked for another size.
        DatasetChanged: if our manifest was edited.
    """
    root = _folder_of(Path(path))
    if not root.exists():
        raise DatasetError(f"{path}: no such folder or file")
    try:
        str(root.resolve()).encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{str(path)!r}: a folder's name is not UTF-8. Rename it") from None
    if not root.is_dir():
        raise NotADataset(path)
    if _is_stored(root):
        if image_size is not None or views is not None:
            raise DatasetError(
                f"{root}: image_size= and views= are for captures, this set is stored. Read it "
                "with tensors(size=), or write it anew"
            )
        return _open_stored(root)
    here = formats.captures_in(root)
    folders = [] if here else _folders(root)
    if any(_is_stored(root / name) for name in folders):
        return _open_set(root, folders, image_size)
    found = here or [capture for name in folders for capture in formats.captures_in(root, name)]
    return _open_captures(root, found, image_size, views)


def _folder_of(path: Path) -> Path:
    """The folder of a description that is given by its own name, as transforms.json."""
    known = formats.description(path) or (path.name == _layouts.MANIFEST and path.is_file())
    return path.parent if known else path


def recognises(path: str | Path) -> bool:
    """Whether `open` reads what is there; else it may be 3D objects (`objects.sources.open`)."""
    root = _folder_of(Path(path))
    if not root.is_dir():
        return False
    folders = [root, *(root / name for name in _folders(root))]
    return any(_is_stored(folder) or formats.recognises(folder) for folder in folders)


def _is_stored(folder: Path) -> bool:
    """Whether a folder is a dataset of our layout or the original's."""
    return bool(_layouts.image_folders(folder))


def _folders(root: Path) -> list[str]:
    """Folders directly inside ``root`` that are neither hidden nor links out of it."""
    found = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return sorted(p.name for p in found if p.resolve().is_relative_to(root.resolve()))


def _open_stored(root: Path) -> MultiViewDataset:
    records: list[Record]
    ours = _layouts.is_ours(root)
    if ours:
        manifest, records = _layouts.parse_manifest(root)
        shape = manifest["image_size"], manifest["views_per_object"], manifest["background"]
    else:
        manifest, records = {}, _layouts.scan(root)
        views = sorted(f for f in records[0].files if f.endswith("/rgb.png"))
        if not views:
            raise DatasetError(f"{root / records[0].folder}: has no view_000. Restore or remove it")
        first = load_image(_layouts.inside(root, f"{records[0].folder}/{views[0]}"))[0]
        shape = first.shape[0], len(views), (0.0, 0.0, 0.0)
    return MultiViewDataset(
        path=root,
        layout="fresnel" if ours else "original",
        names=tuple(record.name for record in records),
        content_hash=_layouts.content_hash(records, manifest),
        meta=manifest.get("meta", {"alpha_source": "estimated", "elevation_is_assumed": True}),
        image_size=shape[0],
        views_per_object=shape[1],
        objects=tuple(
            _Object(shape[1], partial(read_object, root, record, *shape, not ours), record.paths)
            for record in records
        ),
    )


def _open_captures(
    root: Path, found: list[Capture], image_size: int | None, views: int | None
) -> MultiViewDataset:
    if not found:
        raise NotADataset(root)
    names = tuple(capture.name for capture in found)
    if len(set(names)) < len(names):
        raise DatasetError(f"{root}: two captures share a name; rename a folder")
    chosen, side, meta = captured.prepare(root, found, image_size, views)
    files = _layouts.digests(root, (path for capture in chosen for path in capture.paths))
    for capture in chosen:
        for path in capture.paths:
            if path not in files:
                said = f"no such file, but {capture.descriptions[0]} names it"
                raise DatasetError(f"{root / path}: {said}. Restore it, or describe it anew")
    lines = [f"{file}\0{digest}" for file, digest in sorted(files.items())]
    taken = [[capture.name, [view.image for view in capture.views]] for capture in chosen]
    read = {"image_size": side, "views": taken}  # what is read of the files
    lines.append(f"open\0{sha256(canonical_json(read))}")
    return MultiViewDataset(
        path=root,
        layout="captures",
        names=names,
        content_hash="sha256:" + sha256("\n".join(lines).encode()),
        meta=meta,
        image_size=side,
        views_per_object=max(len(capture.views) for capture in chosen),
        objects=tuple(
            _Object(len(capture.views), partial(captured.read, root, capture, side, own), own)
            for capture in chosen
            for own in [{path: files[path] for path in capture.paths}]
        ),
    )


def _open_set(root: Path, folders: Sequence[str], image_size: int | None) -> MultiViewDataset:
    """Stored datasets, and captures beside them, as one; objects are named FOLDER/NAME."""
    taken = [name for name in folders if _is_stored(root / name)]
    taken += [n for n in folders if n not in taken and formats.recognises(root / n)]
    parts = {name: open(root / name) for name in taken}
    side = image_size or min(part.image_size for part in parts.values())
    hashes = sorted([name, part.content_hash] for name, part in parts.items())
    objects = {
        f"{folder}/{name}": each
        for folder, part in parts.items()
        for name, each in zip(part.names, part.objects, strict=True)
    }
    assumed = any(part.meta.get("elevation_is_assumed", False) for part in parts.values())
    metas = {name: part.meta for name, part in parts.items()}
    return MultiViewDataset(
        path=root,
        layout="set",
        names=tuple(objects),
        content_hash="sha256:" + sha256(canonical_json([hashes, side])),
        meta={"source": "set", "elevation_is_assumed": assumed, "parts": metas},
        image_size=side,
        views_per_object=max(part.views_per_object for part in parts.values()),
        objects=tuple(
            replace(each, read=partial(_read_part, each, name, side), files={})
            for name, each in objects.items()
        ),
        parts=tuple(parts.values()),
    )


def _read_part(read: Callable[[], ObjectViews], name: str, side: int) -> ObjectViews:
    views = read()
    return replace(views, name=name, **scaled(views, side))


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
    target = Path(path)
    colour = tuple(float(value) for value in background)
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise ValueError(f"background: got {background}, want three sRGB values in [0, 1]")
    writing.check_target(target, overwrite)
    meta = json.loads(json.dumps(meta))
    with writing.replaced(target) as folder:
        writing.seal(folder, *writing.encode_all(target, folder, objects, total), colour, meta)
    return open(target)
