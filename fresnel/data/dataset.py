"""Multi-view datasets on disk: read, write, hash.

A dataset is a set of objects, each with one input image and V views of it from known cameras.
`write` is atomic and binds what it wrote to a content hash; `open` reads that layout, the
original experiment's, and what other tools write (`formats`);
`MultiViewDataset.verify` tells whether a byte has changed since.
"""

import contextlib
import json
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from tqdm.auto import tqdm

from fresnel.data import captures as captured
from fresnel.data import formats
from fresnel.data import layout as _layouts
from fresnel.data.captures import Capture
from fresnel.data.images import DatasetError, InputImages, load_image, scaled
from fresnel.data.layout import MANIFEST, DatasetChanged, Record, read_checked
from fresnel.data.records import (
    ObjectViews,
    ViewTensors,
    oriented,
    read_object,
    stack,
    write_object,
)
from fresnel.host.machine import core_count
from fresnel.host.pool import MOST_WORKERS, processes, warm_up

_WORTH_PROCESSES = 40e6  # pixels: some seconds of encoding on one core, as processes cost to start
_RECORDS_A_WORKER = 300  # about three seconds of decoding, which is what a process costs to start
_RECORDS_AT_ONCE = 16


Encoded = tuple[list[Record], tuple[int, ...]]
"""What was written of objects, in their order, and the shape (V, S, S, 3) that their views have."""


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
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MultiViewDataset:
    """A dataset on disk; objects are read when asked for, always over black.

    ``content_hash`` stands for the whole dataset, for a `subset` too: see ``is_subset``.  What is
    decoded is compared with the hashes of its files first: other bytes are a `DatasetChanged`.
    """

    path: Path
    layout: str  # "fresnel", "original", "captures" or "set" (folders of these)
    content_hash: str
    meta: dict[str, Any]
    image_size: int  # side of the (square) views in pixels
    objects: dict[str, _Object] = field(repr=False, compare=False)
    parts: tuple["MultiViewDataset", ...] = field(default=(), repr=False)
    is_subset: bool = False

    background = (0.0, 0.0, 0.0)
    """What views come over."""

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> ObjectViews:
        return self.objects[self.names[index]].read()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.objects)

    @property
    def views_per_object(self) -> int:
        """The most that an object has: captures may differ."""
        return max(each.views for each in self.objects.values())

    def subset(self, which: Sequence[int] | Sequence[str] | slice) -> Self:
        """The same dataset with only some objects, by index or by name."""
        names = self.names[which] if isinstance(which, slice) else which
        names = [name if isinstance(name, str) else self.names[name] for name in names]
        missing = [name for name in names if name not in self.objects]
        if missing or not names:
            said = f"no object named {missing[0]!r}" if missing else "the subset is empty"
            raise DatasetError(f"{self.path}: {said}; want at least one of its {len(self)} objects")
        return replace(self, objects={name: self.objects[name] for name in names}, is_subset=True)

    def inputs(self) -> InputImages:
        """The input images; scaled to ``image_size`` if they are not all of one size."""
        return self._inputs([oriented(views)[0].input() for views in self._read_all()])

    def tensors(self, size: int | None = None, device: torch.device | str = "cpu") -> ViewTensors:
        """Everything in memory, inputs and views scaled to ``size`` (None: as stored).

        Raises:
            DatasetError: if the objects differ in their number of views; open with ``views=``.
        """
        counts = sorted({each.views for each in self.objects.values()})
        if len(counts) > 1:
            said = f"objects have {counts[0]} to {counts[-1]} views; want as many of each"
            raise DatasetError(f"{self.path}: {said}. Open it with views={counts[0]} or fewer")
        singles, places, rows = list[InputImages](), [], dict[str, Any]()
        for row, stored in enumerate(self._read_all()):  # in memory once, not in a list and stacked
            views = oriented(stored)[0]
            views = replace(views, **scaled(views, size or self.image_size))
            singles.append(views.input())
            places.append((views.cameras, views.pivot))
            for name in ("rgb", "alpha", "depth"):
                value = getattr(views, name)
                if row == 0 and value is not None:
                    rows[name] = value.new_empty(len(self), *value.shape)
                if (into := rows.get(name)) is None or value is None:
                    rows[name] = None
                else:
                    into[row] = value
        inputs = self._inputs(singles)
        found = ViewTensors(
            self.names,
            inputs if size is None else inputs.resized(size),
            cameras=stack([cameras for cameras, _ in places]),
            pivots=torch.stack([pivot for _, pivot in places]),
            content_hash=self.content_hash,
            **rows,
        )
        return replace(found, sums=found.checksums()).to(device)

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
        want = {path: of for each in now.objects.values() for path, of in each.files.items()}
        for path in _layouts.data_files(self.path) if self.layout == "fresnel" else ():
            if path not in want:
                raise DatasetChanged(self.path / path, "added")
        for path in sorted(want):  # threads would wait for each other: five times as long
            read_checked(self.path, path, want[path])

    def _read_all(self) -> Iterator[ObjectViews]:
        # Records are many small files, whose decoding is Python's work: more threads than two only
        # slow each other down, so a large set goes to processes.
        light = self.layout in ("fresnel", "original")
        workers = min(core_count(), len(self) // _RECORDS_A_WORKER)
        reads = [each.read for each in self.objects.values()]
        if not light or workers < 2:
            with ThreadPoolExecutor(2 if light else None) as threads:
                yield from threads.map(operator.call, reads)
            return
        with processes(workers) as pool:  # few at once: a pipe's other end needs room for them all
            yield from pool.map(operator.call, reads, chunksize=_RECORDS_AT_ONCE)

    def _inputs(self, singles: list[InputImages]) -> InputImages:
        if len({side for single in singles for side in single.rgb.shape[1:3]}) > 1:
            singles = [single.resized(self.image_size) for single in singles]
        rows = {
            name: stack([getattr(single, name) for single in singles], torch.cat)
            for name in ("rgb", "alpha", "cameras", "depth")
        }
        assumed = bool(self.meta.get("elevation_is_assumed", False))
        return InputImages(self.names, **rows, elevation_is_assumed=assumed)


def open(
    path: str | Path, *, image_size: int | None = None, views: int | None = None
) -> MultiViewDataset:
    """Open multi-view data, whoever wrote it.

    Our layout (a folder with a manifest.json); the original experiment's, whose views have no
    alpha: it is estimated as "any channel > 0"; captures (`formats`), or a folder of folders of
    any of these, one object each (views are resized where they differ).  ``meta`` tells which view
    acts as the input, where alpha and pivot came from, and how the world was turned to put Y up.

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
        if views is not None:
            raise DatasetError(f"{root}: views= is for captures, this set holds stored ones")
        return _open_set(root, folders, image_size)
    found = here or [capture for name in folders for capture in formats.captures_in(root, name)]
    return _open_captures(root, found, image_size, views)


def _folder_of(path: Path) -> Path:
    """The folder of a description that is given by its own name, as transforms.json."""
    _layouts.recover(path)
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
    ours = _layouts.is_ours(root)
    if ours:
        manifest, records = _layouts.parse_manifest(root)
    else:
        records = _layouts.scan(root)
        views = sorted(file for file in records[0].files if file.endswith("/rgb.png"))
        if not views:
            raise DatasetError(f"{root / records[0].folder}: has no view_000. Restore or remove it")
        rgb, _ = load_image(_layouts.inside(root, f"{records[0].folder}/{views[0]}"))
        manifest = {"image_size": rgb.shape[0], "views_per_object": len(views)}
    digest = _layouts.content_hash(records, manifest if ours else {})
    meta = manifest.get("meta", {"alpha_source": "estimated", "elevation_is_assumed": True})
    size, count = manifest["image_size"], manifest["views_per_object"]
    how = size, count, manifest.get("background", (0.0, 0.0, 0.0)), not ours
    objects = {
        record.name: _Object(count, partial(read_object, root, record, *how), record.paths)
        for record in records
    }
    return MultiViewDataset(root, "fresnel" if ours else "original", digest, meta, size, objects)


def _open_captures(
    root: Path, found: list[Capture], image_size: int | None, views: int | None
) -> MultiViewDataset:
    if not found:
        raise NotADataset(root)
    if len({capture.name for capture in found}) < len(found):
        raise DatasetError(f"{root}: two captures share a name; rename a folder")
    chosen, side, meta = captured.prepare(root, found, image_size, views)
    files = _layouts.digests(root, [path for capture in chosen for path in capture.pictures])
    missing = sorted(path for capture in chosen for path in capture.pictures - files.keys())
    if missing:
        said = "no such file, but a description names it. Restore it, or describe it anew"
        raise DatasetError(f"{root / missing[0]}: {said}")
    objects = {}
    for capture in chosen:
        own = {path: files[path] for path in sorted(capture.pictures)}
        read = partial(captured.read, root, capture, side, own)
        # of descriptions what was parsed counts, whatever lies there by now
        objects[capture.name] = _Object(len(capture.views), read, own | capture.descriptions)
    files |= {path: of for capture in chosen for path, of in capture.descriptions.items()}
    taken = [
        [capture.name, capture.notes["alpha_source"], [view.image for view in capture.views]]
        for capture in chosen
    ]
    digest = _layouts.hash_of(files, {"open": {"image_size": side, "views": taken}})
    return MultiViewDataset(root, "captures", digest, meta, side, objects)


def _open_set(root: Path, folders: Sequence[str], image_size: int | None) -> MultiViewDataset:
    """Stored datasets, and captures beside them, as one; objects are named FOLDER/NAME."""
    taken = [name for name in folders if _is_stored(root / name)]
    taken += [n for n in folders if n not in taken and formats.recognises(root / n)]
    parts = {name: open(root / name) for name in taken}
    side = image_size or min(part.image_size for part in parts.values())
    objects = {}
    for folder, part in parts.items():
        for inner, each in part.objects.items():
            name = f"{folder}/{inner}"
            objects[name] = _Object(each.views, partial(_read_part, each.read, name, side))
    hashes = sorted([name, part.content_hash] for name, part in parts.items())
    digest = "sha256:" + _layouts.sha256(_layouts.canonical_json([hashes, side]))
    metas = {name: part.meta for name, part in parts.items()}
    assumed = any(each.get("elevation_is_assumed", False) for each in metas.values())
    meta = {"source": "set", "elevation_is_assumed": assumed, "parts": metas}
    return MultiViewDataset(root, "set", digest, meta, side, objects, tuple(parts.values()))


def _read_part(read: Callable[[], ObjectViews], name: str, side: int) -> ObjectViews:
    views = read()
    return replace(views, name=name, **scaled(views, side))


def write(
    path: str | Path,
    objects: Iterable[ObjectViews] | Callable[[Path], Encoded],
    *,
    background: Sequence[float] = (0.0, 0.0, 0.0),
    meta: dict[str, Any],
    overwrite: bool = False,
    reuse: bool = False,
    total: int | None = None,
) -> MultiViewDataset:
    """Write objects as they come, as one dataset folder that appears only when it is complete:
    a hidden folder next to ``path`` takes its place at the end, and goes if anything fails.  A
    second process that wants the same waits for the first.

    Args:
        objects: or what encodes them into a folder, by `encode`.
        background: sRGB colour in [0, 1] that the views were composited over.
        meta: anything JSON can hold about how the data came to be.
        overwrite: replace an existing dataset (never a folder that isn't one).
        reuse: return an existing dataset at ``path``; the caller's path names what is in it.
        total: how many objects will come, for the progress bar.

    Raises:
        DatasetError: if ``path`` is taken, no object came, objects differ in size or number of
            views, two share a name, or the disk is full.
    """
    target = Path(path)
    colour = tuple(float(value) for value in background)
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise ValueError(f"background: got {background}, want three sRGB values in [0, 1]")
    meta = json.loads(json.dumps(meta))
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(_layouts.making(target, overwrite=overwrite, reuse=reuse)):
            return open(target)
        folder = stack.enter_context(_layouts.replaced(target))
        if callable(objects):
            records, shape = objects(folder)
        else:
            bar = tqdm(objects, total=total, desc=f"writing {target.name}", delay=2)
            records, shape = encode(folder, enumerate(bar), total)
        if not records:
            raise DatasetError(f"{target}: nothing to write: no object came")
        _layouts.seal(folder, records, shape[1], shape[0], colour, meta)
    return open(target)


def encode(
    folder: Path, objects: Iterable[tuple[int, ObjectViews]], total: int | None, among: int = 1
) -> Encoded:
    """Write numbered objects, `total` in all, into a folder that is to become a dataset. `among`:
    so many processes do this at once, each of its own objects."""
    names: set[str] = set()
    shape: tuple[int, ...] = ()
    records: list[Record] = []
    pending: deque[Future[Record]] = deque()
    workers = max(1, min(MOST_WORKERS, core_count() // among))
    with contextlib.ExitStack() as stack:
        pool: Executor | None = None
        for index, views in objects:
            got = tuple(views.rgb.shape)
            if got[1] != got[2] or got != (shape or got):
                wanted = f"{shape or 'square ones'}; want the same size and number throughout"
                raise DatasetError(f"{views.name}: views of shape {got}, not {wanted}")
            if views.name in names:
                raise DatasetError(f"two objects are named {views.name!r}; want unique names")
            names.add(views.name)
            shape = got
            if pool is None and _worth_processes((total or 0) * views.alpha.numel()):
                pool = stack.enter_context(processes(workers))
            elif pool is None:
                # Threads: compressing doesn't hold Python's lock. What is around it does, so where
                # cores are many they wait for each other, and a large set is worth processes.
                pool = ThreadPoolExecutor(workers)
                stack.callback(pool.shutdown, cancel_futures=True)
            pending.append(pool.submit(write_object, folder, index, views))
            # bounds memory when encoding is the slower side
            while len(pending) > max(8, 2 * workers):
                records.append(pending.popleft().result())
        records += [each.result() for each in pending]
    return records, shape


def expect(pixels: int) -> None:
    """Let what will encode so many pixels start beside the making of the first objects."""
    if _worth_processes(pixels):
        warm_up()


def _worth_processes(pixels: int) -> bool:
    return core_count() >= 4 and pixels >= _WORTH_PROCESSES
