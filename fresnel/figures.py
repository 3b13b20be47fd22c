"""Every figure of the reports, in one style, each with its alternative text.

Functions return a `Figure` (or an RGB array for contact sheets) and never show it; `show` puts
either into a notebook's output with alt text, as SVG where there is nothing but lines and as PNG
elsewhere.  Colours are those of Okabe and Ito (2008), told apart by readers of any colour vision.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#777777",
)  # fmt: skip
_CYCLE = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY]
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fresnel",
}


def _figure(*args: Any, **kwargs: Any) -> Any:
    """`Figure.subplots` in our style, without touching matplotlib's global state."""
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure

    size = kwargs.pop("figsize", (7.2, 3.2))
    with mpl.rc_context({**STYLE, "axes.prop_cycle": cycler(color=_CYCLE)}):
        figure = Figure(figsize=size)
        return figure, figure.subplots(*args, **kwargs)


def to_png(picture: Figure | np.ndarray, dpi: int = 144) -> bytes:
    """PNG bytes of a figure or of an RGB uint8 array (H, W, 3)."""
    buffer = io.BytesIO()
    if isinstance(picture, np.ndarray):
        from PIL import Image

        Image.fromarray(picture).save(buffer, "png", optimize=True)
    else:
        picture.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def show(picture: Figure | np.ndarray, alt: str, *, vector: bool = True) -> None:
    """Put a figure or an RGB uint8 array (H, W, 3) into the notebook's output.

    Args:
        alt: what a reader who cannot see the picture should know: the finding, not the axes.
        vector: draw a figure as SVG; False for figures that hold pictures or many marks.
    """
    import matplotlib as mpl
    from IPython.display import display

    if not alt.strip():
        raise ValueError("alt: want a sentence that says what the picture shows")
    if isinstance(picture, np.ndarray) or not vector:
        data = to_png(picture)
        mime, payload = "image/png", base64.b64encode(data).decode()
    else:
        buffer = io.StringIO()
        with mpl.rc_context(STYLE):
            picture.savefig(buffer, format="svg", metadata={"Date": None})
        mime, payload = "image/svg+xml", buffer.getvalue()
    display({mime: payload, "text/plain": alt}, raw=True, metadata={mime: {"alt": alt}})


def show_table(markdown: str) -> None:
    """Put a Markdown table into the notebook's output."""
    from IPython.display import Markdown, display

    display(Markdown(markdown))


def azimuth_labels(azimuth_deg: Sequence[float]) -> list[str]:
    """Column headings: whole degrees with a sign, and 0 without one."""
    return [
        f"{round(a):+d}\N{DEGREE SIGN}" if round(a) else "0\N{DEGREE SIGN}" for a in azimuth_deg
    ]


