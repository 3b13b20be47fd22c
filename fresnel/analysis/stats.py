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
from scipy.stats import t

from fresnel.analysis.runs import OWN, of
from fresnel.evaluation.metrics import AZIMUTH_BINS

BINS = tuple(name for name, _ in AZIMUTH_BINS)
RIVALS = ("copy_input", "decoder render")
"""What an arm is compared with in its own runs."""
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
    """Low and high of the mean of (seeds, objects), both samples of more; one seed: over objects
    alone; NaN of fewer than two objects."""
    if values.shape[1] < 2:
        return math.nan, math.nan
    samples = [means for means in (values.mean(0), values.mean(1)) if len(means) > 1]
    parts = np.array([means.var(ddof=1) / len(means) for means in samples])
    below = (parts**2 / [len(means) - 1 for means in samples]).sum()
    freedom = parts.sum() ** 2 / below if below > 0 else math.inf
    reach = t.ppf((1 + confidence) / 2, freedom) * math.sqrt(parts.sum())
    return float(values.mean() - reach), float(values.mean() + reach)


def estimate(
    figures: pd.DataFrame, arm: str, where: str = "all", metric: str = "psnr", predictor: str = OWN
) -> Estimate:
    """A metric of an arm in a bin of azimuths ("all": of all views).

    Without values by object (ratios are sums over objects) the interval is the mean of the seeds'
    own, widened by the 95 % interval of the seeds' mean; of one seed's nothing is known.
    """
    rows = _rows(figures, arm, metric, predictor, where)
    one, n = _over_objects(rows), len(rows)
    if n == 0 or math.isfinite(one.low):
        return one
    center, low, high = rows[_BOUNDS].mean()
    reach = t.ppf(0.975, n - 1) * one.sd / math.sqrt(n) if n > 1 else 0.0
    low, high = center - math.hypot(center - low, reach), center + math.hypot(high - center, reach)
    return Estimate(one.mean, one.seeds, float(low), float(high))


def difference(
    figures: pd.DataFrame,
    ours: str,
    theirs: str,
    where: str = "all",
    metric: str = "psnr",
    predictor: str = OWN,
) -> Estimate:
    """A metric of one arm minus another's in a bin, paired by seed and object.

    Args:
        theirs: an arm, or one of `RIVALS` in our own runs.
        predictor: which of ours: what was trained, or as "cvs, 2 steps".
    """
    a = _rows(figures, ours, metric, predictor, where)
    arm, against = (ours, theirs) if theirs in RIVALS else (theirs, OWN)
    b = _rows(figures, arm, metric, against, where)
    return _over_objects((a - b).loc[a.index.intersection(b.index)])


def _rows(figures: pd.DataFrame, *key: str) -> pd.DataFrame:
    """Seeds x (mean, low, high, objects) of (arm, metric, predictor, bin); empty of none."""
    return figures.loc[key] if key in figures.index else figures.iloc[:0].droplevel([0, 1, 2, 3])


def _over_objects(rows: pd.DataFrame) -> Estimate:
    if rows.empty:
        return Estimate()
    objects = rows.drop(columns=_BOUNDS).dropna(axis=1).to_numpy()
    return Estimate(float(rows["mean"].mean()), tuple(rows["mean"]), *interval(objects))


def bins(
    figures: pd.DataFrame, arm: str, metric: str = "psnr", predictor: str = OWN
) -> dict[str, Estimate]:
    """Bin -> a metric of an arm."""
    return {b: estimate(figures, arm, b, metric, predictor) for b in BINS}


def gaps(
    figures: pd.DataFrame, ours: str, theirs: str, metric: str = "psnr", predictor: str = OWN
) -> dict[str, Estimate]:
    """Bin -> `difference`."""
    return {b: difference(figures, ours, theirs, b, metric, predictor) for b in BINS}


def known(rows: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Mapping[str, Estimate]]:
    """The rows of which something was measured."""
    measured = {n: any(math.isfinite(e.mean) for e in row.values()) for n, row in rows.items()}
    return {name: row for name, row in rows.items() if measured[name]}


def extreme(bins: Mapping[str, Estimate], sign: int) -> Estimate:
    """The bin with the highest (1) or lowest (-1) mean; nothing where a bin is not known."""
    return max(bins.values(), key=lambda e: math.inf if math.isnan(e.mean) else sign * e.mean)


def best(figures: pd.DataFrame, arms: Sequence[str]) -> str:
    """The arm with the highest mean PSNR over all views; "" of none."""
    scores = pd.Series({arm: estimate(figures, arm).mean for arm in arms}, dtype=float).dropna()
    return str(scores.idxmax()) if len(scores) else ""


def table(
    rows: Mapping[str, Mapping[str, Estimate]], name: str = "", sign: str = "", digits: int = 2
) -> pd.DataFrame:
    """Rows by bin as text: mean ± spread over seeds [95 %]."""
    text = {row: {b: e.text(digits, sign) for b, e in found.items()} for row, found in rows.items()}
    return pd.DataFrame([{name: row, **cells} for row, cells in text.items()])


def describe(rows: Mapping[str, Mapping[str, Estimate]], label: str) -> str:
    """Alternative text of rows by bin: the mean of each, from the first bin to the last."""
    parts = [
        f"{name} {', '.join(f'{one.mean:.2f}' for one in found.values())}"
        for name, found in rows.items()
    ]
    at = ", ".join(next(iter(rows.values())))
    return f"{label}, means over seeds at {at}. {'; '.join(parts)}."


def arms_table(
    figures: pd.DataFrame, runs: pd.DataFrame, labels: Mapping[str, str]
) -> pd.DataFrame:
    """A row an arm that ran, over all views: mean ± spread over seeds (objects differ more than
    arms do, so their interval is left out), and the seconds that training took."""
    shown = {"dB": "psnr", "dB, white": "psnr_white", "dB, object": "psnr_foreground"}
    shown |= {"light": "luminance_ratio", "area": "coverage_ratio"}
    rows = []
    for arm, label in labels.items():
        took = tuple(one["train_duration_s"] for one in of(runs, f"03-{arm}"))
        if not took:
            continue
        row = {"arm": arm, "what it is": label, "seeds": len(took)}
        for column, metric in shown.items():
            one = estimate(figures, arm, "all", metric)
            row[column] = Estimate(one.mean, one.seeds).text()
        rows.append(row | {"training, s": Estimate(float(np.mean(took)), took).text(0)})
    return pd.DataFrame(rows)
