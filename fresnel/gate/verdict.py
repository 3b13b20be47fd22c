"""The gate: is this multi-view data fit to train on, and if not, what is wrong with it?

`validate` looks at ten examples, goes on only while nothing is wrong, and confirms a pass on the
whole set.  Its `Verdict` names ranked causes in plain language.
"""

import contextlib
import math
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from tqdm.auto import tqdm

from fresnel.data.images import DatasetError
from fresnel.gate.checks import Row, Seen
from fresnel.gate.decide import Reason, decide, figures
from fresnel.gate.measure import measure, print_of
from fresnel.gate.receipts import Receipt, write_receipt
from fresnel.gate.thresholds import GateConfig
from fresnel.host.machine import core_count
from fresnel.host.pool import MOST_WORKERS, processes
from fresnel.poses.explain import GOOD
from fresnel.poses.geometry import Rig


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Args:
        passed: True when no check failed.
        reasons: the failures, most likely cause first, each followed by its symptoms.
        summary: one or two sentences for a person.
        notes: what readers warned of; checks that could not be made, and why; what shows in too few
            records to count.
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

    def __repr__(self) -> str:
        codes = ", ".join(reason.code for reason in self.reasons) or "no reasons"
        return f"Verdict({self.summary!r}; {codes}; {len(self.objects)} records)"

    def _repr_html_(self) -> str:
        import fresnel  # which knows the rooms above this one

        return fresnel.preview(self)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; NaN becomes None."""
        copy: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return copy


def validate(
    dataset: Any,
    config: GateConfig | None = None,
    *,
    first: int = 10,
    workers: int | None = None,
    progress: bool = True,
    against: Any = None,
) -> Verdict:
    """Look at `first` evenly spaced records, go on while nothing is wrong, confirm on the rest.

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
    started, total, look = time.monotonic(), len(dataset), min(first, len(dataset))
    meta = dict(getattr(dataset, "meta", None) or {})
    if against is not None:
        numbered = getattr(against, "layout", "") == "original"
        others = (against[k] for k in range(len(against)))
        meta["against"] = [{**print_of(other), "numbered": numbered} for other in others]
    rows: list[Row] = []
    objects: list[Row] = []
    rigs: dict[int, Rig] = {}
    seen = Seen(rows, objects, config or GateConfig(), meta)
    reasons: tuple[Reason, ...] = ()
    notes: tuple[str, ...] = ()
    with contextlib.closing(_stream(dataset, look, workers, progress)) as stream:
        for count, (record_rows, summary, rig) in enumerate(stream, 1):
            rows += record_rows
            objects.append(summary)
            if rig is not None and len(rigs) < 2 * _RIGS:
                rigs[count - 1] = rig
            if count in (look, total):
                look = max(count + first, math.ceil(1.25 * count))
                seen = Seen(rows, objects, seen.config, meta, final=count == total)
                reasons, notes = decide(seen, rigs)
                if reasons:
                    break
    if not total:
        reasons = (Reason("no_data", "the dataset has no records", "check the path"),)
    return Verdict(
        passed=not reasons,
        reasons=reasons,
        summary=_summary(reasons, f"{len(objects)} of {total} records ({len(rows)} views)"),
        notes=(*_warnings(meta), *notes),
        measurements=rows,
        objects=[{k: v for k, v in row.items() if k not in _INNER} for row in objects],
        figures=figures(seen),
        thresholds=asdict(seen.config),
        dataset_hash=dataset.content_hash,
        is_subset=bool(getattr(dataset, "is_subset", False)),
        examples_seen=len(objects),
        examples_total=total,
        duration_s=time.monotonic() - started,
    )


def _warnings(meta: dict[str, Any]) -> list[str]:
    """What readers said of the files: see `dataset.open` and `render_set`."""
    parts = {"": meta, **meta.get("parts", {})}
    said = [
        f"{name}: {said}" if name else said
        for name, part in parts.items()
        for said in part.get("warnings", ())
    ]
    return said + _tainted(meta)


def _tainted(meta: dict[str, Any]) -> list[str]:
    """Which parts of a set were made by weights that were trained with the gate overridden."""
    parts = {"it": meta, **meta.get("parts", {})}
    taint = "was made by weights that were trained with the gate overridden"
    return [f"{name} {taint}" for name, part in parts.items() if part.get("gate_overridden")]


