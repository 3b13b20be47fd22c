"""Charts of the reports: the gate's evidence, training, held-out figures, and many runs at once.

Each returns a `Figure`, which `fresnel.show.style.show` shows.
"""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from fresnel.scene.cameras import Cameras
from fresnel.show.style import BLUE, CYCLE, GREEN, GREY, ORANGE, SKY, STYLE, VERMILION

_PALE, _INK = "#B9C0C8", "#111111"
"""A grey, and what is written on colours: neither follows the page's theme."""
_BAND = {"color": GREEN, "alpha": 0.12, "lw": 0}
_WHISKERS: dict[str, Any] = {"fmt": "none", "ecolor": "#333333", "elinewidth": 0.9, "capsize": 2}


def _new(*args: Any, size: tuple[float, float], **kwargs: Any) -> Any:
    """`Figure.subplots` of a figure (inches) that no window holds."""
    figure = Figure(figsize=size)
    return figure, figure.subplots(*args, squeeze=False, **kwargs)


@rc_context(STYLE)
def azimuth_rose(azimuth_deg: Sequence[float], series: Mapping[str, Sequence[float]]) -> Figure:
    """Polar bars over the views' relative azimuths (K,), a rose for each name -> K ratios to the
    input (1, dashed: as bright, or as large); the input is at the top."""
    sector = np.round((np.asarray(azimuth_deg, float) + 22.5) % 360 // 45).astype(int)
    figure, axes = _new(1, len(series), subplot_kw={"projection": "polar"}, size=(7.2, 3.5))
    angles = np.deg2rad(np.arange(8) * 45.0)
    colors = (ORANGE, BLUE, GREEN)
    for axis, color, (name, values) in zip(axes[0], colors, series.items(), strict=False):
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


@rc_context(STYLE)
def camera_frusta(
    cameras: Cameras, input_camera: Cameras, *, pivot: Sequence[float], content: np.ndarray
) -> Figure:
    """The cameras (V,) and the input's () of one record, the pivot that they are said to orbit, and
    points (P, 3) on the object, all in the world: in 3D, from above and from the front."""
    figure = Figure(figsize=(7.2, 4.8))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
    space: Any = figure.add_subplot(grid[:, 0], projection="3d")
    target = np.asarray(pivot)
    reach = 0.22 * float(np.linalg.norm(cameras.centers.numpy() - target, axis=-1).mean())
    shown = [
        ("view cameras", cameras, BLUE, GREY, {"marker": "o", "s": 22}, 0.9, 1.0),
        ("input camera", input_camera.reshape(1), VERMILION, VERMILION, {"marker": "s", "s": 34},
         1.4, 1.25),
    ]  # fmt: skip
    # matplotlib's third axis is up, the world's second is; +z comes towards the reader
    turn = [0, 2, 1]
    space.scatter(*content[:, turn].T, s=1.5, color=SKY, alpha=0.9, rasterized=True)
    for _, group, color, _, _, width, longer in shown:
        for corners in frusta(group, longer * reach):
            space.plot(*corners[:, turn].T, color=color, lw=width)
    space.scatter(*target[turn, None], s=70, color="black", marker="+", zorder=5)
    space.invert_yaxis()
    space.set_aspect("equal")
    space.set_box_aspect(None, zoom=1.2)
    space.view_init(elev=24, azim=62)
    for side, name in zip((space.xaxis, space.yaxis, space.zaxis), "xzy", strict=True):
        side.set_pane_color((0, 0, 0, 0))
        side.set_tick_params(labelsize=7, pad=-2)
        side.set_label_text(name)
    arrow: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1.0, "width": 0.008}
    for row, flat, title in (
        (0, [0, 2], "from above (x, z)"),
        (1, [0, 1], "from the front (x, y)"),
    ):
        axis: Any = figure.add_subplot(grid[row, 1])
        axis.scatter(
            *content[:, flat].T, s=2, color=SKY, label="object", alpha=0.5, rasterized=True
        )
        for name, group, color, tint, dot, _, _ in shown:
            eyes, gaze = group.centers.numpy()[:, flat], group.forward.numpy()[:, flat]
            axis.quiver(*eyes.T, *(2 * reach * gaze).T, color=tint, **arrow)
            axis.scatter(*eyes.T, color=color, label=name, zorder=3, **dot)
        axis.scatter(*target[flat], s=60, color="black", marker="+", label="pivot", zorder=5)
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_title(title)
        if row == 0:
            axis.invert_yaxis()  # +z, where azimuth 0 stands, is towards the reader
    figure.legend(*axis.get_legend_handles_labels(), ncols=4, loc="outside lower center")
    return figure


