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
from fresnel.analysis.stats import Estimate, best, bins, each

Band = tuple[float, float]


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


def ours(path: str | Path, metrics: Mapping[str, Any]) -> pd.DataFrame:
    """What we ourselves said, why it was wrong, what found it, and what is true now by a finished
    03's `metrics` ("not measured in these runs" without them)."""
    every = {name: rows[-1] for name, rows in metrics.get("summaries", {}).items()}
    calls = {"one": "cvs", "two": "cvs, 2 steps", "four": "cvs, 4 steps"}
    found = {word: every.get(name, {}) for word, name in calls.items()}
    found |= {"render": every.get("decoder render", {}), **(metrics.get("noise_left") or {})}
    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["ours"]
    for entry in entries:
        template = entry.pop("now")
        try:
            entry["true now, by 03-corrected"] = template.format(**found)
        except LookupError:
            entry["true now, by 03-corrected"] = "not measured in these runs"
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
        entry: "ours" and "theirs" (arms; or "copy_input", "decoder render" of our own runs) with
            "least" dB; or "metric" "of" arms within a "band"; or "run", a step, with a "scalar" of
            its metrics.  An arm may be "best of" a list.
    """
    wanted = entry.get("of") or [entry.get("ours", "")]
    arms = dict.fromkeys(a if isinstance(a, str) else best(figures, a) for a in wanted)
    if "run" in entry:  # a gate that let it through never refuses it
        lets = "PASS" if entry.get("refused") else ""
        found = of(runs, entry["run"])
        values = [math.inf if run["verdict"] == lets else run.get(entry["scalar"]) for run in found]
        rows = {entry["run"]: {"all": each(values)}}
    elif "metric" in entry:
        rows = {arm: bins(figures, arm, entry["metric"]) for arm in arms}
    else:
        rows = {
            f"{arm} - {entry['theirs'].replace('_', ' ')}, over {word}": bins(
                figures, arm, metric, minus=entry["theirs"]
            )
            for metric, word in (("psnr_white", "white"), ("psnr", "black"))
            for arm in arms
        }
    return {n: r for n, r in rows.items() if not any(math.isnan(one.mean) for one in r.values())}


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
    margins = []
    for name, row in rows.items():
        for b, one in row.items():
            low, high = band_of(entry, b)
            where = name if b == "all" else f"{name}: {b}"
            margins.append((min(one.mean - low, high - one.mean), where, one))
    missed = [where for margin, where, _ in margins if margin < 0]
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
