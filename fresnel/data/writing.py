"""Writing our layout: whole or not at all, encoded beside what yields the objects."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fresnel.data import layout as _layouts
from fresnel.data.images import DatasetError
from fresnel.data.layout import MANIFEST, Record
from fresnel.data.records import ObjectViews, write_object
from fresnel.host.machine import core_count
from fresnel.host.pool import MOST_WORKERS, processes, warm_up

_WORTH_PROCESSES = 40e6  # pixels: some seconds of encoding on one core, as processes cost to start


def store(
    path: str | Path,
    objects: Iterable[ObjectViews],
    *,
    meta: dict[str, Any],
    background: Sequence[float] = (0.0, 0.0, 0.0),
    overwrite: bool = False,
    total: int | None = None,
) -> Path:
    """`dataset.write`, which see, up to opening what was written."""
    target = Path(path)
    colour = tuple(float(value) for value in background)
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise ValueError(f"background: got {background}, want three sRGB values in [0, 1]")
    check_target(target, overwrite)
    meta = json.loads(json.dumps(meta))
    records: list[Record] = []
    shape: tuple[int, ...] | None = None
    with _said_why(target, records), replaced(target) as partial:
        workers = min(MOST_WORKERS, core_count())
        pool: Executor | None = None
        pending: deque[Future[Record]] = deque()
        with contextlib.ExitStack() as stack:
            bar = tqdm(objects, total=total, desc=f"writing {target.name}", delay=2)
            for index, views in enumerate(bar):
                if views.rgb.shape[1] != views.rgb.shape[2]:
                    raise DatasetError(f"{views.name}: views are not square")
                if shape is not None and tuple(views.rgb.shape) != shape:
                    raise DatasetError(
                        f"{views.name}: views of shape {tuple(views.rgb.shape)}, the objects "
                        f"before have {shape}; want the same size and number throughout"
                    )
                shape = tuple(views.rgb.shape)
                pixels = (total or 0) * views.alpha.numel()
                pool = pool or stack.enter_context(_encoders(workers, pixels))
                pending.append(pool.submit(write_object, partial, index, views))
                # bounds memory when encoding is the slower side
                while len(pending) > max(8, 2 * workers):
                    records.append(pending.popleft().result())
            while pending:
                records.append(pending.popleft().result())
        if shape is None:
            raise DatasetError(f"{target}: nothing to write: no object came")
        names = [record.name for record in records]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DatasetError(f"{target}: two objects are named {twice!r}; want unique names")
        seal(partial, records, shape[1], shape[0], colour, meta)
    return target


@contextlib.contextmanager
def _said_why(target: Path, records: list[Record]) -> Iterator[None]:
    """Failures of disks and workers as a DatasetError."""
    try:
        yield
    except BrokenProcessPool:
        raise DatasetError(
            f"{target}: a worker process was killed, perhaps for want of memory. Nothing was kept"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DatasetError(
                f"{target}: the disk is full after {len(records)} objects. Nothing was kept; "
                "free some space or write fewer or smaller views"
            ) from error
        raise DatasetError(f"{target}: can't be written ({error})") from error


@contextlib.contextmanager
def _encoders(workers: int, pixels: int) -> Iterator[Executor]:
    """Threads: compressing doesn't hold Python's lock. What is around it does, so where cores are
    many they wait for each other, and a large set is worth processes."""
    if _worth_processes(workers, pixels):
        with processes(workers) as pool:
            yield pool
        return
    threads = ThreadPoolExecutor(workers)
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def expect(pixels: int) -> None:
    """Let what will encode so many pixels start beside the making of the first objects."""
    if _worth_processes(min(MOST_WORKERS, core_count()), pixels):
        warm_up()


def _worth_processes(workers: int, pixels: int) -> bool:
    return workers >= 4 and pixels >= _WORTH_PROCESSES


def assemble(partial: Path, target: Path, records: list[Record], *how: Any) -> None:
    """`seal` a folder of finished records, and put it in the place of ``target``."""
    seal(partial, records, *how)
    _rename(partial, target)


def seal(
    partial: Path,
    records: list[Record],
    image_size: int,
    views: int,
    background: Sequence[float],
    meta: dict[str, Any],
) -> None:
    """Give a folder of finished records its manifest."""
    manifest: dict[str, Any] = {
        "schema_version": _layouts.SCHEMA_VERSION,
        "background": list(background),
        "image_size": image_size,
        "views_per_object": views,
        "meta": meta,
    }
    manifest["content_hash"] = _layouts.content_hash(records, manifest)
    manifest["objects"] = [vars(record) for record in records]
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse to replace what isn't a dataset of ours, or is one and wasn't to be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target.is_dir() and _layouts.is_ours(target)):
        raise DatasetError(f"{target}: exists and is not a dataset of ours. Choose another path")
    if not overwrite:
        raise DatasetError(f"{target}: exists. Choose another path or pass overwrite=True")


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of ``target`` at the end, and goes if anything fails."""
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:12]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        _rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, target: Path) -> None:
    """Put ``partial`` in the place of ``target``; an old dataset is moved away first."""
    old = partial.with_name(f".{target.name}.replaced-{uuid.uuid4().hex[:12]}")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