def frusta(cameras: Cameras, depth: float) -> np.ndarray:
    """A line (V, P, 3) for each camera, that draws its pyramid from the eye to `depth`."""
    w, h = cameras.width, cameras.height
    corners = np.array([[0, 0, 1], [w, 0, 1], [w, h, 1], [0, h, 1]], float)
    seen = depth * corners @ np.linalg.inv(cameras.Ks.numpy()).transpose(0, 2, 1)
    pose, eyes = cameras.viewmats.numpy(), cameras.centers.numpy()[:, None]
    world = (seen - pose[:, None, :3, 3]) @ pose[:, :3, :3]
    return np.concatenate([eyes, world, eyes], axis=1)[:, [0, 1, 2, 0, 3, 4, 0, 2, 3, 4, 1]]


@rc_context(STYLE)
def lines(*panels: Mapping[str, Any]) -> Figure:
    """Lines side by side.

    Args:
        panels: each "series" (name -> (x, y); few points get markers), maybe "band" (acceptable
            values, shaded), "colors", "legend" (False: none), and what `Axes.set` takes ("title").
    """
    figure, axes = _new(1, len(panels), size=(7.2, 2.9))
    for axis, panel in zip(axes[0], panels, strict=True):
        settings = dict(panel)
        band, legend = settings.pop("band", None), settings.pop("legend", True)
        colors, series = settings.pop("colors", CYCLE), settings.pop("series")
        if band:
            axis.axhspan(*band, **_BAND)
        for k, (name, (x, y)) in enumerate(series.items()):
            look = {"marker": "o" if len(x) < 20 else "", "ls": "-" if k < len(colors) else "--"}
            axis.plot(x, y, ms=4, lw=1.4, color=colors[k % len(colors)], label=name, **look)
        if settings.get("yscale") != "log" and axis.dataLim.y0 >= 0:
            axis.set_ylim(bottom=0)
        axis.set(**settings)
        if legend and len(series) <= 4:
            axis.legend()
        elif legend:  # below, where it covers no line
            axis.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.22), fontsize=7)
    return figure


