"""Claims and targets: a band for every quantity, and the verdict of the figures.

The texts stand in notebooks/claims.yaml (what the original's report says) and under `analysis` in
notebooks/params/study.yaml (what was to be reached); here is only how they are decided.
"""

import html
import inspect
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fresnel.analysis.runs import of
from fresnel.analysis.stats import Estimate, bins, each, estimate
from fresnel.study.arms import CVS_MODELS

Band = tuple[float, float]
LEVEL = {"level": 1.0, "a tenth farther": 1.1}
"""Lines in figures of perceptual distances' ratios."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the original's report, and what would decide on it.

    `quote`, `line`: its words, and where they stand. `quantity`, `unit`: what the bands are of.
    `explains`: what else could explain the figure. `change`: what would change the verdict.
    `shown`: the key of the figure that shows it."""

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
    shown: str = ""

    def decide(self, figure: Estimate) -> str:
        """ "confirmed" or "refuted" where the figure's whole interval lies in that band alone, else
        "open", as is what has no interval."""
        yes, no = (
            band[0] <= figure.low and figure.high <= band[1]
            for band in (self.confirmed, self.refuted)
        )
        return "open" if yes == no else "confirmed" if yes else "refuted"

    @property
    def rule(self) -> str:
        """The rule in words, as it was fixed beforehand."""
        words = []
        for low, high in (self.confirmed, self.refuted):
            word = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            word = f"{low:g}" if low == high else f"at most {high:g}" if math.isinf(low) else word
            words.append(f"{word} {self.unit}".strip())
        return (
            f"{self.quantity}: confirmed if the whole interval is {words[0]}, "
            f"refuted if it is {words[1]}, else open"
        )

    def heading(self) -> str:
        """What stands above the figures (Markdown)."""
        return (
            f"### {self.title}\n\n> {self.quote}\n>\n> *its report, line {self.line}*\n\n"
            f"**Test.** {self.test}\n\n**Rule.** {self.rule}."
        )

    def caption(self, figure: Estimate) -> str:
        """What a picture of the figure shows: the number and the verdict."""
        measured = f"{figure.text(1 if abs(figure.mean) >= 10 else 2)} {self.unit}".strip()
        measured = "no run measured it" if math.isnan(figure.mean) else measured
        name = self.quantity[0].upper() + self.quantity[1:]
        return f"{name}: {measured}. Verdict: {self.decide(figure)}."

    def answer(self, figure: Estimate) -> str:
        """What stands below them: the number, the verdict, and its limits (Markdown)."""
        named, at = self.caption(figure).split(": ", 1), f" ([Figure](#fig-{self.shown}))"
        return (
            f"**{named[0]}:** {named[1]}{'' if math.isnan(figure.mean) else at}\n\n"
            f"*What else would explain this?* {self.explains}\n\n"
            f"*What would change our mind?* {self.change}"
        )


def load(path: str | Path) -> dict[str, Claim]:
    """The claims of a YAML file, by id."""
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["claims"]
    bands = [{band: tuple(entry[band]) for band in ("confirmed", "refuted")} for entry in entries]
    pairs = zip(entries, bands, strict=True)
    return {e["id"]: Claim(**{"shown": e["id"], **e, **band}) for e, band in pairs}


def lessons(path: str | Path) -> pd.DataFrame:
    """Rule, the function that it is enforced by, and how."""
    return pd.DataFrame(yaml.safe_load(Path(path).read_text(encoding="utf-8"))["lessons"])


