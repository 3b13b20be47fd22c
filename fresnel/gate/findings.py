"""What checks return and how they are decided: thresholds, measurements, sequential tests.

A check says of every record whether it shows a fault.  Whether the *set* has it is decided by
Wald's sequential probability ratio test on those flags, so the gate can stop at ten records and
state how often it will be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Row = dict[str, Any]


@dataclass(frozen=True)
class GateConfig:
    """Thresholds of the gate.  The docstring of each check says how its own were set.

    The first four are the sequential test's: a healthy set shows a fault in at most
    `healthy_rate` of its records, a faulty one in at least `faulty_rate`; `false_alarm` is the
    probability with which one check fails a healthy set early, `miss` that with which it stops
    looking at a faulty one.
    """

    healthy_rate: float = 0.05
    faulty_rate: float = 0.5
    false_alarm: float = 5e-4
    miss: float = 0.01

    empty_coverage: float = 0.001
    empty_ratio: float = 0.02
    max_empty: float = 0.1
    min_coverage_ratio: float = 0.5
    max_pivot_offset: float = 0.2
    max_stray: float = 0.03
    max_hull_miss: float = 0.005
    max_input_miss: float = 0.005
    max_centroid_residual: float = 0.1
    max_floating: float = 0.15
    max_photometric: float = 0.95
    max_up_tilt_deg: float = 45.0
    max_epipolar: float = 1.4
    max_frozen: float = 0.1
    max_constant: float = 0.02
    min_side_coverage: float = 0.45
    min_luminance_ratio: float = 0.6
    max_luminance_ratio: float = 1.6
    dark_view: float = 0.08
    max_dark: float = 0.1
    bright_view: float = 12.0
    max_bright: float = 0.1
    max_drift: float = 0.75
    max_clipped: float = 0.35
    max_swapped: float = 1.7
    max_border: float = 0.02
    max_cropped: float = 0.3
    min_detail_ratio: float = 0.42
    max_grain: float = 12.0
    min_identity_psnr: float = 13.0
    min_identity_iou: float = 0.6
    max_duplicates: float = 0.02
    max_class_share: float = 0.9
    min_azimuth_spread: float = 0.45

    def __post_init__(self) -> None:
        if not 0 < self.healthy_rate < self.faulty_rate < 1:
            raise ValueError(
                f"healthy_rate, faulty_rate: got {self.healthy_rate}, {self.faulty_rate}, want "
                "0 < healthy_rate < faulty_rate < 1"
            )
        if not (0 < self.false_alarm < 0.5 and 0 < self.miss < 0.5):
            raise ValueError(f"false_alarm, miss: got {self.false_alarm}, {self.miss}, want < 0.5")


@dataclass(frozen=True)
class Reason:
    """Why data was refused.

    Args:
        code: machine name, e.g. "pivot_offset".
        message: plain language with the numbers, no full stop.
        hint: what to do about it.
        values: the numbers and their thresholds.
        symptom_of: code of the reason that explains this one, if any.
        mend: name of the change that makes the data consistent again, if one was found.
    """

    code: str
    message: str
    hint: str
    values: dict[str, float] = field(default_factory=dict)
    symptom_of: str | None = None
    mend: str | None = None


@dataclass(frozen=True)
class Finding:
    """What one check found: a flag per record, and what to say if they are too many.

    Args:
        flags: 1 where a record shows the fault, 0 where not, NaN where it can't be asked.
        at_once: one record, or the set as a whole, is enough; no test of proportions.
        late: can only be said of the whole set.
    """

    code: str
    flags: np.ndarray
    message: str
    hint: str
    values: dict[str, float] = field(default_factory=dict)
    at_once: bool = False
    late: bool = False


def sequential(
    shown: int, asked: int, config: GateConfig
) -> tuple[Literal["faulty", "healthy", "undecided"], float]:
    """Wald's test of "in at most `healthy_rate` of the records" against "in `faulty_rate`".

    Returns:
        The decision and the log likelihood ratio; its sign decides where no more data comes
        (Wald, Sequential Analysis, 1947; error probabilities hold to within his approximation).
    """
    low, high = config.healthy_rate, config.faulty_rate
    ratio = shown * math.log(high / low) + (asked - shown) * math.log((1 - high) / (1 - low))
    if ratio >= math.log((1 - config.miss) / config.false_alarm):
        return "faulty", ratio
    if ratio <= math.log(config.miss / (1 - config.false_alarm)):
        return "healthy", ratio
    return "undecided", ratio


def binomial_tail(shown: int, asked: int, rate: float) -> float:
    """P(at least `shown` of `asked`) at a rate, exactly."""
    terms = [
        math.lgamma(asked + 1)
        - math.lgamma(k + 1)
        - math.lgamma(asked - k + 1)
        + k * math.log(rate)
        + (asked - k) * math.log1p(-rate)
        for k in range(shown, asked + 1)
    ]
    return min(1.0, sum(math.exp(term) for term in terms))


@dataclass(frozen=True)
class Seen:
    """The measurements as columns, of views and of records."""

    rows: Sequence[Row]
    objects: Sequence[Row]
    config: GateConfig
    meta: dict[str, Any] = field(default_factory=dict)

    def column(self, key: str) -> np.ndarray:
        """One value per view."""
        return np.array([row[key] for row in self.rows], dtype=np.float64)

    def record(self, key: str) -> np.ndarray:
        """One value per record, NaN where it is unknown."""
        return np.array([row.get(key, math.nan) for row in self.objects], dtype=np.float64)

    def of_objects(self, key: str) -> np.ndarray:
        """A column of the record rows, without the records that lack it."""
        values = self.record(key)
        return values[np.isfinite(values)]

    @property
    def owner(self) -> np.ndarray:
        """Which record each view belongs to."""
        counts = [row["views"] for row in self.objects]
        return np.repeat(np.arange(len(counts)), counts)

    def per_record(self, values: np.ndarray, how: Any = np.median) -> np.ndarray:
        """A statistic of each record's finite views; NaN where there are none."""
        out = np.full(len(self.objects), np.nan)
        finite = np.isfinite(values)
        kept, counts = values[finite], np.bincount(self.owner[finite], minlength=len(out))
        first = np.cumsum(counts) - counts
        for count in np.unique(counts[counts > 0]):  # those with as many at once
            rows = np.flatnonzero(counts == count)
            out[rows] = how(kept[first[rows, None] + np.arange(count)], axis=1)
        return out

    @property
    def empty(self) -> np.ndarray:
        """Which views show nothing: by coverage, absolute and relative to the input's."""
        ratio = np.nan_to_num(self.column("coverage_ratio"), nan=1.0)
        config = self.config
        return (self.column("coverage") < config.empty_coverage) | (ratio < config.empty_ratio)

    @property
    def filled(self) -> np.ndarray:
        return ~self.empty

    def of_filled(self, key: str) -> np.ndarray:
        """A column of the views, NaN where a view is empty."""
        return np.where(self.filled, self.column(key), np.nan)

    def azimuth_bins(self) -> np.ndarray:
        """Centres of the 45 degree bins that the views fall in, 180 for -180."""
        centre = 45.0 * np.round(self.column("azimuth_deg") / 45.0)
        return np.where(centre <= -180.0, 180.0, centre + 0.0)  # + 0.0: no -0.0


