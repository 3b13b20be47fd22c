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
from fresnel.data.layout import MANIFEST, Record, is_ours
from fresnel.data.records import ObjectViews, write_object
from fresnel.host.machine import core_count
from fresnel.host.pool import MOST_WORKERS, processes, warm_up

_WORTH_PROCESSES = 40e6  # pixels: some seconds of encoding on one core, as processes cost to start


def encode_all(
    target: Path, folder: Path, objects: Iterable[ObjectViews], total: int | None
) -> tuple[list[Record], int, int]:
    """Write objects as they come into a folder: their records, the views' size and their number.

    Raises:
        DatasetError: if none came, they differ in size or number of views, or two share a name.
    """
    names: set[str] = set()
    shape: tuple[int, ...] = ()
    records: list[Record] = []
    pending: deque[Future[Record]] = deque()
    workers = min(MOST_WORKERS, core_count())
    with contextlib.ExitStack() as stack:
        pool: Executor | None = None
        bar = tqdm(objects, total=total, desc=f"writing {target.name}", delay=2)
        for index, views in enumerate(bar):
            got = tuple(views.rgb.shape)
            if got[1] != got[2] or got != (shape or got):
                wanted = f"{shape or 'square ones'}; want the same size and number throughout"
                raise DatasetError(f"{views.name}: views of shape {got}, not {wanted}")
            if views.name in names:
                said = f"two objects are named {views.name!r}; want unique names"
                raise DatasetError(f"{target}: {said}")
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
    if not records:
        raise DatasetError(f"{target}: nothing to write: no object came")
    return records, shape[1], shape[0]


def expect(pixels: int) -> None:
    """Let what will encode so many pixels start beside the making of the first objects."""
    if _worth_processes(pixels):
        warm_up()


def _worth_processes(pixels: int) -> bool:
    return core_count() >= 4 and pixels >= _WORTH_PROCESSES


def seal(
    folder: Path,
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
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse to replace what isn't a dataset of ours, or is one and wasn't to be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target.is_dir() and is_ours(target)):
        raise DatasetError(f"{target}: exists and is not of ours. Choose another path")
    if not overwrite:
        raise DatasetError(f"{target}: exists. Choose another path or pass overwrite=True")


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of ``target`` at the end, and goes if anything fails."""
    partial = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:12]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        rename(partial, target)
    except BrokenProcessPool:
        said = "a worker process was killed, perhaps for want of memory"
        raise DatasetError(f"{target}: {said}. Nothing was kept") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        said = "the disk is full; free some space or write less" if full else str(error)
        raise DatasetError(f"{target}: can't be written ({said}). Nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rename(partial: Path, target: Path) -> None:
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
