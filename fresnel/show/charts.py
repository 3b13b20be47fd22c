"""Figures of the analysis: the original's timeline, the attribution, arms and seeds side by side.

As those of `fresnel.show.style`, which shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fresnel.show.style import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, _figure, _styled

_PALE, _INK = "#B9C0C8", "#111111"
"""A grey, and what is written on colours: neither follows the page's theme."""

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fresnel.analysis.comparison import Estimate


@_styled
def loss_against_usefulness(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Two runs' falling losses, and what their outputs are worth on held-out objects.

    Args:
        runs: name -> {"steps", "loss": the training log; "luminance_ratio": by-bin means,
            "bins": their names}.
    """
    figure, (left, right) = _figure(1, 2, figsize=(7.2, 3.0))
    for color, (name, run) in zip([VERMILION, GREEN, BLUE], runs.items(), strict=False):
        loss = np.asarray(run["loss"], float)
        left.plot(run["steps"], loss / loss[0], color=color, lw=1.4, label=name)
        right.plot(range(len(run["bins"])), run["luminance_ratio"], "o-", color=color, label=name)
        right.set_xticks(range(len(run["bins"])), run["bins"])
    left.set_title("Loss, relative to its start")
    left.set_yscale("log")
    left.set_xlabel("step")
    right.axhspan(0.8, 1.25, color=GREEN, alpha=0.12, lw=0)
    right.set_ylim(bottom=0)
    right.set_title("Held-out light, output / truth")
    right.set_xlabel("azimuth away from the input, degrees")
    left.legend()
    return figure


@_styled
def waterfall(parts: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Figure:
    """From nothing mended to all of it, a step a factor; one panel an outcome.

    Args:
        parts: outcome -> its entry of `attribution.attribute`: "none", "mended", "truth", each
            with an interval, and "factors" with their "gain".
        labels: factor -> what stands at its step.
    """
    figure, axes = _figure(1, len(parts), figsize=(7.2, 3.4), squeeze=False, sharey=True)
    for axis, (outcome, part) in zip(axes[0], parts.items(), strict=True):
        names = ["none mended", *(labels[name] for name in part["factors"]), "all mended"]
        gains = [entry["gain"] for entry in part["factors"].values()]
        bottoms = part["none"] + np.cumsum([0.0, *gains[:-1]])
        places = np.arange(len(names))
        axis.bar(places[[0, -1]], [part["none"], part["mended"]], color=[VERMILION, GREEN])
        colors = [BLUE if gain >= 0 else ORANGE for gain in gains]
        axis.bar(places[1:-1], gains, bottom=bottoms, color=colors)
        tops = np.array([part["none"], *(bottoms + gains), part["mended"]])
        entries = [(part, "none"), *((e, "gain") for e in part["factors"].values())]
        entries.append((part, "mended"))
        spread = [
            [max(entry[key] - entry[f"{key}_low"], 0), max(entry[f"{key}_high"] - entry[key], 0)]
            for entry, key in entries
        ]
        error = np.nan_to_num(np.array(spread, float)).T
        axis.errorbar(places, tops, error, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2)
        axis.axhline(part["truth"], color=GREY, ls="--", lw=1)
        axis.text(-0.4, part["truth"], "true views", color=GREY, fontsize=8, va="bottom")
        axis.set_xticks(places, names, rotation=35, ha="right", fontsize=8)
        axis.grid(axis="x", visible=False)
        axis.set_title(f"Share of the input's {outcome}", fontsize=10)
    return figure


@_styled
def timeline(
    spans: Sequence[Mapping[str, Any]],
    stop_hours: float,
    ours: Mapping[str, float],
) -> Figure:
    """Where the original's hours and dollars went, and when it could have ended.

    Args:
        spans: of `timeline.spans`.
        stop_hours: when the gate would have stopped it; NaN: no gate ran.
        ours: a name -> seconds, drawn as bars on the same scale.
    """
    figure, (top, bottom) = _figure(
        2, 1, figsize=(7.2, 4.4), sharex=True, height_ratios=(1.0 + 0.28 * len(ours), 1.0)
    )
    colors = [SKY, SKY, ORANGE, VERMILION, _PALE]
    for span, color in zip(spans, colors, strict=True):
        length = span["ended"] - span["began"]
        top.barh(0, length, left=span["began"], height=0.8, color=color, edgecolor="white")
        middle = span["began"] + length / 2
        name = span["what"].split(" (")[0].replace(" + ", " +\n").replace(" ", "\n", 1)
        top.text(
            middle,
            0,
            f"{name}\n${span['usd']:g}",
            ha="center",
            va="center",
            fontsize=7.5,
            color=_INK,
        )
    for row, (name, seconds) in enumerate(ours.items(), 1):
        top.barh(row, seconds / 3600, height=0.5, color=GREEN)
        top.text(seconds / 3600 + 0.04, row, f"{name}: {seconds:.0f} s", va="center", fontsize=8)
    top.set_ylim(len(ours) + 0.6, -0.6)
    top.set_yticks([])
    top.grid(axis="y", visible=False)
    top.set_title("The original's hours, and ours to the same scale")
    hours, money = [0.0], [0.0]
    for span in spans:
        hours.append(span["ended"])
        money.append(money[-1] + span["usd"])
    bottom.plot(hours, money, color=VERMILION, lw=1.8)
    bottom.fill_between(hours, money, color=VERMILION, alpha=0.12, lw=0)
    bottom.set_ylabel("USD spent")
    bottom.set_xlabel("hours since the start")
    bottom.set_xlim(-0.08, hours[-1] + 0.1)
    bottom.set_ylim(0, 1.15 * money[-1])
    if math.isfinite(stop_hours):
        for axis in (top, bottom):
            axis.axvline(stop_hours, color=GREEN, lw=1.6, ls="--")
        bottom.text(
            stop_hours + 0.05, 0.93 * money[-1],
            f"the gate stops it here: after {3600 * stop_hours:.0f} s, at $0",
            color=GREEN, fontsize=9, va="center",
        )  # fmt: skip
    return figure


@_styled
def dots(
    rows: Mapping[str, Mapping[str, Estimate]],
    *,
    label: str,
    lines: Mapping[str, float] | None = None,
    band: tuple[float, float] | None = None,
    apart: Sequence[str] = (),
) -> Figure:
    """A row a name, a panel a bin: every seed a small dot, the mean a diamond, and a bar for the
    95 % interval over objects.  What lies far from the others stands at the edge, with its value.

    Args:
        rows: name -> bin -> `comparison.Estimate`.
        lines: name -> value of dashed lines through every panel.
        band: acceptable values, shaded.
        apart: rows in grey, such as what needs no training.
    """
    bins = [name for name in next(iter(rows.values())) if name != "all"]
    figure, axes = _figure(
        1, len(bins), figsize=(7.4, 0.9 + 0.24 * len(rows)), sharey=True, sharex=True, squeeze=False
    )
    means = [found[name].mean for found in rows.values() for name in bins]
    low, high = _limits([*means], [*(lines or {}).values(), *(band or ())])
    for axis, name in zip(axes[0], bins, strict=True):
        if band:
            axis.axvspan(*band, color=GREEN, alpha=0.12, lw=0)
        for value in (lines or {}).values():
            axis.axvline(value, color=GREY, lw=1, ls="--")
        for y, (row, found) in enumerate(rows.items()):
            one, color = found[name], GREY if row in apart else BLUE
            if not low <= one.mean <= high:  # NaN too, of which nothing shows
                edge, marker, side = (low, "<", "left") if one.mean < low else (high, ">", "right")
                axis.plot([edge], [y], marker, ms=5, color=color, clip_on=False)
                gap = (5, 0) if side == "left" else (-5, 0)
                axis.annotate(
                    f"{one.mean:.2g}" if math.isfinite(one.mean) else "", (edge, y), gap,
                    textcoords="offset points", fontsize=7, ha=side, va="center", color="#333333",
                )  # fmt: skip
                continue
            if math.isfinite(one.low):
                axis.plot([one.low, one.high], [y, y], color=color, lw=1.2, alpha=0.5)
            axis.plot([one.mean], [y], "D", ms=5, color=color, mec="white", mew=0.6)
            below = [y + 0.3] * len(one.seeds)
            axis.plot(one.seeds, below, "o", ms=2.6, color=ORANGE, clip_on=False)
        axis.set_title(f"{name}\N{DEGREE SIGN}", fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
    axes[0, 0].set_xlim(low, high)
    axes[0, 0].set_yticks(range(len(rows)), list(rows), fontsize=8.5)
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
    figure.supxlabel(label, fontsize=9)
    return figure


def _limits(values: Sequence[float], also: Sequence[float]) -> tuple[float, float]:
    """An axis that shows most values well: fences as Tukey's, but 2.5 interquartile ranges beyond
    the quartiles, no wider than the values, and with what must be seen."""
    known = np.array([value for value in values if math.isfinite(value)] or [0.0])
    first, third = np.percentile(known, [25, 75])
    reach = 2.5 * (third - first)
    low = min(max(known.min(), first - reach), *also, math.inf)
    high = max(min(known.max(), third + reach), *also, -math.inf)
    edge = 0.08 * (high - low) or 0.5
    return float(low - edge), float(high + edge)
