"""Arms and seeds of a study compared: means with their spread, differences paired by object."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fresnel.evaluation.metrics import AZIMUTH_BINS, format_rows, paired_difference, table
from fresnel.show import credits
from fresnel.study.protocol import restore_nan

Run = Mapping[str, Any]
Study = Mapping[str, Mapping[int, Run]]
"""Arm -> seed -> the newest finished run's record."""

BINS = tuple(name for name, _ in AZIMUTH_BINS)
CONTROL_ARM = "original"
BASELINES = {
    "decoder render": "decoder's own render",
    "copy_input": "copy the input",
    "mean_image": "mean image",
    "black_image": "black image",
}
"""Predictors that need no training of their own, as notebook 03 names them, and in words."""
ARMS = {
    "decoder-A": "the decoder, true views of A",
    "decoder-A50": "the decoder, true views of 50 objects",
    "decoder-train": "the decoder, true views of every training object",
    "decoder-many": "the decoder, every training object, 3.8 times the pictures of each",
    "decoder-shapes-A": "the decoder, 68 pictures of A's objects, also stretched",
    "decoder-shapes-A50": "the same of 50 objects",
    "decoder-shapes": "the same of every training object",
    "decoder-frontal": "the original's decoder, frontal views of A",
    "original": "the original's geometry, decoder and loss; gate overridden",
    "ungated": "bootstrap on B, its worst fifth left in",
    "gated": "bootstrap on B, without its worst fifth",
    "regression": "the gated data, one step alone, no consistency",
    "oracle": "true views of B, from the records' own inputs",
    "oracle-any": "true views of B, any of them as the input",
    "A-only": "true views of A",
    "render": "true views of A; sees the decoder's render of the target view",
    "refine": "the same; adds to that render",
    "refine-B": "true views of B, which the decoder has not seen; adds to its render",
    "twin-shipped": "68 pictures of 430 objects; adds to two renders of the decoder that ships, "
    "one of them from the mirrored input",
    "twin": "the same of every training object, by decoder-shapes; four times the steps",
    "rest50-gated": "bootstrap on 396 objects by a decoder that saw 50",
    "shapes50-gated": "the same by decoder-shapes-A50",
    "rest50-oracle": "true views of those 396",
    "A50-only": "true views of the 50",
    "A50-render": "the same; sees the decoder's render of the target view",
    "A50-refine": "the same; adds to that render",
    "refine-short": "refine, 9,600 samples instead of 256,000, from the records' own inputs",
    "long-gated": "gated, four times the steps",
    "long-oracle": "oracle, four times the steps",
    "long-refine": "refine-B, four times the steps",
}
"""The arms of notebooks/params/study.yaml in the order of tables and figures, and what they are."""
CONTRASTS = (
    ("gated", "oracle", ""),
    ("gated", "ungated", ""),
    ("gated", "A-only", ""),
    ("gated", "regression", ""),
    ("gated", "original", ""),
    ("gated", "", "decoder render"),
    ("oracle-any", "oracle", ""),
    ("render", "", "decoder render"),
    ("render", "A-only", ""),
    ("refine", "", "decoder render"),
    ("refine-B", "", "decoder render"),
    ("refine", "render", ""),
    ("refine-short", "", "decoder render"),
    ("twin-shipped", "", "decoder render"),
    ("twin", "", "decoder render"),
    ("twin", "refine", ""),
    ("rest50-gated", "A50-only", ""),
    ("rest50-gated", "rest50-oracle", ""),
    ("shapes50-gated", "rest50-oracle", ""),
    ("A50-render", "", "decoder render"),
    ("A50-refine", "", "decoder render"),
    ("long-gated", "long-oracle", ""),
    ("long-gated", "gated", ""),
    ("long-refine", "", "decoder render"),
    ("decoder-train", "decoder-A", ""),
    ("decoder-many", "decoder-train", ""),
    ("decoder-many", "", "copy_input"),
    ("decoder-shapes-A", "decoder-A", ""),
    ("decoder-shapes", "decoder-many", ""),
    ("decoder-shapes", "", "copy_input"),
    ("decoder-A", "decoder-frontal", ""),
    ("decoder-A", "", "copy_input"),
)
"""Ours, theirs, and which predictor of theirs ("": its model); theirs "" is the very same run."""
SHOWN = (
    ("psnr_white", "PSNR, dB, full frame over white", None),
    ("psnr", "PSNR, dB, full frame over black", None),
    ("psnr_foreground", "PSNR, dB, the object alone", None),
    ("luminance_ratio", "light, output / truth", (0.9, 1.1)),
    ("coverage_ratio", "area, output / truth", (0.85, 1.15)),
)
"""Metric, its axis, and the band that was aimed for."""


