"""Means over seeds and objects, and differences paired by object, with intervals that hold both.

Objects and trainings are two samples: the same objects are seen by every seed.  The variance of the
grand mean is the sum of both means' variances, the interval Student's with Satterthwaite's degrees
of freedom (Satterthwaite 1946).  What both share is counted twice, which errs to the wide side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fresnel.analysis.runs import OWN, of
from fresnel.evaluation.metrics import AZIMUTH_BINS

BINS = tuple(name for name, _ in AZIMUTH_BINS)
_BOUNDS = ["mean", "low", "high"]


@dataclass(frozen=True)
class Estimate:
    """A figure: its mean, every seed's own, and the interval that a rule asks (NaN: not known)."""

    mean: float = math.nan
    seeds: tuple[float, ...] = ()
    low: float = math.nan
    high: float = math.nan

    @property
    def sd(self) -> float:
        """Spread over seeds: the standard deviation; NaN of fewer than two."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else math.nan

    def text(self, digits: int = 2, sign: str = "") -> str:
        """Mean ± spread over seeds [interval]; "-" if nothing was measured."""
        if not math.isfinite(self.mean):
            return "-" if math.isnan(self.mean) else "never"
        form, space = f"{sign}.{digits}f", "\N{NO-BREAK SPACE}"
        text = f"{self.mean:{form}}"
        if math.isfinite(self.sd):
            text += f"{space}±{space}{self.sd:.{digits}f}"
        if math.isfinite(self.low) and self.low < self.high:
            text += f" [{self.low:{form}},{space}{self.high:{form}}]"
        return text


def each(values: Sequence[float | None]) -> Estimate:
    """A figure that every run has by itself: the interval is from the lowest to the highest, so
    that a rule decides only where all runs agree."""
    known = tuple(float(v) for v in values if v is not None and not math.isnan(v))
    return Estimate(float(np.mean(known)), known, min(known), max(known)) if known else Estimate()


def interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Of the mean of (seeds, objects), both samples of more; one seed: over objects alone.

    Returns:
        low, high; NaN of fewer than two objects.
    """
    from scipy.stats import t

    parts = [
        (means.var(ddof=1) / len(means), len(means) - 1)
        for means in (values.mean(axis=0), values.mean(axis=1))
        if len(means) > 1
    ]
    if values.shape[1] < 2:
        return math.nan, math.nan
    variance = sum(part for part, _ in parts)
    below = sum(part**2 / freedom for part, freedom in parts)
    freedom = variance**2 / below if below > 0 else math.inf
    reach = t.ppf((1 + confidence) / 2, freedom) * math.sqrt(variance)
    return float(values.mean() - reach), float(values.mean() + reach)


def estimate(
    figures: pd.DataFrame, arm: str, where: str = "all", metric: str = "psnr", predictor: str = OWN
) -> Estimate:
    """A metric of an arm in a bin of azimuths ("all": of all views).

    Without values by object (ratios are sums over objects) the interval is the mean of the seeds'
    own, widened by the seeds' spread.
    """
    rows = _rows(figures, arm, metric, predictor, where)
    if rows.empty:
        return Estimate()
    seeds, objects = tuple(rows["mean"]), _objects(rows)
    if objects.shape[1] > 1:
        low, high = interval(objects.to_numpy())
    else:
        center, low, high = rows[_BOUNDS].mean()
        reach = _reach(seeds)
        low, high = (
            center - math.hypot(center - low, reach),
            center + math.hypot(high - center, reach),
        )
    return Estimate(float(np.mean(seeds)), seeds, float(low), float(high))


