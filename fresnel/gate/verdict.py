"""The gate: is this multi-view data fit to train on, and if not, what is wrong with it?

`validate` looks at ten examples, goes on only while undecided, and confirms a pass on the whole
set.  Its `Verdict` names ranked causes in plain language; `fix` writes a copy with what can be
mended mended; `issue_receipt` writes the verdict down, bound to the dataset's content hash;
`require_receipt` is what training calls before it starts.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fresnel.data.images import DatasetError
from fresnel.gate.decide import judge, profile
from fresnel.gate.findings import GateConfig, Reason, Seen, plain
from fresnel.gate.geometry import Rig
from fresnel.gate.measure import measure, unreadable
from fresnel.gate.receipts import (
    GateRefusal,
    Receipt,
    issue_receipt,
    read_receipt,
    require_receipt,
    write_receipt,
)
from fresnel.host.machine import core_count
from fresnel.host.pool import MOST_WORKERS, processes

__all__ = [
    "GateConfig",
    "GateRefusal",
    "Reason",
    "Receipt",
    "Verdict",
    "fix",
    "issue_receipt",
    "read_receipt",
    "require_receipt",
    "validate",
    "write_receipt",
]


class _Data(Protocol):
    """What `validate` needs of a `MultiViewDataset`; lists of records in tests have it too."""

    @property
    def background(self) -> Any: ...
    @property
    def content_hash(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Args:
        passed: True when no check failed.
        reasons: the failures, most likely cause first, each followed by its symptoms.
        summary: one or two sentences for a person.
        notes: checks that could not be made, and why.
        measurements: one dict per view: object, view, azimuth_deg and elevation_deg about the
            pivot relative to the input, coverage (mean alpha), coverage_ratio and luminance_ratio
            (to the input's), luminance (linear light, of covered pixels), detail_ratio, border,
            empty, constant.
        objects: one dict per record: name, pivot_distance, stray, identity_psnr, ...
        profile: one dict per 45 degree azimuth bin: azimuth_deg, views, coverage_ratio,
            luminance_ratio, empty.
        figures: the numbers that were compared with the thresholds, by name.
        dataset_hash: of the data that was looked at.
        examples_seen: records looked at, of `examples_total`.
        duration_s: wall time of the validation.
    """

    passed: bool
    reasons: tuple[Reason, ...]
    summary: str
    notes: tuple[str, ...] = ()
    measurements: list[dict[str, Any]] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    dataset_hash: str = ""
    examples_seen: int = 0
    examples_total: int = 0
    duration_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; NaN becomes None."""
        return plain(asdict(self))


def validate(
    dataset: _Data,
    config: GateConfig | None = None,
    *,
    first: int = 10,
    workers: int | None = None,
    progress: bool = True,
    against: Any = None,
) -> Verdict:
    """Look at `first` evenly spaced records, go on by as many while undecided, confirm on the rest.

    Each check is a sequential test on the records that show its fault (see `findings`): a fault
    ends the reading early; only a set on which every check stays clear to its last record passes.
    Later looks are a quarter of what was read apart: Wald's bounds hold at every count, so looking
    less often only lowers the chance of a false alarm.
    Records are read as a stream, so memory does not grow with the images. A record that can't be
    read is a finding, not an exception.

    Args:
        dataset: a `MultiViewDataset`, or anything with len(), indexing to `ObjectViews`,
            `background` and `content_hash`.
        config: thresholds; None takes the calibrated defaults.
        first: how many records to decide on before reading on, at least 1.
        workers: readers (None: two threads, or processes where there are cores for more and
            the set is large enough to be worth starting them).
        against: another dataset (the test set) that must not share objects with this one.

    Raises:
        ValueError: for `first` or `workers` below 1.
    """
    if first < 1 or (workers is not None and workers < 1):
        raise ValueError(f"first, workers: got {first}, {workers}, want at least 1")
    config = config or GateConfig()
    started = time.monotonic()
    total = len(dataset)
    if total == 0:
        reason = Reason("no_data", "the dataset has no records", "check the path", {})
        return _verdict([], [], (reason,), {}, (), dataset, total, started)
    meta = dict(getattr(dataset, "meta", None) or {})
    if against is not None:
        names = getattr(against, "names", None) or [against[k].name for k in range(len(against))]
        meta["against"] = {"names": {str(name).partition("__")[0] for name in names}}
    sample = sorted(set(np.linspace(0, total - 1, min(first, total)).round().astype(int).tolist()))
    rest = sorted(set(range(total)) - set(sample))
    rows: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    rigs: dict[int, Rig] = {}
    settled, look = False, len(sample)
    with (
        _readers(dataset, len(rest), workers) as many,
        _readers(dataset, len(sample), workers or 2) as few,
    ):
        order = itertools.chain(
            _measured(many if many[2] else few, sample, rigs, progress, "gate: first examples"),
            _measured(many, _spread(rest), rigs, progress, "gate: whole set"),
        )
        for count, (record_rows, summary, rig) in enumerate(order, 1):
            rows += record_rows
            objects.append(summary)
            if rig is not None and len(rigs) < _RIGS:
                rigs[len(objects) - 1] = rig
            if count < total and not settled and count >= look:
                look = max(count + first, math.ceil(1.25 * count))
                reasons, figures, notes, settled = judge(
                    rows, objects, config, meta=meta, rigs=rigs, phase="early"
                )
                if reasons:
                    break
        else:
            reasons, figures, notes, _ = judge(rows, objects, config, meta=meta, rigs=rigs)
    return _verdict(rows, objects, reasons, figures, notes, dataset, total, started, config)


_RIGS = 40
"""Records whose cameras and small masks are kept, to find out what is wrong with their poses."""


def _spread(indices: list[int]) -> list[int]:
    """The same indices in an order in which every prefix is spread over the set."""
    golden = 0.6180339887498949
    return sorted(indices, key=lambda index: (index * golden) % 1.0)


_Measured = tuple[list[dict[str, Any]], dict[str, Any], Rig | None]
_Readers = tuple[Callable[[int, bool], Future[_Measured]], int, bool]

_WORTH_PROCESSES = 120  # records: some seconds of measuring on one core, as processes cost to start


@contextlib.contextmanager
def _readers(dataset: _Data, count: int, workers: int | None) -> Iterator[_Readers]:
    """What measures the record of an index in the background, by how many at once, and whether
    that is a crew that need not start first.

    Processes start in the background too: a set is refused or not by the time they are there."""
    # Monocular depth in the original layout is relative, and its inputs' alpha is a guess.
    trusted = getattr(dataset, "layout", "fresnel") != "original"
    part = getattr(dataset, "subset", None)  # what travels to a process is one record
    cores = core_count()
    crowd = workers is None and cores >= 4 and count >= _WORTH_PROCESSES
    if part is not None and crowd:
        workers = min(cores, MOST_WORKERS)
        with processes(workers) as pool:
            # Rigs are most of what would travel back.
            yield lambda i, rig: pool.submit(_measure, part([i]), 0, trusted, rig), workers, False
        return
    threads = ThreadPoolExecutor(workers or 2)
    try:
        yield lambda i, rig: threads.submit(_measure, dataset, i, trusted, rig), workers or 2, False
    finally:
        threads.shutdown(cancel_futures=True)


def _measured(
    readers: _Readers,
    indices: Sequence[int],
    rigs: dict[int, Rig],
    progress: bool,
    label: str,
) -> Iterator[_Measured]:
    """In order. Rigs come with those that may yet be among the `_RIGS` first, which fill `rigs`."""
    from tqdm.auto import tqdm

    send, at_once, _ = readers
    queue = iter(indices)
    bar = tqdm(total=len(indices), desc=label, unit="object", delay=2, disable=not progress or None)
    with bar:
        # A short window of submitted reads keeps the readers busy and the memory bounded.
        window = deque(send(i, True) for i in itertools.islice(queue, 2 * at_once))
        while window:
            done = window.popleft().result()
            wanted = len(rigs) < _RIGS
            window.extend(send(i, wanted) for i in itertools.islice(queue, 1))
            bar.update()
            yield done


def _measure(dataset: _Data, index: int, trusted: bool, with_rig: bool) -> _Measured:
    """Read and measure one record; what can't be read is a finding."""
    background = tuple(float(x) for x in dataset.background)
    try:
        views = dataset[index]
        rows, summary, rig = measure(views, background, trust_input=trusted)
        if summary.get("foreground") == "none" and not summary["bad_poses"]:
            from fresnel.gate.epipolar import misfit

            summary["epipolar"] = misfit(views)
        return rows, summary, rig if with_rig else None
    except (DatasetError, ValueError, OSError) as error:
        names = getattr(dataset, "names", None)
        return unreadable(names[index] if names else str(index), error)