def to_uint8(images: Any) -> np.ndarray:
    """Pictures in [0, 1] (tensor or array) or uint8 -> uint8 array."""
    array = images.detach().cpu().numpy() if hasattr(images, "detach") else np.asarray(images)
    if array.dtype == np.uint8:
        return array
    return (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    cell: int = 112,
    gap: int = 4,
    first_apart: bool = True,
) -> np.ndarray:
    """A labelled grid of pictures: RGB uint8 array.

    Args:
        rows: pictures (H, W, 3), uint8 or [0, 1]; all are scaled to ``cell`` pixels.
        columns: a heading per column.
        labels: a caption per row, drawn above its pictures.
        first_apart: leave a wider gap after the first column (the input).
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows or not all(len(row) for row in rows):
        raise ValueError("rows: got no pictures, want at least one row of at least one")
    font = ImageFont.load_default(12)
    head = 20 if columns else 0
    caption = 18 if labels else 0
    count = max(len(row) for row in rows)
    apart = 3 * gap if first_apart and count > 1 else 0
    width = count * (cell + gap) + gap + apart
    height = head + len(rows) * (cell + gap + caption) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = head + gap + r * (cell + gap + caption)
        if labels:
            draw.text((gap, top), labels[r], fill="#333333", font=font)
        for c, picture in enumerate(row):
            image = Image.fromarray(to_uint8(picture)).convert("RGB")
            up = image.width < cell
            image = image.resize(
                (cell, cell), Image.Resampling.NEAREST if up else Image.Resampling.BOX
            )
            left = gap + c * (cell + gap) + (apart if c else 0)
            sheet.paste(image, (left, top + caption))
            if columns and r == 0 and c < len(columns):
                draw.text((left, 3), columns[c], fill="#333333", font=font)
    return np.asarray(sheet)


def azimuth_rose(
    azimuth_deg: Sequence[float], series: Mapping[str, Sequence[float]], *, limit: float = 1.0
) -> Figure:
    """Polar bars of view statistics over azimuth, one rose per series; the input is at the top.

    Args:
        azimuth_deg: relative azimuths of the views, (K,).
        series: name -> K ratios to the input (1 = as bright, or as large, as the input).
        limit: outer radius of the dashed reference circle.
    """
    azimuth = np.round((np.asarray(azimuth_deg, float) + 22.5) % 360 // 45).astype(int)
    figure, axes = _figure(1, len(series), subplot_kw={"projection": "polar"}, figsize=(7.2, 3.4))
    angles = np.deg2rad(np.arange(8) * 45.0)
    for axis, color, (name, values) in zip(
        np.atleast_1d(axes), [ORANGE, BLUE, GREEN], series.items(), strict=False
    ):
        ratios = np.asarray(values, float)
        means = [
            np.nanmean(ratios[azimuth == k]) if np.isfinite(ratios[azimuth == k]).any() else 0.0
            for k in range(8)
        ]
        axis.bar(angles, means, width=np.deg2rad(40), color=color, alpha=0.85)
        axis.plot(np.linspace(0, 2 * np.pi, 100), [limit] * 100, "--", color=GREY, lw=1)
        axis.set_theta_zero_location("N")
        axis.set_theta_direction(-1)
        axis.set_xticks(angles, [f"{a}\N{DEGREE SIGN}" for a in range(0, 360, 45)])
        axis.set_ylim(0, max(1.25 * limit, 1.1 * max(means)))
        axis.set_yticks([limit / 2, limit], [f"{limit / 2:g}", f"{limit:g}"], color=GREY)
        axis.set_title(name, loc="center")
    return figure


def camera_frusta(
    cameras: Any, input_camera: Any, *, pivot: Sequence[float], content: np.ndarray | None
) -> Figure:
    """The cameras of one record, their pivot and the object's points, seen from above and aside.

    Args:
        cameras: `Cameras` (V,) in the world.
        input_camera: `Cameras` ().
        pivot: the point the cameras are said to orbit.
        content: points on the object in the world, (P, 3).
    """
    figure, axes = _figure(1, 2, figsize=(7.2, 3.6))
    centers = cameras.centers.detach().cpu().numpy()
    forward = cameras.forward.detach().cpu().numpy()
    eye = input_camera.centers.detach().cpu().numpy()
    gaze = input_camera.forward.detach().cpu().numpy()
    for axis, (i, j), title in zip(
        axes, [(0, 2), (0, 1)], ["from above (x, z)", "from the front (x, y)"], strict=True
    ):
        if content is not None and len(content):
            axis.scatter(content[:, i], content[:, j], s=2, color=SKY, label="object", alpha=0.5)
        axis.quiver(
            centers[:, i], centers[:, j], forward[:, i], forward[:, j], color=GREY,
            angles="xy", scale_units="xy", scale=2.2, width=0.006,
        )  # fmt: skip
        axis.scatter(centers[:, i], centers[:, j], s=26, color=BLUE, label="view cameras", zorder=3)
        axis.quiver(
            eye[i], eye[j], gaze[i], gaze[j], color=VERMILION,
            angles="xy", scale_units="xy", scale=2.2, width=0.006,
        )  # fmt: skip
        axis.scatter(
            eye[i], eye[j], s=40, color=VERMILION, marker="s", label="input camera", zorder=4
        )
        axis.scatter(pivot[i], pivot[j], s=60, color="black", marker="+", label="pivot", zorder=5)
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_title(title)
        if (i, j) == (0, 2):
            axis.invert_yaxis()  # +z, where azimuth 0 stands, is towards the reader
            axis.legend(fontsize=8, loc="upper left", markerscale=0.8)
    return figure


def loss_curves(
    log: Sequence[Mapping[str, float]],
    *,
    terms: Sequence[str] = ("loss",),
    against: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    target: tuple[float, float] | None = (0.8, 1.25),
) -> Figure:
    """Loss terms over steps, and beside them what the outputs are worth.

    Args:
        log: rows of the training log with ``step`` and the terms.
        against: name -> (steps, values) of held-out measurements drawn on the right.
        target: the acceptable band of those measurements.
    """
    figure, axes = _figure(1, 2 if against else 1, figsize=(7.2, 2.9), squeeze=False)
    axis = axes[0, 0]
    for term in terms:
        rows = [(row["step"], row[term]) for row in log if row.get(term) is not None]
        if rows:
            axis.plot(*np.array(rows, float).T, lw=1.4, label=term)
    if all(np.min(line.get_ydata()) > 0 for line in axis.lines) and axis.lines:
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_title("What the optimiser sees: loss")
    if len(terms) > 1:
        axis.legend(fontsize=8)
    if against:
        axis = axes[0, 1]
        if target:
            axis.axhspan(*target, color=GREEN, alpha=0.12, lw=0)
        for name, (steps, values) in against.items():
            axis.plot(steps, values, "o-", ms=4, lw=1.4, label=name)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
        axis.set_title("What a person sees: outputs against truth")
        axis.legend(fontsize=8)
    return figure


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
    figure, axis = _figure(figsize=(7.2, 3.2))
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
        axis.bar(x, mean, width * 0.92, label=name, color=_CYCLE[k % len(_CYCLE)])
        spread = np.nan_to_num(np.abs(np.stack([mean - low, high - mean])))
        axis.errorbar(x, mean, spread, fmt="none", ecolor="#333333", elinewidth=0.9, capsize=2)
    axis.set_xticks(np.arange(len(bins)), bins)
    axis.set_xlabel("azimuth away from the input, degrees")
    axis.set_ylabel(label)
    axis.grid(axis="x", visible=False)
    figure.legend(fontsize=8, ncols=min(4, len(summaries)), loc="outside upper center")
    return figure


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
    right.set_title("Held-out luminance ratio")
    right.set_xlabel("azimuth away from the input, degrees")
    left.legend(fontsize=8)
    return figure


def by_azimuth(
    azimuth_deg: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    label: str,
    log: bool = False,
) -> Figure:
    """Lines of one quantity over relative azimuth, one line a run."""
    figure, axis = _figure(figsize=(7.2, 2.9))
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
    axis.legend(fontsize=8)
    return figure