def loss_curves(
    log: Sequence[Mapping[str, float]],
    *,
    terms: Sequence[str] = ("loss",),
    against: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Figure:
    """Loss terms over steps, of a training log's rows, and beside them what the outputs are worth:
    name -> (steps, values) of ratios to the validation targets, over the band 0.8 to 1.25."""
    rows = {name: [(r["step"], r[name]) for r in log if r.get(name) is not None] for name in terms}
    # a term that is nothing all along, as of a critic that there is not, is no curve
    drawn = {name: found for name, found in rows.items() if any(value for _, value in found)}
    series = {name: np.array(found, float).T for name, found in drawn.items()}
    positive = series and all(found[1].min() > 0 for found in series.values())
    left = {"series": series, "legend": len(terms) > 1, "yscale": "log" if positive else "linear"}
    left |= {"xlabel": "step", "ylabel": "loss", "title": "What the optimiser sees"}
    if not against:
        return lines(left)
    right = {"series": against, "band": (0.8, 1.25), "title": "What a person sees"}
    return lines(left, right | {"xlabel": "step", "ylabel": "validation, outputs / targets"})


def _bars(axis: Any, places: Any, ends: Any, *, bottom: Any = 0.0, **look: Any) -> None:
    """Bars with whiskers, of (mean, low, high) each."""
    mean, low, high = np.array(ends, float)
    axis.bar(places, mean, bottom=bottom, **look)
    spread = np.nan_to_num(np.abs([mean - low, high - mean]))
    axis.errorbar(places, bottom + mean, spread, **_WHISKERS)
    axis.grid(axis="x", visible=False)


@rc_context(STYLE)
def bins_figure(
    summaries: Mapping[str, Sequence[Mapping[str, Any]]],
    metric: str,
    *,
    label: str,
    band: tuple[float, float] | None = None,
) -> Figure:
    """One metric by bin of azimuth difference, with 95 % intervals over objects: name of the
    predictor -> what `evaluate.summarise` returned. `band`: acceptable values, shaded."""
    figure, ((axis,),) = _new(size=(7.2, 3.2))
    bins = [entry["bin"] for entry in next(iter(summaries.values()))]
    width = 0.8 / len(summaries)
    if band:
        axis.axhspan(*band, **_BAND)
    for k, (name, summary) in enumerate(summaries.items()):
        found = [[entry[metric + end] for entry in summary] for end in ("", "_low", "_high")]
        x = np.arange(len(bins)) + (k - (len(summaries) - 1) / 2) * width
        _bars(
            axis,
            x,
            found,
            width=width * 0.92,
            label=name.replace("_", " "),
            color=CYCLE[k % len(CYCLE)],
        )
    axis.set_xticks(np.arange(len(bins)), bins)
    axis.set(xlabel="azimuth away from the input, degrees", ylabel=label)
    figure.legend(ncols=min(5, len(summaries)), loc="outside upper center")
    return figure


@rc_context(STYLE)
def waterfall(parts: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Figure:
    """From nothing mended to all of it, a step a factor (`labels`: what stands at it); a panel an
    outcome -> "none", "mended", "truth", and "factors" with their "gain": estimates."""
    figure, axes = _new(1, len(parts), size=(7.2, 3.4), sharey=True)
    for axis, (outcome, part) in zip(axes[0], parts.items(), strict=True):
        steps = {labels[name]: entry["gain"] for name, entry in part["factors"].items()}
        shown = {"none mended": part["none"], **steps, "all mended": part["mended"]}
        mean, low, high = np.array([(e.mean, e.low, e.high) for e in shown.values()]).T
        bottoms = np.array([0.0, *np.cumsum(mean)[:-2], 0.0])
        colors = [VERMILION, *(BLUE if gain >= 0 else ORANGE for gain in mean[1:-1]), GREEN]
        places = np.arange(len(shown))
        _bars(axis, places, (mean, low, high), bottom=bottoms, color=colors)
        axis.axhline(part["truth"].mean, color=GREY, ls="--", lw=1)
        at = (1.02, part["truth"].mean)  # beside the axes, where no bar is
        place = axis.get_yaxis_transform()
        axis.text(*at, "true\nviews", color=GREY, fontsize=8, va="center", transform=place)
        axis.set_xticks(places, list(shown), rotation=35, ha="right", fontsize=8)
        axis.set_title(f"Share of the input's {outcome}", fontsize=10)
    return figure


@rc_context(STYLE)
def timeline(
    spans: Sequence[Mapping[str, Any]], stop_hours: float, ours: Mapping[str, float]
) -> Figure:
    """Where the original's hours and dollars went (`spans`: "what", "began", "hours", "ended" and
    "usd" each), when the gate would have stopped it (NaN: no gate ran), and to the same scale
    `ours`: name -> seconds."""
    heights = (1.0 + 0.28 * len(ours), 1.0)
    figure, ((top,), (bottom,)) = _new(2, 1, size=(7.2, 4.4), sharex=True, height_ratios=heights)
    for span, color in zip(spans, [SKY, SKY, ORANGE, VERMILION, _PALE], strict=True):
        bar = top.barh(0, span["hours"], left=span["began"], color=color, edgecolor="white")
        name = span["what"].split(" (")[0].replace(" + ", " +\n").replace(" ", "\n", 1)
        text = f"{name}\n${span['usd']:g}"
        top.bar_label(bar, [text], label_type="center", fontsize=7.5, color=_INK)
    for row, (name, seconds) in enumerate(ours.items(), 1):
        bar = top.barh(row, seconds / 3600, height=0.5, color=GREEN)
        top.bar_label(bar, [f"{name}: {seconds:.0f} s"], padding=3, fontsize=8)
    top.set(ylim=(len(ours) + 0.6, -0.6), yticks=[])
    top.set_title("The original's hours, and ours to the same scale")
    hours = [0.0, *(span["ended"] for span in spans)]
    money = np.cumsum([0.0, *(span["usd"] for span in spans)])
    bottom.plot(hours, money, color=VERMILION, lw=1.8)
    bottom.fill_between(hours, money, color=VERMILION, alpha=0.12, lw=0)
    bottom.set(ylabel="USD spent", xlabel="hours since the start")
    bottom.set(xlim=(-0.08, hours[-1] + 0.1), ylim=(0, 1.15 * money[-1]))
    if math.isfinite(stop_hours):
        for axis in (top, bottom):
            axis.axvline(stop_hours, color=GREEN, lw=1.6, ls="--")
        said = f"the gate stops it here: after {3600 * stop_hours:.0f} s, at $0"
        at = (stop_hours + 0.05, 0.93 * money[-1])
        bottom.text(*at, said, color=GREEN, fontsize=9, va="center")
    return figure


@rc_context(STYLE)
def dots(
    rows: Mapping[str, Mapping[str, Any]],
    *,
    label: str,
    lines: Mapping[str, float] | None = None,
    band: tuple[float, float] | None = None,
    names: Mapping[str, str] | None = None,
) -> Figure:
    """A row a name, a panel a bin ("all" where there is no other), of estimates: every seed a small
    dot, the mean a diamond, and a bar for the 95 % interval over objects.  What lies far from the
    others stands at the edge, with its value.  Axes are Tukey's fences, but 2.5 interquartile
    ranges beyond the quartiles, no wider than the values, and hold what must be seen.

    Args:
        lines: name -> value of dashed lines through every panel.
        band: acceptable values, shaded.
        names: row -> what it is, in words; the row's own name then stands below in small type.
    """
    bins = [name for name in next(iter(rows.values())) if name != "all"] or ["all"]
    size = (7.4, 0.9 + (0.4 if names else 0.24) * len(rows))
    figure, axes = _new(1, len(bins), size=size, sharey=True, sharex=True)
    marked = list((lines or {}).values())
    also, means = [*marked, *(band or ())], [r[name].mean for r in rows.values() for name in bins]
    known = np.array([value for value in means if math.isfinite(value)] or [0.0])
    first, third = np.percentile(known, [25, 75])
    reach = 2.5 * (third - first)
    low = min(max(known.min(), first - reach), *also, math.inf)
    high = max(min(known.max(), third + reach), *also, -math.inf)
    edge = 0.08 * (high - low) or 0.5
    low, high = float(low - edge), float(high + edge)
    for axis, name in zip(axes[0], bins, strict=True):
        if band:
            axis.axvspan(*band, **_BAND)
        for value in marked:
            axis.axvline(value, color=GREY, lw=1, ls="--")
        for y, found in enumerate(rows.values()):
            one, color = found[name], BLUE
            if low <= one.mean <= high:
                axis.plot([one.low, one.high], [y, y], color=color, lw=1.2, alpha=0.5)
                axis.plot([one.mean], [y], "D", ms=5, color=color, mec="white", mew=0.6)
                places = [y + 0.3] * len(one.seeds)
                axis.plot(one.seeds, places, "o", ms=2.6, color=ORANGE, clip_on=False)
            elif math.isfinite(one.mean):
                edge, marker, side = (low, "<", "left") if one.mean < low else (high, ">", "right")
                axis.plot([edge], [y], marker, ms=5, color=color, clip_on=False)
                away, text = (5 if side == "left" else -5, 0), f"{one.mean:.2g}"
                words = {"fontsize": 7, "ha": side, "va": "center", "color": "#333333"}
                axis.annotate(text, (edge, y), away, textcoords="offset points", **words)
        title = {"all": ""}.get(name, name)
        axis.set_title(f"{name}\N{DEGREE SIGN}" if name[0].isdigit() else title, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
    axes[0, 0].set_xlim(low, high)
    labels = [textwrap.fill((names or {}).get(row, row), 46) for row in rows]
    axes[0, 0].set_yticks(range(len(rows)), labels, fontsize=8.5)
    for y, row in enumerate(rows if names else ()):
        below = (-6, -9 - 5 * labels[y].count("\n"))
        words_of = {"fontsize": 6, "ha": "right", "va": "center", "color": GREY}
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes[0, 0].annotate(row, (0, y), below, **place, **words_of)
    axes[0, 0].set_ylim(len(rows) - 0.4, -0.6)
    figure.supxlabel(label, fontsize=9)
    return figure


@rc_context(STYLE)
def plane(
    points: Mapping[str, tuple[Any, Any]], *, labels: tuple[str, str], better: str = ""
) -> Figure:
    """A point a name in a plane of two estimates, with bars for their 95 % intervals and a dot for
    every seed.

    Args:
        labels: of the axis across and of that upwards.
        better: said in the corner that is best of both, where less is better upwards and more
            across.
    """
    figure, ((axis,),) = _new(size=(7.2, 4.6))
    for k, (x, y) in enumerate(points.values()):
        color = CYCLE[k % len(CYCLE)]
        ends = [[[one.mean - one.low], [one.high - one.mean]] for one in (x, y)]
        across, upwards = np.nan_to_num(np.abs(ends))
        axis.errorbar([x.mean], [y.mean], upwards, across, color=color, lw=1.0, alpha=0.45)
        axis.plot(x.seeds, y.seeds, "o", ms=2.6, color=color, alpha=0.8)
        marker = "osD^v"[k // len(CYCLE) % 5]
        axis.plot([x.mean], [y.mean], marker, ms=6, color=color, mec="white", mew=0.6)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    if better:
        words = {"ha": "right", "va": "top", "fontsize": 8, "color": GREEN}
        axis.text(1.0, -0.09, f"{better} \N{SOUTH EAST ARROW}", transform=axis.transAxes, **words)
    _name_apart(axis, {name: (x.mean, y.mean) for name, (x, y) in points.items()})
    return figure


def _name_apart(axis: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, at the nearest place that no other name or point takes; a
    line leads there from further away."""
    axis.figure.draw_without_rendering()  # where points lie is known then
    size, scale = 8.0, 72.0 / axis.figure.dpi
    places = {name: axis.transData.transform(point) * scale for name, point in points.items()}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    around = list(itertools.product(range(9, 70, 5), (30, 330, 0, 150, 210, 180, 90, 270)))

    def shared(one: Sequence[float], two: Sequence[float]) -> float:
        sides = (min(one[k + 2], two[k + 2]) - max(one[k], two[k]) for k in (0, 1))
        return math.prod(max(side, 0.0) for side in sides)

    for name, (x, y) in places.items():
        wide, boxes = 0.58 * size * len(name), list[tuple[float, float, float, float]]()
        for reach, angle in around:
            across, up = (reach * of(math.radians(angle)) for of in (math.cos, math.sin))
            left = x + across - (wide / 2 if abs(across) < 1 else wide if across < 0 else 0)
            boxes.append((left, y + up - size / 2, left + wide, y + up + size / 2))
        cost = [sum(shared(box, b) for b in taken) for box in boxes]
        best = min(range(len(boxes)), key=lambda k: cost[k] + around[k][0])
        taken.append(boxes[best])
        lead = {"arrowstyle": "-", "lw": 0.4} if around[best][0] > 14 else None
        at = (boxes[best][0] - x, boxes[best][1] + size / 2 - y)
        axis.annotate(
            name, points[name], at, textcoords="offset points", fontsize=size, va="center",
            arrowprops=lead,
        )  # fmt: skip
