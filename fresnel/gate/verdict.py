"""The gate: is this multi-view data fit to train on, and if not, what is wrong with it?

`validate` looks at ten examples, goes on only while undecided, and confirms a pass on the whole
set.  Its `Verdict` names ranked causes in plain language.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from fresnel.data.images import DatasetError
from fresnel.data.records import ObjectViews
from fresnel.gate.decide import Decision, Reason, decide, figures
from fresnel.gate.measure import Row, measure, print_of, unreadable
from fresnel.gate.receipts import Receipt, write_receipt
from fresnel.gate.thresholds import GateConfig
from fresnel.host.machine import core_count
from fresnel.host.pool import MOST_WORKERS, processes
from fresnel.poses.geometry import Rig


class Data(Protocol):
    """What `validate` needs of a `MultiViewDataset`; lists of records in tests have it too."""

    @property
    def content_hash(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> ObjectViews: ...


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Args:
        passed: True when no check failed.
        reasons: the failures, most likely cause first, each followed by its symptoms.
        summary: one or two sentences for a person.
        notes: checks that could not be made, and why; what shows in too few records to count.
        measurements: one dict per view: object, view, azimuth_deg and elevation_deg about the
            pivot relative to the input, coverage (mean alpha), coverage_ratio and luminance_ratio
            (to the input's), luminance (linear light, of covered pixels), detail_ratio, border,
            empty, constant.
        objects: one dict per record: name, pivot_distance, stray, identity_psnr, ...
        figures: the numbers that were compared with the thresholds, by name.
        thresholds: they themselves, by name.
        dataset_hash: of the data that was looked at.
        is_subset: whether only a part of that data was there to look at.
        examples_seen: records looked at, of `examples_total`.
        duration_s: wall time of the validation.
    """

    passed: bool
    reasons: tuple[Reason, ...]
    summary: str
    notes: tuple[str, ...] = ()
    measurements: list[Row] = field(default_factory=list)
    objects: list[Row] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    dataset_hash: str = ""
    is_subset: bool = False
    examples_seen: int = 0
    examples_total: int = 0
    duration_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; NaN becomes None."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def validate(
    dataset: Data,
    config: GateConfig | None = None,
    *,
    first: int = 10,
    workers: int | None = None,
    progress: bool = True,
    against: Any = None,
) -> Verdict:
    """Look at `first` evenly spaced records, go on by as many while undecided, confirm on the rest.

    Each check is a sequential test on the records that show its fault (`decide`): a fault ends the
    reading early; only a set on which every check stays clear to its last record passes.
    Later looks are a quarter of what was read apart: Wald's bounds hold at every count, so looking
    less often only lowers the chance of a false alarm.
    Records are read as a stream, so memory does not grow with the images.  A record that can't be
    read is a finding, not an exception.

    Args:
        dataset: a `MultiViewDataset`, or anything with len(), indexing to `ObjectViews`, and
            `content_hash`.
        config: thresholds; None takes the calibrated defaults.
        first: how many records to decide on before reading on, at least 1.
        workers: readers (None: two threads, or processes where there are cores for more and
            the set is large enough to be worth starting them).
        against: another dataset (the test set) that must not share objects with this one; all of
            it is read.

    Raises:
        ValueError: for `first` or `workers` below 1.
        DatasetError: if `against` can't be read.
    """
    if first < 1 or (workers is not None and workers < 1):
        raise ValueError(f"first, workers: got {first}, {workers}, want at least 1")
    config, started, total = config or GateConfig(), time.monotonic(), len(dataset)
    rows: list[Row] = []
    objects: list[Row] = []
    rigs: dict[int, Rig] = {}
    if total == 0:
        empty = Reason("no_data", "the dataset has no records", "check the path")
        decision = Decision((empty,), (), True)
    else:
        meta = dict(getattr(dataset, "meta", None) or {})
        if against is not None:
            numbered = getattr(against, "layout", "") == "original"
            others = (against[k] for k in range(len(against)))
            meta["against"] = [print_of(other, numbered) for other in others]
        settled, look = False, min(first, total)
        with contextlib.closing(_stream(dataset, look, workers, rigs, progress)) as stream:
            for count, (record_rows, summary, rig) in enumerate(stream, 1):
                rows += record_rows
                objects.append(summary)
                if rig is not None and len(rigs) < _RIGS:
                    rigs[len(objects) - 1] = rig
                if count == total or (not settled and count >= look):
                    look = max(count + first, math.ceil(1.25 * count))
                    decision = decide(
                        rows, objects, config, meta=meta, rigs=rigs, final=count == total
                    )
                    settled = decision.settled
                    if decision.reasons:
                        break
    return Verdict(
        passed=not decision.reasons,
        reasons=decision.reasons,
        summary=_summary(decision.reasons, len(objects), total, len(rows)),
        notes=decision.notes,
        measurements=rows,
        objects=[{k: v for k, v in row.items() if k not in _INNER} for row in objects],
        figures=figures(rows, objects, config),
        thresholds=asdict(config),
        dataset_hash=dataset.content_hash,
        is_subset=bool(getattr(dataset, "is_subset", False)),
        examples_seen=len(objects),
        examples_total=total,
        duration_s=time.monotonic() - started,
    )


