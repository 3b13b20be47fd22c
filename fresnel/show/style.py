"""Every figure of the reports, in one style, each with its alternative text.

Functions return a `Figure` (or an RGB array for contact sheets) and never show it; `show` puts
either into a notebook's output with alt text, a figure as SVG, an array as PNG. Sheets with sharp
lettering, sliders and the splat viewer are `fresnel.show.widgets`. Colours are those of Okabe and
Ito (2008), told apart by readers of any colour vision.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

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
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "fresnel",
}


_Draw = TypeVar("_Draw", bound=Callable[..., Any])


def _styled(draw: _Draw) -> _Draw:
    """Draw in our style, without touching matplotlib's global state."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        import matplotlib as mpl
        from cycler import cycler

        with mpl.rc_context({**STYLE, "axes.prop_cycle": cycler(color=_CYCLE)}):
            return draw(*args, **kwargs)

    return styled  # type: ignore[return-value]


def _figure(*args: Any, **kwargs: Any) -> Any:
    """`Figure.subplots` of a figure that no window holds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=kwargs.pop("figsize", (7.2, 3.2)))
    return figure, figure.subplots(*args, **kwargs)


def to_png(picture: Figure | np.ndarray, dpi: int = 192) -> bytes:
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
        vector: draw a figure as SVG; False for figures with many marks, which are then drawn for
            a screen of twice the usual density.
    """
    import matplotlib as mpl
    from IPython.display import display

    if not alt.strip():
        raise ValueError("alt: want a sentence that says what the picture shows")
    about: dict[str, Any] = {"alt": alt}
    if isinstance(picture, np.ndarray) or not vector:
        data = to_png(picture)
        mime, payload = "image/png", base64.b64encode(data).decode()
        if not isinstance(picture, np.ndarray):
            about["width"] = round(picture.get_figwidth() * 96)
    else:
        buffer = io.StringIO()
        with mpl.rc_context(STYLE):
            picture.savefig(buffer, format="svg", dpi=192, metadata={"Date": None})
        mime, payload = "image/svg+xml", buffer.getvalue()
    display({mime: payload, "text/plain": alt}, raw=True, metadata={mime: about})


def show_table(markdown: str) -> None:
    """Put a Markdown table into the notebook's output; a dollar in it is money, not mathematics."""
    from IPython.display import Markdown, display

    display(Markdown(markdown.replace("$", r"\$")))


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


@_styled
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
    figure, axes = _figure(1, len(series), subplot_kw={"projection": "polar"}, figsize=(7.2, 3.5))
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


@_styled
def camera_frusta(
    cameras: Any, input_camera: Any, *, pivot: Sequence[float], content: np.ndarray | None
) -> Figure:
    """The cameras of one record, their pivot and the object: in 3D, from above and from the front.

    Args:
        cameras: `Cameras` (V,) in the world.
        input_camera: `Cameras` ().
        pivot: the point the cameras are said to orbit.
        content: points on the object in the world, (P, 3).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
    space: Any = figure.add_subplot(grid[:, 0], projection="3d")
    flat: list[Any] = [figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])]
    points = np.zeros((0, 3)) if content is None else content
    centers = cameras.centers.detach().cpu().numpy()
    forward = cameras.forward.detach().cpu().numpy()
    eye = input_camera.centers.detach().cpu().numpy()
    gaze = input_camera.forward.detach().cpu().numpy()
    reach = 0.22 * float(np.linalg.norm(centers - np.asarray(pivot), axis=-1).mean())
    # matplotlib's third axis is up, the world's second is; +z comes towards the reader
    turn = [0, 2, 1]
    space.scatter(*points[:, turn].T, s=1.5, color=SKY, alpha=0.9, rasterized=True)
    for corners in _frusta(cameras, reach):
        space.plot(*corners[:, turn].T, color=BLUE, lw=0.9)
    space.plot(*_frusta(input_camera, 1.25 * reach)[0][:, turn].T, color=VERMILION, lw=1.4)
    space.scatter(*np.asarray(pivot)[turn, None], s=70, color="black", marker="+", zorder=5)
    space.invert_yaxis()
    space.set_aspect("equal")
    space.set_box_aspect(None, zoom=1.2)
    space.view_init(elev=24, azim=62)
    for side, name in zip((space.xaxis, space.yaxis, space.zaxis), "xzy", strict=True):
        side.set_pane_color((0, 0, 0, 0))
        side.set_tick_params(labelsize=7, pad=-2)
        side.set_label_text(name)
    for axis, (i, j), title in zip(
        flat, [(0, 2), (0, 1)], ["from above (x, z)", "from the front (x, y)"], strict=True
    ):
        axis.scatter(
            *points[:, [i, j]].T, s=2, color=SKY, label="object", alpha=0.5, rasterized=True
        )
        arrows: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1.0, "width": 0.008}
        axis.quiver(
            *centers[:, [i, j]].T, *(2 * reach * forward[:, [i, j]]).T, color=GREY, **arrows
        )
        axis.scatter(*centers[:, [i, j]].T, s=22, color=BLUE, label="view cameras", zorder=3)
        axis.quiver(*eye[[i, j]], *(2 * reach * gaze[[i, j]]), color=VERMILION, **arrows)
        axis.scatter(
            *eye[[i, j]], s=34, color=VERMILION, marker="s", label="input camera", zorder=4
        )
        axis.scatter(pivot[i], pivot[j], s=60, color="black", marker="+", label="pivot", zorder=5)
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_title(title)
    flat[0].invert_yaxis()  # +z, where azimuth 0 stands, is towards the reader
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="outside lower center")
    return figure


def _frusta(cameras: Any, depth: float) -> list[np.ndarray]:
    """One line (P, 3) a camera, that draws its pyramid from the eye to `depth` in the world."""
    many = cameras if cameras.batch_shape else cameras.reshape(1)
    K, pose = (value.detach().cpu().numpy() for value in (many.Ks, many.viewmats))
    w, h = cameras.width, cameras.height
    corners = np.array([[0, 0, 1], [w, 0, 1], [w, h, 1], [0, h, 1]], float)
    lines = []
    for intrinsic, view in zip(K, pose, strict=True):
        seen = depth * corners @ np.linalg.inv(intrinsic).T
        a, b, c, d = (seen - view[:3, 3]) @ view[:3, :3]
        eye = -view[:3, 3] @ view[:3, :3]
        lines.append(np.stack([eye, a, b, eye, c, d, eye, b, c, d, a]))
    return lines


@_styled
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
            axis.plot(*np.array(rows, float).T, "" if len(rows) > 2 else "o-", lw=1.4, label=term)
    if all(np.min(line.get_ydata()) > 0 for line in axis.lines) and axis.lines:
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.set_title("What the optimiser sees")
    if len(terms) > 1:
        axis.legend()
    if against:
        axis = axes[0, 1]
        if target:
            axis.axhspan(*target, color=GREEN, alpha=0.12, lw=0)
        for name, (steps, values) in against.items():
            axis.plot(steps, values, "o-", ms=4, lw=1.4, label=name)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
        axis.set_ylabel("held-out outputs / truth")
        axis.set_title("What a person sees")
        axis.legend()
    return figure


@_styled
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
    figure.legend(ncols=min(5, len(summaries)), loc="outside upper center")
    return figure


@_styled
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
    axis.legend()
    return figure
