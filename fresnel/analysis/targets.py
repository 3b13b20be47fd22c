"""What was to be reached, and whether it was: every target against the study's figures.

PSNR targets are judged over white and over black: a background that agrees everywhere flatters
whoever draws little, and which one it is depends on the object.  A target that no run measured is
"not run", never "met".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fresnel.analysis.comparison import (
    BINS,
    CONTROL_ARM,
    Estimate,
    Run,
    Study,
    difference,
    estimate,
    mean,
)
from fresnel.evaluation.metrics import format_rows
from fresnel.study.arms import CVS_MODELS

FAR_BINS = BINS[-2:]
BACKGROUNDS = {"psnr_white": "white", "psnr": "black"}
NOT_RUN = "not run"


@dataclass(frozen=True)
class Target:
    """A target, who was measured for it, and the figures: a row's name -> bin -> estimate.

    wanted: bin -> lowest and highest value that meets it.
    """

    text: str
    who: str = ""
    rows: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    wanted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "met", "missed" and where, or "not run"; by the means over seeds."""
        known = {
            name: bins
            for name, bins in self.rows.items()
            if all(math.isfinite(bins[b].mean) for b in self.wanted)
        }
        if not known:
            return NOT_RUN
        missed = {
            name: [b for b, (low, high) in self.wanted.items() if not low <= bins[b].mean <= high]
            for name, bins in known.items()
        }
        parts = [
            f"{name}: {'every bin' if len(bins) == len(self.wanted) else ', '.join(bins)}"
            for name, bins in missed.items()
            if bins
        ]
        if not parts:
            return "met"
        return f"missed ({'; '.join(parts)})" if len(self.wanted) > 1 else "missed"

    @property
    def certain(self) -> bool:
        """Whether the intervals over objects leave no doubt of a "met"."""
        return all(
            low <= bins[b].low and bins[b].high <= high
            for bins in self.rows.values()
            for b, (low, high) in self.wanted.items()
        )

    @property
    def seeds(self) -> int:
        """The fewest seeds behind any figure."""
        counts = [len(bins[b].seeds) for bins in self.rows.values() for b in self.wanted]
        return min(counts, default=0)


def targets(study: Study, runs: Mapping[str, Run], control: Mapping[str, Run]) -> list[Target]:
    """All of the study's targets.

    Args:
        runs: every finished run by name (`comparison.newest_runs`).
        control: the main job's "01-original" and "03-control", where the study has none.
    """
    decoder = best(study, ("decoder",))
    cvs = best(study, CVS_MODELS)
    found = [
        _psnr("the decoder: copying the input + 3 dB", study, decoder, "copy_input", 3.0),
        _psnr("the decoder's aim: + 4 dB", study, decoder, "copy_input", 4.0),
        _psnr("the gated bootstrap within 0.5 dB of true views", study, "gated", "oracle", -0.5),
        _psnr("the same, four times the steps", study, "long-gated", "long-oracle", -0.5),
        _psnr("the same, the decoder saw 50 objects", study, "rest50-gated", "rest50-oracle", -0.5),
        _psnr("above the truth alone where that is scarce", study, "rest50-gated", "A50-only", 0.0),
        _psnr(
            "the best CVS, one step: level with the decoder's render, + 0.5 dB in the far bins",
            study, cvs, "decoder render", {b: 0.5 if b in FAR_BINS else 0.0 for b in BINS},
            note="chosen as best on these very objects",
        ),
    ]  # fmt: skip
    ratios = (("luminance_ratio", "light", 0.9, 1.1), ("coverage_ratio", "area", 0.85, 1.15))
    arms = dict.fromkeys(name for name in (decoder, cvs, "gated") if name in study)
    for metric, word, low, high in ratios:
        rows = {
            f"{word}, {name}": {b: estimate(study[name], b, metric) for b in BINS} for name in arms
        }
        found.append(
            Target(
                f"{word}: {low:g} to {high:g} of the truth's in every bin",
                ", ".join(arms),
                rows,
                dict.fromkeys(BINS, (low, high)),
            )
        )
    return [*found, *_control(study, runs, control)]


def best(study: Study, models: Sequence[str]) -> str:
    """The arm of these models with the highest mean PSNR over all azimuths; "" of none."""
    scores = {
        name: estimate(seeds, "all").mean
        for name, seeds in study.items()
        if not name.startswith("loss-") and next(iter(seeds.values()))["params"]["model"] in models
    }
    known = {name: score for name, score in scores.items() if math.isfinite(score)}
    return max(known, key=known.__getitem__) if known else ""


