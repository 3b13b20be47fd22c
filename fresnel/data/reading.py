"""Whole datasets into memory, on as many cores as that is worth."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from fresnel.host.machine import core_count
from fresnel.host.pool import processes

if TYPE_CHECKING:
    from fresnel.data.dataset import MultiViewDataset, ObjectViews

_RECORDS_A_WORKER = 300  # about three seconds of decoding, which is what a process costs to start


def read_all(dataset: MultiViewDataset, *, light: bool) -> list[ObjectViews]:
    """Every record, in order.

    Args:
        light: records are many small files, whose decoding is Python's work: more threads than
            two only slow each other down, so a large set goes to processes. Else (large
            photographs, objects to render) the work is done outside the interpreter, in threads.
    """
    workers = min(core_count(), len(dataset) // _RECORDS_A_WORKER)
    if not light or workers < 3:
        with ThreadPoolExecutor(2 if light else None) as pool:
            return list(pool.map(dataset.__getitem__, range(len(dataset))))
    rows = np.array_split(np.arange(len(dataset)), workers)
    parts = [dataset.subset(part.tolist()) for part in rows]
    with processes(workers) as pool:
        return [views for part in pool.map(_read, parts) for views in part]


def _read(part: MultiViewDataset) -> list[ObjectViews]:
    return [part[i] for i in range(len(part))]