def _verdict(
    rows: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    reasons: tuple[Reason, ...],
    figures: dict[str, float],
    notes: tuple[str, ...],
    dataset: _Data,
    total: int,
    started: float,
    config: GateConfig | None = None,
) -> Verdict:
    config = config or GateConfig()
    for row, empty in zip(rows, Seen(rows, objects, config).empty if rows else (), strict=True):
        row["empty"] = bool(empty)
    objects = [{k: v for k, v in item.items() if k != "fingerprint"} for item in objects]
    seen = f"{len(objects)} of {total} records ({len(rows)} views)"
    if reasons:
        caused = [r.code for r in reasons[1:] if r.symptom_of == reasons[0].code]
        others = [r.code for r in reasons[1:] if r.symptom_of != reasons[0].code]
        summary = f"FAIL after {seen}: {reasons[0].message}."
        summary += f" What follows from it: {', '.join(caused)}." if caused else ""
        summary += f" Also: {', '.join(others)}." if others else ""
    else:
        summary = f"PASS: {seen}, no check failed."
    return Verdict(
        passed=not reasons,
        reasons=reasons,
        summary=summary,
        notes=notes,
        measurements=rows,
        objects=objects,
        profile=profile(rows, config),
        figures=figures,
        dataset_hash=dataset.content_hash,
        examples_seen=len(objects),
        examples_total=total,
        duration_s=time.monotonic() - started,
    )