def _psnr(
    text: str,
    study: Study,
    ours: str,
    theirs: str,
    wanted: float | Mapping[str, float],
    note: str = "",
) -> Target:
    """ours - theirs in every bin; theirs is an arm, or a predictor of our own runs."""
    least = wanted if isinstance(wanted, Mapping) else dict.fromkeys(BINS, wanted)
    bands = {b: (low, math.inf) for b, low in least.items()}
    predictor = theirs in ("copy_input", "decoder render")
    if ours not in study or not (predictor or theirs in study):
        return Target(text, wanted=bands)
    other, against = (study[ours], theirs) if predictor else (study[theirs], "")
    rows = {
        f"over {word}": {
            b: difference(study[ours], other, b, metric=metric, against=against) for b in BINS
        }
        for metric, word in BACKGROUNDS.items()
    }
    return Target(text, f"{ours} - {theirs.replace('_', ' ')}", rows, bands, note)


def _control(study: Study, runs: Mapping[str, Run], control: Mapping[str, Run]) -> list[Target]:
    """The control's three targets; its figures have one column, "all" azimuths."""
    trained = list(study.get(CONTROL_ARM, {}).values())
    gates = [run for name, run in runs.items() if name.startswith("01-original-B")]
    if not trained and control.get("03-control"):
        trained = [control["03-control"]]
    if not gates and control.get("01-original"):
        gates = [control["01-original"]]
    fall = [run["metrics"]["loss_fall"] for run in trained]
    light = [run["metrics"]["luminance_ratio"] for run in trained]
    # a gate that passed the control never refused it, however long one waits
    took = [
        run["metrics"]["gate_duration_s"] if run["verdict"] == "FAIL" else math.inf for run in gates
    ]

    def one(text: str, who: str, values: list[Any], band: tuple[float, float], note: str) -> Target:
        rows = {"": {"all": Estimate(mean(values), tuple(values))}} if values else {}
        return Target(text, who, rows, {"all": band}, note)

    held_out = "held-out outputs over the truth's"
    return [
        one("the control's loss falls at least fivefold", "loss, first / last", fall,
            (5.0, math.inf), ""),
        one("its outputs hold less than a tenth of the light", held_out, light, (0.0, 0.1), ""),
        one("the gate refuses it in seconds", "the gate's time, s", took, (0.0, 60.0),
            f"{len(gates)} refused" if all(map(math.isfinite, took)) else "NOT refused by all"),
    ]  # fmt: skip


def targets_table(found: Sequence[Target]) -> str:
    """A row a target: what was wanted, of whom, where it stands worst, the verdict (Markdown)."""
    rows = []
    for target in found:
        word, _, where = target.verdict.partition(" (")
        verdict = f"**{word}**" + (f" ({where}" if where else "")
        ranged = target.verdict == "met" and any(
            math.isfinite(bins[b].low) for bins in target.rows.values() for b in target.wanted
        )
        if ranged and not target.certain:
            verdict += "; its intervals reach beyond"
        if target.verdict != NOT_RUN:
            verdict += f"; {target.seeds} seed{'s' if target.seeds != 1 else ''}"
        rows.append(
            {
                "target": target.text,
                "measured": target.who + (f"; {target.note}" if target.note else ""),
                "at its worst": _worst(target),
                "verdict": verdict,
            }
        )
    return format_rows(rows)


def _worst(target: Target) -> str:
    """The figure nearest to missing, or furthest beyond."""
    if target.verdict == NOT_RUN:
        return "-"
    margins = [
        (min(bins[b].mean - low, high - bins[b].mean), name, b)
        for name, bins in target.rows.items()
        for b, (low, high) in target.wanted.items()
        if math.isfinite(bins[b].mean)
    ]
    if not margins:
        return "-"
    _, name, b = min(margins)
    where = "" if b == "all" else f" ({', '.join(part for part in (name, b) if part)})"
    sign, unit = ("+", " dB") if " - " in target.who else ("", "")
    return target.rows[name][b].text(2, sign) + unit + where


def detail_table(found: Sequence[Target]) -> str:
    """The same by bin: mean ± spread over seeds [95 % over objects]; a table of dB, one of ratios
    (Markdown)."""
    tables: dict[str, dict[str, dict[str, str]]] = {"+": {}, "": {}}
    for target in found:
        sign = "+" if " - " in target.who else ""
        for name, bins in target.rows.items():
            label = f"{target.who}, {name}, dB" if sign else name
            if set(bins) == set(BINS):
                cells = {b: bins[b].text(2, sign) for b in BINS}
                tables[sign][label] = {"measured": label, **cells}
    parts = [format_rows(list(rows.values())) for rows in tables.values() if rows]
    return "\n\n".join(parts) or "No arm has run yet: notebooks/params/study.yaml."


def verdicts(found: Sequence[Target]) -> dict[str, str]:
    """Target -> verdict, for results.json."""
    return {target.text: target.verdict for target in found}