_RIGS = 40
"""Records whose cameras and small masks are kept, to find out what is wrong with their poses."""
_INNER = ("thumbnail", "numbered")


def _summary(reasons: Sequence[Reason], count: int, total: int, views: int) -> str:
    seen = f"{count} of {total} records ({views} views)"
    if not reasons:
        return f"PASS: {seen}, no check failed."
    first, *rest = reasons
    caused = [r.code for r in rest if r.symptom_of == first.code]
    others = [r.code for r in rest if r.symptom_of != first.code]
    summary = f"FAIL after {seen}: {first.message}."
    summary += f" What follows from it: {', '.join(caused)}." if caused else ""
    return summary + (f" Also: {', '.join(others)}." if others else "")


_Measured = tuple[list[Row], Row, Rig | None]
_Send = Callable[[int, bool], Future[_Measured]]
_WORTH_PROCESSES = 120  # records: some seconds of measuring on one core, as processes cost to start


def _stream(
    dataset: Data, first: int, workers: int | None, rigs: dict[int, Rig], progress: bool
) -> Generator[_Measured, None, None]:
    """All records measured: `first` evenly spaced ones, then the rest, each prefix of which is
    spread over the set.  Rigs come with those that may yet be among the `_RIGS` first.

    Processes start when the first examples have not refused the set."""
    total = len(dataset)
    sample = sorted(set(np.linspace(0, total - 1, first).round().astype(int).tolist()))
    golden = 0.6180339887498949
    rest = sorted(set(range(total)) - set(sample), key=lambda index: (index * golden) % 1.0)
    many = _crew if _worth_a_crew(dataset, len(rest), workers) else _threads
    for readers, indices, what in (
        (_threads, sample, "first examples"),
        (many, rest, "whole set"),
    ):
        with readers(dataset, workers or 2) as (send, ahead):
            queue = iter(indices)
            with tqdm(
                total=len(indices),
                desc=f"gate: {what}",
                unit="object",
                delay=2,
                disable=not progress or None,
            ) as bar:
                # A short window of submitted reads keeps the readers busy and the memory bounded.
                window = deque(send(i, True) for i in itertools.islice(queue, 2 * ahead))
                while window:
                    done = window.popleft().result()
                    window.extend(send(i, len(rigs) < _RIGS) for i in itertools.islice(queue, 1))
                    bar.update()
                    yield done


@contextlib.contextmanager
def _threads(dataset: Data, workers: int) -> Iterator[tuple[_Send, int]]:
    threads = ThreadPoolExecutor(workers)
    try:
        yield lambda i, rig: threads.submit(_measure, dataset, i, rig), workers
    finally:
        threads.shutdown(cancel_futures=True)


def _worth_a_crew(dataset: Data, count: int, workers: int | None) -> bool:
    """Whether processes should measure: what travels to one is a subset of one record."""
    enough = core_count() >= 4 and count >= _WORTH_PROCESSES
    return workers is None and enough and hasattr(dataset, "subset")


@contextlib.contextmanager
def _crew(dataset: Any, _: int) -> Iterator[tuple[_Send, int]]:
    workers = min(core_count(), MOST_WORKERS)
    with processes(workers) as pool:
        # Rigs are most of what would travel back.
        yield lambda i, rig: pool.submit(_measure, dataset.subset([i]), 0, rig), workers


def _measure(dataset: Any, index: int, with_rig: bool) -> _Measured:
    """Read and measure one record; what can't be read is a finding."""
    # Monocular depth in the original layout is relative, and its inputs' alpha is a guess.
    original = getattr(dataset, "layout", "") == "original"
    try:
        rows, summary, rig = measure(dataset[index], trust_input=not original)
        summary["numbered"] = original
        return rows, summary, rig if with_rig else None
    except (DatasetError, ValueError, OSError) as error:
        names = getattr(dataset, "names", None)
        return unreadable(names[index] if names else str(index), error)


def issue_receipt(dataset: Any, verdict: Verdict) -> Receipt:
    """Write the verdict, pass or fail, to `dataset.path`/receipts/gate.json.

    Raises:
        ValueError: if the verdict is about other data, or about a part of it.
    """
    if getattr(dataset, "is_subset", False) or verdict.is_subset:
        raise ValueError("verdict: is about a subset; validate and certify the whole set")
    if verdict.dataset_hash != dataset.content_hash or verdict.examples_total != len(dataset):
        raise ValueError(
            f"verdict: is about data {verdict.dataset_hash[:19]} of {verdict.examples_total} "
            f"records, the dataset is {dataset.content_hash[:19]} of {len(dataset)}; validate it"
        )
    if verdict.passed and verdict.examples_seen < verdict.examples_total:
        raise ValueError("verdict: passes without having seen every record; validate the whole set")
    return write_receipt(
        dataset,
        "gate",
        verdict.passed,
        verdict.summary,
        [f"{reason.code}: {reason.message}" for reason in verdict.reasons],
        thresholds=verdict.thresholds,
        records=(verdict.examples_seen, verdict.examples_total),
    )