def fix(
    dataset: Any,
    path: str | Path,
    *,
    verdict: Verdict | None = None,
    config: GateConfig | None = None,
    overwrite: bool = False,
    rounds: int = 3,
    progress: bool = True,
) -> tuple[Any, Verdict]:
    """Write a corrected copy of a dataset to `path` and gate that.

    Conventions of poses, mirrored or reordered pictures, focal length, principal point, the stated
    pivot, exposure and exchanged channels can be mended; each round mends the first reason of the
    verdict before it.  The copy's meta lists what was done.

    Args:
        verdict: of this dataset, if there is one already.
        rounds: mends to try, at most.

    Returns:
        The copy (a `MultiViewDataset`) and its verdict, which may still be a failure.

    Raises:
        ValueError: if the data passes, or what is wrong can't be mended without making it anew.
    """
    from fresnel.data import dataset as datasets
    from fresnel.gate.fix import Mended, plan

    verdict = verdict or validate(dataset, config, progress=progress)
    if verdict.passed:
        raise ValueError("dataset: passes the gate; there is nothing to fix")
    mended = Mended(dataset)
    for _ in range(rounds):
        step = plan(verdict)
        if step is None:
            break
        mended = mended.then(step)
        verdict = validate(mended, config, progress=progress)
        if verdict.passed:
            break
    if not mended.steps:
        reason = verdict.reasons[0]
        raise ValueError(f"dataset: {reason.code} can't be mended in a copy; {reason.hint}")
    meta = {**getattr(dataset, "meta", {}), "mended": [step.words for step in mended.steps]}
    written = datasets.write(
        path,
        (mended[k] for k in range(len(mended))),
        background=mended.background,
        meta=meta,
        overwrite=overwrite,
        total=len(mended),
    )
    return written, validate(written, config, progress=progress)