def ours(path: str | Path, metrics: Mapping[str, Any], figures: pd.DataFrame) -> pd.DataFrame:
    """What we ourselves said, by which runs, why it was wrong, what found it, and what is true now
    ("not measured in these runs" where most was not): by a finished 03's `metrics`, and by the
    estimates that an entry's "figures" names (`stats.estimate`'s arguments, and "digits")."""
    every = {name: rows[-1] for name, rows in metrics.get("summaries", {}).items()}
    own = next((name for name in CVS_MODELS if name in every), "")
    calls = {"one": own, "two": "cvs, 2 steps", "four": "cvs, 4 steps"}
    found = {word: every.get(name, {}) for word, name in calls.items()}
    found |= {"render": every.get("decoder render", {}), **(metrics.get("noise_left") or {})}
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["ours"]
    for entry in entries:
        template, asked, known = entry.pop("now"), entry.pop("figures", {}), dict(found)
        for name, one in asked.items():
            how = {key: value for key, value in one.items() if key != "digits"}
            if not math.isnan((made := estimate(figures, **how)).mean):
                known[name] = made.text(one.get("digits", 2), "+" if "minus" in one else "")
        if 2 * len(known.keys() & asked) >= len(asked):  # most of it
            known = dict.fromkeys(asked, "(not measured)") | known
        try:
            entry["true now"] = template.format(**known)
        except LookupError:
            entry["true now"] = "not measured in these runs"
    return pd.DataFrame(entries)


def source_of(name: str) -> str:
    """A function's code, folded, as HTML: the page works offline, and shows what it was."""
    found = inspect.unwrap(pkgutil.resolve_name(name))
    place = f"{found.__module__.replace('.', '/')}.py, line {inspect.getsourcelines(found)[1]}"
    return (
        f"<details class='fold'><summary><code>{name}</code>, {place}</summary>"
        f"<pre tabindex='0'>{html.escape(inspect.getsource(found))}</pre></details>"
    )


def target(
    entry: Mapping[str, Any], figures: pd.DataFrame, runs: pd.DataFrame
) -> dict[str, dict[str, Estimate]]:
    """The figures that a target of study.yaml asks for: a row's name -> bin -> estimate.

    Args:
        entry: "of" arms a "metric" (without: PSNR) within a "band", or at "least" so much, which
            may differ by bin; as it is, or "minus" or "over" an arm or a rival in their own runs
            (`stats.RIVALS`); "all": over all views, not in every bin.  Or "run", a step, with a
            "scalar" of its metrics, words of a path into them.
    """
    if "run" in entry:  # a gate that let it through never refuses it
        lets, path = "PASS" if entry.get("refused") else "", entry["scalar"]
        made = of(runs, entry["run"])
        values = [math.inf if run["verdict"] == lets else _inside(run, path) for run in made]
        rows = {entry["run"]: {"all": each(values)}}
    else:
        rows, metric = {}, entry.get("metric", "psnr")
        how = {word: entry[word] for word in ("minus", "over") if word in entry}
        to = "".join(f" {word} {other}" for word, other in how.items()).replace("_", " ")
        for arm in entry["of"]:
            found = bins(figures, arm, metric, **how)
            if entry.get("all"):
                found = {"all": estimate(figures, arm, "all", metric, **how)}
            rows[arm + to] = found
    return {n: r for n, r in rows.items() if not any(math.isnan(one.mean) for one in r.values())}


def _inside(values: Any, path: str) -> float | None:
    """What lies at a path of keys and places into nested values, None where nothing does."""
    for word in path.split():
        try:
            values = values[int(word) if isinstance(values, list) else word]
        except (LookupError, TypeError):
            return None
    return values


def band_of(entry: Mapping[str, Any], where: str) -> Band:
    """What a target wants in a bin."""
    least = entry.get("least", 0.0)
    least = least.get(where, 0.0) if isinstance(least, Mapping) else least
    return tuple(entry.get("band", (least, math.inf)))


def judge(
    entry: Mapping[str, Any], rows: Mapping[str, Mapping[str, Estimate]]
) -> tuple[str, str, Estimate]:
    """Of a target's figures: "met", "missed" and where, or "not run", by the means over seeds in
    every bin; where it is nearest to missing or furthest beyond; and the figure there."""
    margins, missed = [], []
    for name, row in rows.items():
        below = []
        for b, one in row.items():
            low, high = band_of(entry, b)
            margin = min(one.mean - low, high - one.mean)
            margins.append((margin, name if b == "all" else f"{name}: {b}", one))
            below += [b] * (margin < 0)
        if below:
            missed.append(name if len(below) == len(row) else f"{name}: {', '.join(below)}")
    _, worst, figure = min(margins, key=lambda found: found[0], default=(0.0, "-", Estimate()))
    said = f"missed ({'; '.join(missed)})" if missed else "met" if margins else "not run"
    return said, worst, figure


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
