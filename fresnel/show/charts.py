"""Charts of the reports: the gate's evidence, training, held-out figures, and many runs at once.

Each returns a `Figure`, which `fresnel.show.style.show` shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fresnel.scene.cameras import Cameras
from fresnel.show.style import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILION,
    new_figure,
    styled,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PALE, _INK = "#B9C0C8", "#111111"
"""A grey, and what is written on colours: neither follows the page's theme."""


@styled
def azimuth_rose(azimuth_deg: Sequence[float], series: Mapping[str, Sequence[float]]) -> Figure:
    """Polar bars of view statistics over azimuth, one rose per series; the input is at the top.

    Args:
        azimuth_deg: relative azimuths of the views, (K,).
        series: name -> K ratios to the input (1, dashed: as bright, or as large, as the input).
    """
    sector = np.round((np.asarray(azimuth_deg, float) + 22.5) % 360 // 45).astype(int)
    figure, axes = new_figure(1, len(series), subplot_kw={"projection": "polar"}, size=(7.2, 3.5))
    angles = np.deg2rad(np.arange(8) * 45.0)
    for axis, color, (name, values) in zip(
        np.atleast_1d(axes), [ORANGE, BLUE, GREEN], series.items(), strict=False
    ):
        ratios = np.asarray(values, float)
        known = [ratios[(sector == k) & np.isfinite(ratios)] for k in range(8)]
        means = [found.mean() if len(found) else 0.0 for found in known]
        axis.bar(angles, means, width=np.deg2rad(40), color=color, alpha=0.85)
        axis.plot(np.linspace(0, 2 * np.pi, 100), np.ones(100), "--", color=GREY, lw=1)
        axis.set_theta_zero_location("N")
        axis.set_theta_direction(-1)
        axis.set_xticks(angles, [f"{a}\N{DEGREE SIGN}" for a in range(0, 360, 45)])
        axis.set_ylim(0, max(1.25, 1.1 * max(means)))
        axis.set_yticks([0.5, 1], ["0.5", "1"], color=GREY)
        axis.set_title(name, loc="center")
    return figure


@styled
def camera_frusta(
    cameras: Cameras, input_camera: Cameras, *, pivot: Sequence[float], content: np.ndarray
) -> Figure:
    """The cameras of one record, their pivot and the object: in 3D, from above and from the front.

    Args:
        cameras: (V,) in the world.
        input_camera: ().
        pivot: the point the cameras are said to orbit.
        content: points on the object in the world, (P, 3).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
    space: Any = figure.add_subplot(grid[:, 0], projection="3d")
    centers, forward = cameras.centers.numpy(), cameras.forward.numpy()
    eye, gaze = input_camera.centers.numpy(), input_camera.forward.numpy()
    reach = 0.22 * float(np.linalg.norm(centers - np.asarray(pivot), axis=-1).mean())
    # matplotlib's third axis is up, the world's second is; +z comes towards the reader
    turn = [0, 2, 1]
    space.scatter(*content[:, turn].T, s=1.5, color=SKY, alpha=0.9, rasterized=True)
    for corners in _frusta(cameras, reach):
        space.plot(*corners[:, turn].T, color=BLUE, lw=0.9)
    (corners,) = _frusta(input_camera.reshape(1), 1.25 * reach)
    space.plot(*corners[:, turn].T, color=VERMILION, lw=1.4)
    space.scatter(*np.asarray(pivot)[turn, None], s=70, color="black", marker="+", zorder=5)
    space.invert_yaxis()
    space.set_aspect("equal")
    space.set_box_aspect(None, zoom=1.2)
    space.view_init(elev=24, azim=62)
    for side, name in zip((space.xaxis, space.yaxis, space.zaxis), "xzy", strict=True):
        side.set_pane_color((0, 0, 0, 0))
        side.set_tick_params(labelsize=7, pad=-2)
        side.set_label_text(name)
    arrow: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1.0, "width": 0.008}
    for row, (j, title) in enumerate([(2, "from above (x, z)"), (1, "from the front (x, y)")]):
        axis: Any = figure.add_subplot(grid[row, 1])
        flat = [0, j]
        axis.scatter(
            *content[:, flat].T, s=2, color=SKY, label="object", alpha=0.5, rasterized=True
        )
        axis.quiver(*centers[:, flat].T, *(2 * reach * forward[:, flat]).T, color=GREY, **arrow)
        axis.scatter(*centers[:, flat].T, s=22, color=BLUE, label="view cameras", zorder=3)
        axis.quiver(*eye[flat], *(2 * reach * gaze[flat]), color=VERMILION, **arrow)
        axis.scatter(*eye[flat], s=34, color=VERMILION, marker="s", label="input camera", zorder=4)
        axis.scatter(pivot[0], pivot[j], s=60, color="black", marker="+", label="pivot", zorder=5)
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_title(title)
        if j == 2:
            axis.invert_yaxis()  # +z, where azimuth 0 stands, is towards the reader
    figure.legend(*axis.get_legend_handles_labels(), ncols=4, loc="outside lower center")
    return figure


def _frusta(cameras: Cameras, depth: float) -> np.ndarray:
    """A line (V, P, 3) for each camera, that draws its pyramid from the eye to `depth`."""
    w, h = cameras.width, cameras.height
    corners = np.array([[0, 0, 1], [w, 0, 1], [w, h, 1], [0, h, 1]], float)
    seen = depth * corners @ np.linalg.inv(cameras.Ks.numpy()).transpose(0, 2, 1)
    pose, eyes = cameras.viewmats.numpy(), cameras.centers.numpy()[:, None]
    world = (seen - pose[:, None, :3, 3]) @ pose[:, :3, :3]
    return np.concatenate([eyes, world, eyes], axis=1)[:, [0, 1, 2, 0, 3, 4, 0, 2, 3, 4, 1]]


@styled
def loss_curves(
    log: Sequence[Mapping[str, float]],
    *,
    terms: Sequence[str] = ("loss",),
    against: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Figure:
    """Loss terms over steps, and beside them what the outputs are worth.

    Args:
        log: rows of the training log with ``step`` and the terms.
        against: name -> (steps, values) of ratios to the truth, drawn on the right over the band
            0.8 to 1.25.
    """
    figure, axes = new_figure(1, 2 if against else 1, size=(7.2, 2.9), squeeze=False)
    axis = axes[0, 0]
    for term in terms:
        rows = [(row["step"], row[term]) for row in log if row.get(term) is not None]
        if rows:
            axis.plot(*np.array(rows, float).T, "" if len(rows) > 2 else "o-", lw=1.4, label=term)
    if all(np.min(line.get_ydata()) > 0 for line in axis.lines) and axis.lines:
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel="loss", title="What the optimiser sees")
    if len(terms) > 1:
        axis.legend()
    if against:
        axis = axes[0, 1]
        axis.axhspan(0.8, 1.25, color=GREEN, alpha=0.12, lw=0)
        for name, (steps, values) in against.items():
            axis.plot(steps, values, "o-", ms=4, lw=1.4, label=name)
        axis.set_ylim(bottom=0)
        axis.set(xlabel="step", ylabel="validation outputs / truth", title="What a person sees")
        axis.legend()
    return figure


@styled
def bins_figure(
    summaries: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str,
    *,
    label: str,
    band: tuple[float, float] | None = None,
) -> Figure:
    """One metric by bin of azimuth difference, with 95 % intervals over objects.

    Args:
        summaries: name of the predictor -> what `evaluate.summarise` returned.
        band: acceptable values, shaded.
    """
    figure, axis = new_figure(size=(7.2, 3.2))
    bins = [entry["bin"] for entry in next(iter(summaries.values()))]
    width = 0.8 / len(summaries)
    if band:
        axis.axhspan(*band, color=GREEN, alpha=0.12, lw=0)
    for k, (name, summary) in enumerate(summaries.items()):
        mean, low, high = (
            np.array([entry[metric + end] for entry in summary], float)
            for end in ("", "_low", "_high")
        )
        x = np.arange(len(bins)) + (k - (len(summaries) - 1) / 2) * width
        axis.bar(x, mean, width * 0.92, label=name, color=CYCLE[k % len(CYCLE)])
        spread = np.nan_to_num(np.abs([mean - low, high - mean]))
        axis.errorbar(x, mean, spread, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2)
    axis.set_xticks(np.arange(len(bins)), bins)
    axis.set(xlabel="azimuth away from the input, degrees", ylabel=label)
    axis.grid(axis="x", visible=False)
    figure.legend(ncols=min(5, len(summaries)), loc="outside upper center")
    return figure


@styled
def by_azimuth(
    azimuth_deg: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    label: str,
    log: bool = False,
) -> Figure:
    """Lines of one quantity over relative azimuth, one line a run."""
    figure, axis = new_figure(size=(7.2, 2.9))
    for color, (name, values) in zip(
        [VERMILION, GREEN, BLUE, ORANGE], series.items(), strict=False
    ):
        order = np.argsort(azimuth_deg)
        axis.plot(
            np.asarray(azimuth_deg)[order],
            np.asarray(values, float)[order],
            "o-",
            color=color,
            label=name,
        )
    axis.set_xticks(range(-180, 181, 45))
    axis.set_xlabel("azimuth relative to the input camera, degrees")
    axis.set_ylabel(label)
    if log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.legend()
    return figure


@styled
def loss_against_usefulness(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Two runs' falling losses, and what their outputs are worth on held-out objects.

    Args:
        runs: name -> {"steps", "loss": the training log; "luminance_ratio": by-bin means,
            "bins": their names}.
    """
    figure, (left, right) = new_figure(1, 2, size=(7.2, 3.0))
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


@styled
def waterfall(parts: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Figure:
    """From nothing mended to all of it, a step a factor; one panel an outcome.

    Args:
        parts: outcome -> "none", "mended", "truth", and "factors" with their "gain": estimates
            with mean, low and high.
        labels: factor -> what stands at its step.
    """
    figure, axes = new_figure(1, len(parts), size=(7.2, 3.4), squeeze=False, sharey=True)
    for axis, (outcome, part) in zip(axes[0], parts.items(), strict=True):
        names = ["none mended", *(labels[name] for name in part["factors"]), "all mended"]
        steps = [entry["gain"] for entry in part["factors"].values()]
        gains, ends = [step.mean for step in steps], [part["none"].mean, part["mended"].mean]
        bottoms = ends[0] + np.cumsum([0.0, *gains[:-1]])
        places = np.arange(len(names))
        axis.bar(places[[0, -1]], ends, color=[VERMILION, GREEN])
        colors = [BLUE if gain >= 0 else ORANGE for gain in gains]
        axis.bar(places[1:-1], gains, bottom=bottoms, color=colors)
        tops = np.array([ends[0], *(bottoms + gains), ends[1]])
        spread = [
            [max(one.mean - one.low, 0), max(one.high - one.mean, 0)]
            for one in (part["none"], *steps, part["mended"])
        ]
        error = np.nan_to_num(np.array(spread, float)).T
        axis.errorbar(places, tops, error, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2)
        axis.axhline(part["truth"].mean, color=GREY, ls="--", lw=1)
        axis.text(-0.4, part["truth"].mean, "true views", color=GREY, fontsize=8, va="bottom")
        axis.set_xticks(places, names, rotation=35, ha="right", fontsize=8)
        axis.grid(axis="x", visible=False)
        axis.set_title(f"Share of the input's {outcome}", fontsize=10)
    return figure


@styled
def timeline(
    spans: Sequence[Mapping[str, Any]],
    stop_hours: float,
    ours: Mapping[str, float],
) -> Figure:
    """Where the original's hours and dollars went, and when it could have ended.

    Args:
        spans: "what", "began", "ended" (hours) and "usd" each.
        stop_hours: when the gate would have stopped it; NaN: no gate ran.
        ours: a name -> seconds, drawn as bars on the same scale.
    """
    figure, (top, bottom) = new_figure(
        2, 1, size=(7.2, 4.4), sharex=True, height_ratios=(1.0 + 0.28 * len(ours), 1.0)
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


@styled
def dots(
    rows: Mapping[str, Mapping[str, Any]],
    *,
    label: str,
    lines: Mapping[str, float] | None = None,
    band: tuple[float, float] | None = None,
    apart: Sequence[str] = (),
) -> Figure:
    """A row a name, a panel a bin: every seed a small dot, the mean a diamond, and a bar for the
    95 % interval over objects.  What lies far from the others stands at the edge, with its value.

    Args:
        rows: name -> bin -> an estimate with `mean`, `low`, `high` and `seeds`.
        lines: name -> value of dashed lines through every panel.
        band: acceptable values, shaded.
        apart: rows in grey, such as what needs no training.
    """
    bins = [name for name in next(iter(rows.values())) if name != "all"]
    figure, axes = new_figure(
        1, len(bins), size=(7.4, 0.9 + 0.24 * len(rows)), sharey=True, sharex=True, squeeze=False
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
        axis.set_title(f"{name}\N{DEGREE SIGN}" if name[0].isdigit() else name, fontsize=10)
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