def _reach(seeds: Sequence[float]) -> float:
    """Half the 95 % interval of a mean over seeds; 0 of one, of which nothing is known."""
    from scipy.stats import t

    n = len(seeds)
    return float(t.ppf(0.975, n - 1) * np.std(seeds, ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def difference(
    figures: pd.DataFrame,
    ours: str,
    theirs: str,
    where: str = "all",
    metric: str = "psnr",
    *,
    predictor: str = OWN,
    against: str = OWN,
) -> Estimate:
    """A metric of one arm minus another's in a bin, paired by seed and object.

    Args:
        predictor, against: which of ours and of theirs: what was trained, or as "copy_input".
    """
    a = _rows(figures, ours, metric, predictor, where)
    b = _rows(figures, theirs, metric, against, where)
    gap = (a - b).loc[a.index.intersection(b.index)]
    if gap.empty:
        return Estimate()
    objects = _objects(gap)
    low, high = interval(objects.to_numpy()) if objects.shape[1] > 1 else (math.nan, math.nan)
    return Estimate(float(gap["mean"].mean()), tuple(gap["mean"]), low, high)


def _rows(figures: pd.DataFrame, *key: str) -> pd.DataFrame:
    """Seeds x (mean, low, high, objects) of (arm, metric, predictor, bin); empty of none."""
    return figures.loc[key] if key in figures.index else figures.iloc[:0].droplevel([0, 1, 2, 3])


def _objects(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=_BOUNDS).dropna(axis=1)


def over_copy(figures: pd.DataFrame, arm: str, metric: str = "psnr") -> dict[str, Estimate]:
    """Bin -> an arm over copying the input."""
    return {b: difference(figures, arm, arm, b, metric, against="copy_input") for b in BINS}


def gaps(figures: pd.DataFrame, ours: str, theirs: str, **which: str) -> dict[str, Estimate]:
    """Bin -> one arm over another, dB over black (`difference`)."""
    return {b: difference(figures, ours, theirs, b, **which) for b in BINS}


def bins(figures: pd.DataFrame, arm: str, metric: str, predictor: str = OWN) -> dict[str, Estimate]:
    """Bin -> a metric of an arm."""
    return {b: estimate(figures, arm, b, metric, predictor) for b in BINS}


def known(rows: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Mapping[str, Estimate]]:
    """The rows of which something was measured."""
    return {
        name: row
        for name, row in rows.items()
        if any(math.isfinite(one.mean) for one in row.values())
    }


def extreme(bins: Mapping[str, Estimate], sign: int) -> Estimate:
    """The bin with the highest (1) or lowest (-1) mean; nothing where a bin is not known."""
    key = {b: math.inf if math.isnan(one.mean) else sign * one.mean for b, one in bins.items()}
    return bins[max(bins, key=lambda b: key[b])]


def best(figures: pd.DataFrame, arms: Sequence[str]) -> str:
    """The arm with the highest mean PSNR over all views; "" of none."""
    scores = {arm: estimate(figures, arm).mean for arm in arms}
    return max(
        (a for a, s in scores.items() if math.isfinite(s)), key=lambda arm: scores[arm], default=""
    )


def table(
    rows: Mapping[str, Mapping[str, Estimate]], name: str = "", sign: str = "", digits: int = 2
) -> pd.DataFrame:
    """Rows by bin as text: mean ± spread over seeds [95 %]."""
    return pd.DataFrame(
        [
            {name: row, **{b: e.text(digits, sign) for b, e in bins.items()}}
            for row, bins in rows.items()
        ]
    )


def describe(rows: Mapping[str, Mapping[str, Estimate]], label: str) -> str:
    """Alternative text of rows by bin: the mean of each, from the first bin to the last."""
    parts = [
        f"{name} {', '.join(f'{one.mean:.2f}' for one in bins.values())}"
        for name, bins in rows.items()
    ]
    return (
        f"{label}, means over seeds at {', '.join(next(iter(rows.values())))}. {'; '.join(parts)}."
    )


def arms_table(
    figures: pd.DataFrame, runs: pd.DataFrame, labels: Mapping[str, str]
) -> pd.DataFrame:
    """A row an arm that ran, over all views: mean ± spread over seeds (objects differ more than
    arms do, so their interval is left out), and the seconds that training took."""
    shown = {
        "dB": ("psnr", 2),
        "dB, white": ("psnr_white", 2),
        "dB, object": ("psnr_foreground", 2),
        "light": ("luminance_ratio", 2),
        "area": ("coverage_ratio", 2),
    }
    rows = []
    for arm, label in labels.items():
        took = [one["train_duration_s"] for one in of(runs, f"03-{arm}")]
        if not took:
            continue
        row = {"arm": arm, "what it is": label, "seeds": len(took)}
        for column, (metric, digits) in shown.items():
            one = estimate(figures, arm, "all", metric)
            row[column] = Estimate(one.mean, one.seeds).text(digits)
        rows.append(row | {"training, s": Estimate(float(np.mean(took)), tuple(took)).text(0)})
    return pd.DataFrame(rows)