@dataclass(frozen=True)
class Estimate:
    """A figure: its mean, every seed's own, and a 95 % interval over objects (NaN: not known)."""

    mean: float
    seeds: tuple[float, ...] = ()
    low: float = math.nan
    high: float = math.nan

    @property
    def sd(self) -> float:
        """Spread over seeds: the standard deviation; NaN of fewer than two."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else math.nan

    def text(self, digits: int = 2, sign: str = "") -> str:
        """Mean ± spread over seeds [interval over objects]; "-" if nothing was measured."""
        if not math.isfinite(self.mean):
            return "-"
        form = f"{sign}.{digits}f"
        text = f"{self.mean:{form}}"
        space = "\N{NO-BREAK SPACE}"
        if math.isfinite(self.sd):
            text += f"{space}±{space}{self.sd:.{digits}f}"
        if math.isfinite(self.low):
            text += f" [{self.low:{form}},{space}{self.high:{form}}]"
        return text


def newest_runs(reports: str | Path) -> dict[str, dict[str, Any]]:
    """Name -> the newest run below a reports folder that finished and was not refused."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(reports).glob("**/results.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            name, started = record["name"], record["started_utc"]
            done = record["status"] == "finished" and record["verdict"] != "REFUSED"
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if done and (name not in found or started > found[name]["started_utc"]):
            found[name] = {**record, "folder": str(path.parent)}
    return dict(sorted(found.items()))


def study_runs(runs: Mapping[str, Run]) -> dict[str, dict[int, Run]]:
    """The trainings of a study among `newest_runs`: 03-ARM-sSEED (`fresnel.study.runner`)."""
    study: dict[str, dict[int, Run]] = {}
    for name, run in runs.items():
        if match := re.fullmatch(r"03-(.+)-s(\d+)", name):
            study.setdefault(match[1], {})[int(match[2])] = run
    order = [*ARMS, *sorted(study.keys() - ARMS.keys())]
    return {arm: dict(sorted(study[arm].items())) for arm in order if arm in study}


def in_bin(run: Run, model: str, azimuth_bin: str, metric: str) -> float:
    """A metric of one of a run's predictors in a bin; NaN where it was not measured."""
    summary = run["metrics"]["summaries"].get(model, ())
    value = next((e.get(metric) for e in summary if e["bin"] == azimuth_bin), None)
    return math.nan if value is None else value


def estimate(
    seeds: Mapping[int, Run], azimuth_bin: str, metric: str = "psnr", which: str = ""
) -> Estimate:
    """A metric of an arm in a bin.  The interval is a bootstrap over objects of the means over
    seeds where values by object were kept, else the seeds' own intervals, averaged.

    Args:
        which: this predictor of its runs (such as "decoder render"), not their model.
    """
    each = [in_bin(run, which or _model(run), azimuth_bin, metric) for run in seeds.values()]
    each = [value for value in each if math.isfinite(value)]
    objects = _objects(seeds, azimuth_bin, metric, which)
    if objects:
        _, low, high = paired_difference(objects, dict.fromkeys(objects, 0.0))
    else:
        low, high = (
            mean([in_bin(r, which or _model(r), azimuth_bin, metric + end) for r in seeds.values()])
            for end in ("_low", "_high")
        )
    return Estimate(mean(each), tuple(each), low, high)


def difference(
    ours: Mapping[int, Run],
    theirs: Mapping[int, Run],
    azimuth_bin: str,
    *,
    metric: str = "psnr",
    against: str = "",
    which: str = "",
) -> Estimate:
    """A metric of one arm minus another's in a bin.

    The interval is over objects, paired, of the means over seeds; the spread is that of the
    differences between runs of the same seed.  Without values by object there is no interval.

    Args:
        against: take this predictor of `theirs` (such as "decoder render"), not its own model.
        which: the same of `ours`.
    """
    both = [seed for seed in ours if seed in theirs]
    each = [
        in_bin(ours[s], which or _model(ours[s]), azimuth_bin, metric)
        - in_bin(theirs[s], against or _model(theirs[s]), azimuth_bin, metric)
        for s in both
    ]
    each = [value for value in each if math.isfinite(value)]
    one, other = (
        _objects(runs, azimuth_bin, metric, name)
        for runs, name in ((ours, which), (theirs, against))
    )
    if one and other:
        gap, low, high = paired_difference(one, other)
        return Estimate(gap, tuple(each), low, high)
    gap = (
        estimate(ours, azimuth_bin, metric, which).mean
        - estimate(theirs, azimuth_bin, metric, against).mean
    )
    return Estimate(gap, tuple(each))