def _summary(reasons: Sequence[Reason], seen: str) -> str:
    if not reasons:
        return f"PASS: {seen}, no check failed."
    first, *rest = reasons
    caused = [r.code for r in rest if r.symptom_of == first.code]
    others = [r.code for r in rest if r.symptom_of != first.code]
    summary = f"FAIL after {seen}: {first.message}."
    summary += f" What follows from it: {', '.join(caused)}." if caused else ""
    return summary + (f" Also: {', '.join(others)}." if others else "")


_RIGS = 40
"""Of how many records cameras and small masks are kept, to find out what is wrong with poses; and
of as many again that look wrong."""
_INNER = ("prints", "looks", "numbered")
_WORTH_PROCESSES = 120  # records: some seconds of measuring on one core, as processes cost to start
_Measured = tuple[list[Row], Row, Rig | None]


def _stream(
    dataset: Any, first: int, workers: int | None, progress: bool
) -> Generator[_Measured, None, None]:
    """All records measured: `first` evenly spaced ones, then the rest, each prefix of which is
    spread over the set.  Processes start when the first examples have not refused the set."""
    total = len(dataset)
    sample = sorted({*np.linspace(0, total - 1, first).round().astype(int).tolist()})
    golden = 0.6180339887498949
    rest = sorted({*range(total)} - {*sample}, key=lambda index: (index * golden) % 1.0)
    many = workers is None and core_count() >= 4 and len(rest) >= _WORTH_PROCESSES
    many = many and hasattr(dataset, "subset")
    for what, indices, split in (("first examples", sample, False), ("whole set", rest, many)):
        count, left = min(core_count(), MOST_WORKERS), _RIGS if indices is sample else _RIGS - first
        with processes(count) if split else ThreadPoolExecutor(workers or 2) as pool:
            queue = []
            for k, index in enumerate(indices):
                part, row = dataset, index
                if split:  # what travels to a process is one record, nothing that is said of all
                    part, row = replace(dataset.subset([index]), meta={}, parts=()), 0
                queue.append(pool.submit(_measure, part, row, k < left))
            options: dict[str, Any] = {"delay": 2, "disable": not progress or None}
            try:
                for future in tqdm(queue, desc=f"gate: {what}", unit="object", **options):
                    yield future.result()
            finally:
                for future in [] if split else queue:  # (`processes` ends its own)
                    future.cancel()


def _measure(dataset: Any, index: int, with_rig: bool) -> _Measured:
    """Read and measure one record; what can't be read is a finding."""
    # Monocular depth in the original layout is relative, and its inputs' alpha is a guess.
    original = getattr(dataset, "layout", "") == "original"
    try:
        rows, summary, rig = measure(dataset[index], trust_input=not original)
        kept = with_rig or summary.get("mismatch", 0.0) > 4 * GOOD
        return rows, summary | {"numbered": original}, rig if kept else None
    except (DatasetError, ValueError, OSError) as error:
        names, said = getattr(dataset, "names", None), f"{type(error).__name__}: {error}"[:300]
        return [], {"name": names[index] if names else str(index), "error": said, "views": 0}, None


def issue_receipt(dataset: Any, verdict: Verdict) -> Receipt:
    """Write the verdict, pass or fail, where `receipts` says; one on data that was made by weights
    of an overridden gate is overridden, too.

    Raises:
        ValueError: if the verdict is about other data, or about a part of it.
    """
    about = (verdict.dataset_hash, verdict.examples_total)
    whole = verdict.examples_seen == verdict.examples_total or not verdict.passed
    subset = getattr(dataset, "is_subset", False) or verdict.is_subset or not whole
    made_so = _tainted(getattr(dataset, "meta", None) or {})
    if subset or about != (dataset.content_hash, len(dataset)):
        raise ValueError(
            f"verdict: is about {'a subset' if subset else 'other data'} ({about[0][:19]} of "
            f"{about[1]} records; this is {dataset.content_hash[:19]} of {len(dataset)}); validate "
            "and certify the whole set"
        )
    return write_receipt(
        dataset,
        "gate",
        verdict.passed,
        verdict.summary,
        [f"{reason.code}: {reason.message}" for reason in verdict.reasons] or made_so,
        overridden=bool(made_so),
        thresholds=verdict.thresholds,
        records=(verdict.examples_seen, verdict.examples_total),
    )
