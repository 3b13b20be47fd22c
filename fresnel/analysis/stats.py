"""Means over seeds and objects, and differences paired by object, with intervals that hold both.

Objects and trainings are two samples: the same objects are seen by every seed.  The variance of the
grand mean is the sum of both means' variances, the interval Student's with Satterthwaite's degrees
of freedom (Satterthwaite 1946).  What both share is counted twice, which errs to the wide side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import t

from fresnel.analysis.runs import OWN, of
from fresnel.evaluation.metrics import AZIMUTH_BINS

BINS = tuple(name for name, _ in AZIMUTH_BINS)
RIVALS = ("copy_input", "decoder render", "shipped twin", *(f"cvs, {n} steps" for n in (1, 2, 4)))
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
        spread = "" if math.isnan(self.sd) else f"{space}±{space}{self.sd:.{digits}f}"
        known = math.isfinite(self.low) and self.low < self.high
        reach = f" [{self.low:{form}},{space}{self.high:{form}}]" if known else ""
        return f"{self.mean:{form}}{spread}{reach}"


def each(values: Sequence[float | None]) -> Estimate:
    """A figure that every run has by itself: the interval is from the lowest to the highest, so
    that a rule decides only where all runs agree."""
    known = tuple(float(v) for v in values if v is not None and not math.isnan(v))
    return Estimate(float(np.mean(known)), known, min(known), max(known)) if known else Estimate()


def interval(values: np.ndarray) -> tuple[float, float]:
    """Low and high (95 %) of the mean of (seeds, objects), both samples of more; one seed: over
    objects alone; NaN of fewer than two objects."""
    if values.shape[1] < 2:
        return math.nan, math.nan
    samples = [means for means in (values.mean(0), values.mean(1)) if len(means) > 1]
    parts = np.array([means.var(ddof=1) / len(means) for means in samples])
    below = (parts**2 / [len(means) - 1 for means in samples]).sum()
    freedom = parts.sum() ** 2 / below if below > 0 else math.inf
    reach = t.ppf(0.975, freedom) * math.sqrt(parts.sum())
    return float(values.mean() - reach), float(values.mean() + reach)


def over_objects(values: np.ndarray, over: np.ndarray | None = None) -> Estimate:
    """Of (seeds, objects): the mean, or the ratio of the means, whose interval is that of its
    linearisation (values - ratio over) / mean(over); nothing where `over` is nothing."""
    below = np.ones_like(values) if over is None else over
    if not below.mean() or np.isnan(values).any():
        return Estimate()
    mean = float(values.mean() / below.mean())
    low, high = interval((values - mean * below) / below.mean())
    seeds = values.mean(axis=1) / below.mean(axis=1)
    return Estimate(mean, tuple(map(float, seeds)), mean + low, mean + high)


def estimate(
    figures: pd.DataFrame,
    arm: str,
    where: str = "all",
    metric: str = "psnr",
    predictor: str = OWN,
    *,
    minus: str = "",
    over: str = "",
) -> Estimate:
    """A metric of an arm in a bin of azimuths ("all": of all views).

    Without values by object (ratios are sums over objects) the interval is the mean of the seeds'
    own, widened by the 95 % interval of the seeds' mean; of one seed's nothing is known.

    Args:
        predictor: what was trained, or as "cvs, 2 steps".
        minus: what it is the difference to, paired by seed and object: an arm, or one of `RIVALS`
            in our own runs.
        over: what it is a multiple of, likewise (a ratio of means).
    """
    other = minus or over
    theirs = (arm, metric, other) if other in RIVALS else (other, metric, OWN)
    keys = [(arm, metric, predictor, where), *([(*theirs, where)] if other else [])]
    if any(key not in figures.index for key in keys):
        return Estimate()
    rows, *others = (figures.loc[key] for key in keys)
    if over:
        pair = [one.loc[rows.index.intersection(others[0].index)] for one in (rows, others[0])]
        both = [one.drop(columns=_BOUNDS).dropna(axis=1) for one in pair]
        objects = both[0].columns.intersection(both[1].columns)
        if len(objects):
            return over_objects(both[0][objects].to_numpy(), both[1][objects].to_numpy())
        seeds = tuple(pair[0]["mean"] / pair[1]["mean"])
        return Estimate(float(np.mean(seeds)), seeds)
    for one in others:
        rows = (rows - one).loc[rows.index.intersection(one.index)]
    values, means = rows.drop(columns=_BOUNDS).dropna(axis=1).to_numpy(), tuple(rows["mean"])
    found, n = Estimate(float(np.mean(means)), means, *interval(values)), len(means)
    if minus or math.isfinite(found.low):
        return found
    center, low, high = rows[_BOUNDS].mean()
    reach = t.ppf(0.975, n - 1) * found.sd / math.sqrt(n) if n > 1 else 0.0
    low, high = center - math.hypot(center - low, reach), center + math.hypot(high - center, reach)
    return replace(found, low=float(low), high=float(high))


def bins(
    figures: pd.DataFrame, arm: str, metric: str = "psnr", **compared: str
) -> dict[str, Estimate]:
    """Bin -> a metric of an arm, or how it compares with another's (`estimate`'s minus, over)."""
    return {b: estimate(figures, arm, b, metric, **compared) for b in BINS}


def known(rows: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Mapping[str, Estimate]]:
    """The rows of which something was measured."""
    return {n: row for n, row in rows.items() if any(math.isfinite(e.mean) for e in row.values())}


def ranked(rows: Mapping[str, Mapping[str, Estimate]]) -> list[dict[str, Mapping[str, Estimate]]]:
    """The rows of which something was measured, by their mean over bins, highest first, in parts of
    at most ten."""
    means = {n: np.nanmean([e.mean for e in row.values()]) for n, row in known(rows).items()}
    order = sorted(means, key=lambda name: -means[name])
    return [{n: rows[n] for n in order[k : k + 10]} for k in range(0, len(order), 10)]


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
    cells = pd.DataFrame(rows).map(lambda one: one.text(digits, sign)).T
    return cells.rename_axis(name).reset_index()


def describe(rows: Mapping[str, Mapping[str, Estimate]], label: str) -> str:
    """Alternative text of rows by bin: the mean of each, from the first bin to the last."""
    parts = [
        f"{name} {', '.join(f'{one.mean:.2f}' for one in found.values())}"
        for name, found in rows.items()
    ]
    at = ", ".join(next(iter(rows.values())))
    return f"{label}, means over seeds at {at}. {'; '.join(parts)}."


_SHOWN = {
    "dB": ("psnr", 1),
    "SSIM": ("ssim", 3),
    "perceptual": ("perceptual", 1),
    "edges": ("edge_energy_ratio", 2),
    "coarse edges": ("coarse_edge_energy_ratio", 2),
    "alternating": ("checkerboard_ratio", 2),
    "blocks": ("blocks_ratio", 2),
    "light": ("luminance_ratio", 2),
    "area": ("coverage_ratio", 2),
    "disagreement": ("disagreement", 1),
    "faces": ("faces", 2),
}
"""Column of `arms_table`: metric and digits."""


def arms_table(
    figures: pd.DataFrame,
    runs: pd.DataFrame,
    labels: Mapping[str, str],
    rivals: Mapping[str, tuple[str, str]] | None = None,
) -> pd.DataFrame:
    """A row an arm that ran, over all views: mean ± spread over seeds (objects differ more than
    arms do, so their interval is left out), the noise that it leaves of 0.17 where it is asked, and
    the seconds that training took. Columns of which no run knows anything are left out.

    Args:
        rivals: further rows: name -> the arm in whose runs it was measured, and its predictor.
    """
    known_of, rows = set(figures.index.get_level_values("metric")), []
    places = {arm: (arm, OWN) for arm in labels} | dict(rivals or {})
    for name, (arm, predictor) in places.items():
        made = of(runs, f"03-{arm}")
        if not made:
            continue
        row = {
            "arm": name,
            "what it is": labels.get(name, "in that arm's runs: " + arm),
            "seeds": len(made),
        }
        for word, (metric, digits) in _SHOWN.items():
            if metric in known_of:
                one = estimate(figures, arm, "all", metric, predictor)
                row[word] = Estimate(one.mean, one.seeds).text(digits)
        if name in labels:
            shares = [(run.get("noise_left") or {}).get("left") for run in made]
            row["noise left"] = each([share[1] for share in shares if share]).text(3).split(" [")[0]
            took = tuple(run["train_duration_s"] for run in made)
            row["training, s"] = Estimate(float(np.mean(took)), took).text(0)
        rows.append(row)
    return pd.DataFrame(rows).fillna("-")


def calls_table(
    figures: pd.DataFrame, runs: pd.DataFrame, labels: Mapping[str, str]
) -> pd.DataFrame:
    """Perceptual distance and SSIM by network calls a view, of the arms that were asked for
    several: mean ± spread over seeds."""
    rows = []
    for arm in labels:
        own = {str(p.get("sampling_steps", 1)) for p in runs.params[runs.step == f"03-{arm}"]}
        found: dict[int, tuple[Estimate, ...]] = {}
        for predictor in (OWN, *(name for name in RIVALS if name.endswith("steps"))):
            count = own if predictor == OWN else {predictor.split()[1]}
            both = tuple(
                estimate(figures, arm, "all", metric, predictor)
                for metric in ("perceptual", "ssim")
            )
            if len(count) == 1 and math.isfinite(both[1].mean):
                found[int(*count)] = both
        if len(found) > 1:
            cells = {
                (k, n): Estimate(pair[k].mean, pair[k].seeds).text((1, 3)[k])
                for n, pair in found.items()
                for k in (0, 1)
            }
            rows.append(pd.Series(cells, name=arm))
    shown = pd.DataFrame(rows).fillna("-").sort_index(axis=1)
    shown.columns = [f"{('perceptual', 'SSIM')[k]}, {n}" for k, n in shown.columns]
    return shown.rename_axis("calls").reset_index()