def _objects(
    seeds: Mapping[int, Run], azimuth_bin: str, metric: str, which: str
) -> dict[str, float]:
    """Object -> mean over seeds; {} where a run kept no values by object."""
    values: dict[str, list[float]] = {}
    for run in seeds.values():
        found = run["metrics"].get(f"{metric}_by_object", {}).get(which or _model(run), {})
        for name, value in found.get(azimuth_bin, {}).items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: mean(found) for name, found in values.items()}


def _model(run: Run) -> str:
    return run["params"]["model"]


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


# --- what a report shows -----------------------------------------------------------------------


def by_bin(study: Study, metric: str) -> dict[str, dict[str, Estimate]]:
    """Every arm, and below them what needs no training, by bin: name -> bin -> estimate.

    The baselines are those of the first arm that has them all, but the control, whose decoder is
    the original's: they differ with an arm's training views (mean image) and its decoder.
    """
    arms = {name: seeds for name, seeds in study.items() if not name.startswith("loss-")}
    rows = {name: {b: estimate(seeds, b, metric) for b in BINS} for name, seeds in arms.items()}
    for which, label in BASELINES.items():
        chosen = [
            seeds
            for _, seeds in sorted(arms.items(), key=lambda arm: arm[0] == CONTROL_ARM)
            if all(which in _summaries(run) for run in seeds.values())
        ]
        if chosen:
            rows[label] = {b: estimate(chosen[0], b, metric, which) for b in BINS}
    return rows


def describe(rows: Mapping[str, Mapping[str, Estimate]], label: str) -> str:
    """Alternative text of rows by bin: the mean of each, from the first bin to the last."""
    parts = [
        f"{name} {', '.join(f'{one.mean:.2f}' for one in bins.values())}"
        for name, bins in rows.items()
    ]
    bins = ", ".join(next(iter(rows.values())))
    return f"{label}, means over seeds at {bins} degrees. {'; '.join(parts)}."


def _summaries(run: Run) -> Mapping[str, Any]:
    return run["metrics"]["summaries"]


def arms_table(study: Study) -> str:
    """Every arm over all azimuths: PSNR over black, over white and of the object alone, light,
    area, and what the training took; means over seeds ± their spread.  Markdown: a table of the
    decoders, one of the CVS."""
    shown = {
        "dB": ("psnr", 1),
        "dB, white": ("psnr_white", 1),
        "dB, object": ("psnr_foreground", 1),
        "light": ("luminance_ratio", 2),
        "area": ("coverage_ratio", 2),
    }
    tables: dict[str, list[dict[str, str]]] = {"decoder": [], "CVS": []}
    for arm, seeds in study.items():
        kind = "CVS" if _model(next(iter(seeds.values()))).startswith("cvs") else "decoder"
        row = {kind: f"**{arm}** {ARMS.get(arm, '')}".strip(), "seeds": str(len(seeds))}
        for column, (metric, digits) in shown.items():
            row[column] = _level(estimate(seeds, "all", metric), digits)
        took = tuple(run["metrics"]["train_duration_s"] for run in seeds.values())
        row["training, s"] = Estimate(mean(took), took).text(0)
        tables[kind].append(row)
    found = "\n\n".join(format_rows(rows) for rows in tables.values() if rows)
    return found or "No arm has run yet: notebooks/params/study.yaml."


def decoders_table(study: Study, shipped: Run | None) -> str:
    """Decoders by what they learned from: dB over copying the input, by bin (Markdown).

    Args:
        shipped: a run that was compared with the decoder that ships.
    """
    known: list[tuple[str, str, Mapping[int, Run], str]] = []
    for arm in (name for name in ARMS if name.startswith("decoder") and "frontal" not in name):
        for run in list(study.get(arm, {}).values())[:1]:
            params, pairs = run["params"], run["metrics"].get("pairs")
            views = f"{pairs:,} views" if pairs else "true views"
            text = f"{views} of {params.get('objects', '?')}, {params.get('steps')} steps"
            known.append((arm, text, study[arm], ""))
    if shipped:
        from fresnel.models.decoder import load_shipped

        about = load_shipped("pixel").provenance
        text = f"{about['training_set']}, {about['params']['steps']} steps"
        known.append(("the one that ships", text, {0: shipped}, "decoder render"))
    rows = []
    for name, text, seeds, which in known:
        row = {"decoder": name, "learned from": text, "seeds": str(len(seeds))}
        for b in BINS:
            over = (
                difference(seeds, seeds, b, metric=m, against="copy_input", which=which)
                for m in ("psnr", "psnr_white")
            )
            row[b] = " / ".join(gap.text(2, "+").split(" [")[0] for gap in over)
        rows.append(row)
    return format_rows(rows) or "No decoder has run yet: notebooks/params/study.yaml."