def flags(condition: np.ndarray, known: np.ndarray) -> np.ndarray:
    """1 and 0 where a condition is known, NaN elsewhere."""
    return np.where(known, condition.astype(np.float64), np.nan)


def median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def share(values: np.ndarray) -> float:
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    return float(np.mean(values)) if len(values) else math.nan


def flagged(values: np.ndarray, marks: np.ndarray) -> float:
    """Median of the values of the records that are flagged (of all, if none is)."""
    return median(values[marks > 0]) if (marks > 0).any() else median(values)


def beyond(values: np.ndarray, limit: float, *, below: bool = False) -> tuple[np.ndarray, float]:
    """Flags of the records above (or below) a limit, and what they reach: see `flagged`."""
    marks = flags(values < limit if below else values > limit, np.isfinite(values))
    return marks, flagged(values, marks)


def invalid(seen: Seen, key: str, code: str, things: str, are: str, hint: str) -> Finding:
    """A count per record of things that must not be there; one of them is enough."""
    bad = seen.record(key)
    marks, _ = beyond(bad, 0)
    total = float(np.nansum(bad))
    message = f"{total:.0f} {things} in {np.nansum(marks):.0f} records are {are}"
    return Finding(code, marks, message, hint, {"count": total}, at_once=True)


def plain(value: Any) -> Any:
    """A JSON-able copy; NaN becomes None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
