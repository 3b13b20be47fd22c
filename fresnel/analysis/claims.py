"""Claims and targets: a band for every quantity, and the verdict of the figures.

The texts stand in notebooks/claims.yaml (what the original's report says) and under `analysis` in
notebooks/params/study.yaml (what was to be reached); here is only how they are decided.
"""

from __future__ import annotations

import html
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fresnel.analysis.runs import of
from fresnel.analysis.stats import Estimate, best, bins, each, gaps

Band = tuple[float, float]


def verdict(figure: Estimate, confirmed: Band, refuted: Band) -> str:
    """ "confirmed" or "refuted" where the figure's whole interval lies in that band alone, else
    "open", as is what has no interval."""
    lies = [band[0] <= figure.low and figure.high <= band[1] for band in (confirmed, refuted)]
    return "open" if lies[0] == lies[1] else "confirmed" if lies[0] else "refuted"


@dataclass(frozen=True)
class Claim:
    """A sentence of the original's report, and what would decide on it.

    `quote`, `line`: its words, and where they stand. `quantity`, `unit`: what the bands are of.
    `explains`: what else could explain the figure. `change`: what would change the verdict."""

    id: str
    title: str
    quote: str
    line: int
    test: str
    quantity: str
    confirmed: Band
    refuted: Band
    explains: str
    change: str
    unit: str = ""

    def decide(self, figure: Estimate) -> str:
        """The verdict on a figure; "open" where it, or its interval, is not known."""
        return verdict(figure, self.confirmed, self.refuted)

    @property
    def rule(self) -> str:
        """The rule in words, as it was fixed beforehand."""
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"{self.quantity}: confirmed if the whole interval is {_words(self.confirmed)}{unit}, "
            f"refuted if it is {_words(self.refuted)}{unit}, else open"
        )

    def heading(self) -> str:
        """What stands above the figures (Markdown)."""
        return (
            f"### {self.title}\n\n> {self.quote}\n>\n> *its report, line {self.line}*\n\n"
            f"**Test.** {self.test}\n\n**Rule.** {self.rule}."
        )

    def answer(self, figure: Estimate) -> str:
        """What stands below them: the number, the verdict, and its limits (Markdown)."""
        digits = 1 if abs(figure.mean) >= 10 else 2
        measured = figure.text(digits) + (f" {self.unit}" if self.unit else "")
        if math.isnan(figure.mean):
            measured = "no run measured it"
        return (
            f"**{self.quantity[0].upper()}{self.quantity[1:]}:** {measured}. "
            f"**Verdict: {self.decide(figure)}.**\n\n"
            f"*What else would explain this?* {self.explains}\n\n"
            f"*What would change our mind?* {self.change}"
        )


def _words(band: Band) -> str:
    low, high = band
    if low == high:
        return f"{low:g}"
    if math.isinf(low):
        return f"at most {high:g}"
    return f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"


def load(path: str | Path) -> dict[str, Claim]:
    """The claims of a YAML file, by id."""
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["claims"]
    for entry in entries:
        entry |= {key: tuple(entry[key]) for key in ("confirmed", "refuted")}
    return {entry["id"]: Claim(**entry) for entry in entries}


def lessons(path: str | Path) -> pd.DataFrame:
    """Rule, the function that it is enforced by, and how."""
    return pd.DataFrame(yaml.safe_load(Path(path).read_text(encoding="utf-8"))["lessons"])


def source_of(name: str) -> str:
    """A function's code, folded, as HTML: the page works offline, and shows what it was."""
    module, _, function = name.rpartition(".")
    found = inspect.unwrap(getattr(importlib.import_module(module), function))
    place = f"{module.replace('.', '/')}.py, line {inspect.getsourcelines(found)[1]}"
    code = html.escape(inspect.getsource(found))
    return (
        f"<details class='fold'><summary><code>{name}</code>, {place}</summary>"
        f"<pre tabindex='0'>{code}</pre></details>"
    )


def target(
    entry: Mapping[str, Any], figures: pd.DataFrame, runs: pd.DataFrame
) -> dict[str, dict[str, Estimate]]:
    """The figures that a target of study.yaml asks for: a row's name -> bin -> estimate.

    Args:
        entry: "ours" and "theirs" (arms; or "copy_input", "decoder render" of our own runs) with
            "least" dB; or "metric" "of" arms within a "band"; or "run", a step, with a "scalar" of
            its metrics.  An arm may be "best of" a list.
    """
    if "run" in entry:
        found = of(runs, entry["run"])
        values = [run.get(entry["scalar"]) for run in found]
        if entry.get("refused"):  # a gate that let it through never refuses it
            values = [
                v if found[i]["verdict"] == "FAIL" else math.inf for i, v in enumerate(values)
            ]
        return {entry["run"]: {"all": each(values)}} if found else {}
    if "metric" in entry:
        arms = dict.fromkeys(_arm(arm, figures) for arm in entry["of"])
        rows = {arm: bins(figures, arm, entry["metric"]) for arm in arms}
    else:
        ours, theirs = _arm(entry["ours"], figures), entry["theirs"]
        rows = {
            f"{ours} - {theirs.replace('_', ' ')}, over {word}": gaps(figures, ours, theirs, metric)
            for metric, word in (("psnr_white", "white"), ("psnr", "black"))
        }
    return {n: r for n, r in rows.items() if not any(math.isnan(one.mean) for one in r.values())}


def _arm(arm: str | Sequence[str], figures: pd.DataFrame) -> str:
    return arm if isinstance(arm, str) else best(figures, arm)


def band_of(entry: Mapping[str, Any], where: str) -> Band:
    """What a target wants in a bin."""
    if "band" in entry:
        return tuple(entry["band"])
    least = entry["least"]
    return (least if isinstance(least, (int, float)) else least.get(where, 0.0)), math.inf


def judge(
    entry: Mapping[str, Any], rows: Mapping[str, Mapping[str, Estimate]]
) -> tuple[str, str, Estimate]:
    """Of a target's figures: "met", "missed" and where, or "not run", by the means over seeds in
    every bin; where it is nearest to missing or furthest beyond; and the figure there."""
    margins = []
    for name, row in rows.items():
        for b, one in row.items():
            low, high = band_of(entry, b)
            where = name if b == "all" else f"{name}: {b}"
            margins.append((min(one.mean - low, high - one.mean), where, one))
    if not margins:
        return "not run", "-", Estimate()
    missed = [where for margin, where, _ in margins if margin < 0]
    _, worst, figure = min(margins, key=lambda found: found[0])
    return f"missed ({'; '.join(missed)})" if missed else "met", worst, figure


def targets_table(
    entries: Sequence[Mapping[str, Any]], figures: pd.DataFrame, runs: pd.DataFrame
) -> pd.DataFrame:
    """A row a target: what was wanted, where it stands worst, the figure, seeds, the verdict."""
    rows = []
    for entry in entries:
        said, where, one = judge(entry, target(entry, figures, runs))
        row = {"target": entry["text"], "at its worst": where, "measured": one.text()}
        rows.append(row | {"seeds": len(one.seeds), "verdict": said})
    return pd.DataFrame(rows)