def contrasts(study: Study, metric: str = "psnr") -> dict[str, dict[str, Estimate]]:
    """The `CONTRASTS` whose arms have run: "ours - theirs" -> bin (and "all") -> difference."""
    found = {}
    for ours, theirs, against in CONTRASTS:
        if ours in study and (not theirs or theirs in study):
            name = f"{ours} - {theirs or BASELINES[against]}"
            other = study[theirs or ours]
            found[name] = {
                b: difference(study[ours], other, b, metric=metric, against=against)
                for b in (*BINS, "all")
            }
    return found


def contrasts_table(study: Study, metric: str = "psnr") -> str:
    """`contrasts` in dB: mean ± spread over seeds [95 % over objects] (Markdown)."""
    rows = [
        {"dB": name, **{b: gap.text(2, "+") for b, gap in bins.items()}}
        for name, bins in contrasts(study, metric).items()
    ]
    return format_rows(rows) or "No two arms have run yet: notebooks/params/study.yaml."


def steps_table(study: Study) -> str:
    """One, two and four network calls a view: dB over all azimuths, what the further calls gain
    over one, paired by object, and the light of each (Markdown)."""
    rows = []
    for arm, seeds in study.items():
        names = {name for run in seeds.values() for name in _summaries(run)}
        more = sorted(name for name in names if re.fullmatch(r"cvs, \d+ steps", name))
        if not more:
            continue
        row = {"arm": arm, "1 step, dB": _level(estimate(seeds, "all"))}
        for name in more:
            count = name.removeprefix("cvs, ")
            row[f"{count}, dB"] = _level(estimate(seeds, "all", which=name))
            gain = _negative(difference(seeds, seeds, "all", against=name))
            row[f"{count} - 1, dB"] = gain.text(2, "+")
        light = [estimate(seeds, "all", "luminance_ratio", which).mean for which in ("", *more)]
        row["light"] = " / ".join(f"{value:.2f}" for value in light)
        rows.append(row)
    return format_rows(rows) or "No arm was sampled in several steps."


def _level(found: Estimate, digits: int = 2) -> str:
    """Without the interval: it is over objects, which differ more than arms do."""
    return Estimate(found.mean, found.seeds).text(digits)


def _negative(found: Estimate) -> Estimate:
    return Estimate(-found.mean, tuple(-s for s in found.seeds), -found.high, -found.low)


def loss_cell(study: Study, data: str, mask: str, network: str) -> Mapping[int, Run]:
    """The runs of one of the loss side's eight cells.  Two of them are arms of the study."""
    arms = {
        ("original", "laplacian", "onestep"): "original",
        ("corrected", "alpha", "consistency"): "ungated",
    }
    name = f"loss-{data}-{mask}-{network}"
    return study.get(name) or study.get(arms.get((data, mask, network), name), {})


def loss_table(study: Study) -> str:
    """The eight cells of the loss side, over all azimuths (Markdown)."""
    rows = []
    for data, mask, network in itertools.product(
        ("original", "corrected"), ("laplacian", "alpha"), ("onestep", "consistency")
    ):
        seeds = loss_cell(study, data, mask, network)
        row = {"data": data, "mask": mask, "network": network, "seeds": str(len(seeds))}
        for metric, label, digits in (
            ("luminance_ratio", "light", 2),
            ("coverage_ratio", "area", 2),
            ("psnr", "dB", 1),
            ("psnr_foreground", "dB, object", 1),
        ):
            row[label] = _level(estimate(seeds, "all", metric), digits)
        rows.append(row)
    if all(row["seeds"] == "0" for row in rows):
        return "No cell has run yet: notebooks/params/study.yaml."
    return format_rows(rows)


def main_table(trained: Mapping[str, Run]) -> str:
    """The main job's trainings by bin; with the corrected one its trivial baselines (Markdown).

    Args:
        trained: role -> run: "03-control", "03-corrected", either or both.
    """
    tables = {
        f"{role.removeprefix('03-')}: {name.replace('_', ' ')}": restore_nan(summary)
        for role, run in trained.items()
        for name, summary in _summaries(run).items()
        if name in ("cvs", "decoder render") or role == "03-corrected"
    }
    metrics = ("psnr", "ssim", "luminance_ratio", "coverage_ratio")
    return table(tables, metrics=metrics) if tables else "No trained runs."


def credits_table(runs: Iterable[Run | None]) -> str:
    """What the runs' own reports say of the objects that they picture (Markdown)."""
    entries = [entry for run in runs if run for entry in run["metrics"].get("credits", [])]
    rows = credits.credit_rows(entries)
    return rows or "The runs name nobody: their reports are of an older version."
