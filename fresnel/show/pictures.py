"""Sheets of views, and two pictures under a slider: which pictures stand there, and how.

Widgets are one self-contained piece of SVG or HTML each, so that they work in JupyterLab, in the
report, and without a network.
"""

import base64
import hashlib
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fresnel.data.dataset import MultiViewDataset, ViewTensors
from fresnel.data.images import decoded
from fresnel.models import Predictor
from fresnel.scene.cameras import Cameras, relative_azimuth_deg
from fresnel.show.scenes import GROUND
from fresnel.show.style import put, to_png, to_uint8

_SLIDE = (
    "const f=this.closest('figure');f.style.setProperty('--at',this.value);"
    "const o=f.querySelector('output');if(o){o.value=this.dataset.steps.split('|')[this.value];"
    "this.setAttribute('aria-valuetext',o.value)}"
)
"""What a slider does: its figure's style hears where it stands, and its step is named."""


def _ordered(cameras: Cameras, source: Cameras, pivot: Tensor) -> tuple[Tensor, list[float]]:
    """The order of views by azimuth relative to the input camera, and their azimuths in it, in
    (-180, 180] degrees."""
    azimuth = relative_azimuth_deg(cameras.reshape(1, -1), source.reshape(1), pivot)[0]
    azimuth = torch.where(azimuth < -179.99, azimuth + 360, azimuth)
    order = azimuth.argsort(stable=True)
    return order.cpu(), azimuth[order].tolist()


def on_ground(rgb: Any, alpha: Any) -> np.ndarray:
    """Pictures over black (..., H, W, 3), with their alpha (..., H, W), before a neutral grey
    instead, as uint8: what is dark and what is empty look the same on black."""
    seen = to_uint8(alpha).astype(np.float32)[..., None] / 255
    return to_uint8((to_uint8(rgb) + (1 - seen) * GROUND) / 255)


def picture_rows(
    data: MultiViewDataset, limit: int = 6
) -> tuple[list[list[np.ndarray]], list[float], list[str]]:
    """Rows of [input, views ordered by azimuth], the azimuths of the first row, and the names."""
    records = [data[i] for i in evenly(len(data), limit)]
    found = [_ordered(r.cameras, r.input_camera, r.pivot) for r in records]
    rows = [
        [on_ground(r.input_rgb, r.input_alpha), *on_ground(r.rgb, r.alpha)[order.numpy()]]
        for r, (order, _) in zip(records, found, strict=True)
    ]
    return rows, found[0][1], [record.name for record in records]


def predicted_rows(
    views: ViewTensors,
    predictors: Mapping[str, Predictor],
    records: Sequence[int],
    *,
    first: str,
    titles: Mapping[str, str] | None = None,
) -> tuple[list[list[np.ndarray]], list[str], list[float]]:
    """For each record, a row of its own views and one per predictor, ordered by azimuth.

    Args:
        first: what the record's own views are: "truth" of rendered objects and of photographs,
            never of what a decoder made.
        titles: what to call a record, by its name.

    Returns:
        Rows of [input, views...], a label per row, and the azimuths of the first record.
    """
    rows, labels, found = [], [], list[list[float]]()
    for one in (views[[i]] for i in records):
        order, azimuths = _ordered(one.cameras, one.inputs.cameras, one.pivots)
        found.append(azimuths)
        shown = {first: on_ground(one.rgb[0].cpu(), one.alpha[0].cpu())}
        for name, predict in predictors.items():
            with torch.no_grad():
                made = predict(one.inputs, one.cameras)
            shown[name] = on_ground(made.rgb[0], made.alpha[0, ..., 0])
        source = on_ground(one.inputs.rgb[0].cpu(), one.inputs.alpha[0].cpu())
        rows += [[source, *pictures[order.numpy()]] for pictures in shown.values()]
        title = (titles or {}).get(one.names[0], one.names[0])
        labels += [f"{title}: {name}" for name in shown]
    return rows, labels, found[0]


def fewer(
    rows: Sequence[Sequence[Any]], columns: Sequence[str], count: int = 4
) -> tuple[list[list[Any]], list[str]]:
    """Rows of [input, views...] and their headings with at most `count` of the views, evenly
    spread and the last among them, so that each is large enough to see."""
    every = -(-(len(columns) - 1) // count)
    return [[row[0], *row[every::every]] for row in rows], [columns[0], *columns[every::every]]


def identity_pair(data: MultiViewDataset) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """Inputs (at most eight), and what was rendered from the inputs' own cameras.

    None for data that has no such renders."""
    records = [data[i] for i in evenly(len(data), 8)]
    if any(record.identity_rgb is None for record in records):
        return None
    return (
        [on_ground(r.input_rgb, r.input_alpha) for r in records],
        [on_ground(r.identity_rgb, r.identity_alpha) for r in records],
    )


def evenly(count: int, limit: int) -> list[int]:
    """Indices of at most `limit` of `count` things, evenly spread."""
    return np.linspace(0, max(0, count - 1), min(limit, count)).round().astype(int).tolist()


def read(path: Path) -> np.ndarray:
    """A picture file as RGB uint8 array."""
    return np.asarray(decoded(path).convert("RGB"))


def tile(pictures: Sequence[Any], columns: int = 4) -> np.ndarray:
    """Pictures (H, W, 3) of one size in a grid without gaps: RGB uint8 array."""
    cells = [to_uint8(picture) for picture in pictures]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    return np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)])


def _layout(
    rows: Sequence[Sequence[Any]],
    columns: Sequence[str],
    labels: Sequence[str],
    first_apart: bool,
    least: int = 96,
) -> tuple[tuple[int, int], list[tuple], list[tuple]]:
    """Where everything of a sheet stands: its (width, height); texts (x, baseline y, text); and
    pictures (x, y, (width, height), uint8 array)."""
    if not rows or not all(len(row) for row in rows):
        raise ValueError("pictures: got none, want at least one row of at least one")
    arrays = [[to_uint8(picture) for picture in row] for row in rows]
    count, gap = max(map(len, arrays)), 4
    cell = max(least, min(max(128, 1040 // count), *(row[0].shape[1] for row in arrays)))
    apart = 2 * gap if first_apart and count > 1 else 0
    lefts = [gap + c * (cell + gap) + (apart if c else 0) for c in range(count)]
    texts: list[tuple] = [(x, 14, text) for x, text in zip(lefts, columns, strict=False)]
    places: list[tuple] = []
    top = gap + (18 if columns else 0)
    for r, row in enumerate(arrays):
        texts += [(gap, top + 13, label) for label in labels[r : r + 1]]
        top += 18 if labels else 0
        sides = [(cell, round(cell * p.shape[0] / p.shape[1])) for p in row]
        places += [(x, top, side, p) for x, side, p in zip(lefts, sides, row, strict=False)]
        top += max(height for _, height in sides) + gap
    return (lefts[-1] + cell + gap, top), texts, places


def show_sheet(
    rows: Sequence[Sequence[Any]],
    alt: str,
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    first_apart: bool = True,
    **about: Any,
) -> None:
    """Put a labelled grid of pictures into the notebook's output: lettering sharp, each different
    picture once.

    Args:
        rows: pictures (H, W, 3), uint8 or [0, 1]; each row may be of another size.
        columns, labels: a heading per column; a caption per row, above its pictures.
        first_apart: leave a wider gap after the first column (the input).
        about: as for `style.put`.
    """
    (w, h), texts, places = _layout(rows, columns, labels, first_apart, least=200)
    seen: dict[str, str] = {}
    parts = [
        f'<text x="{x}" y="{y}" font-size="12">{html.escape(text)}</text>' for x, y, text in texts
    ]
    for x, y, (width, height), picture in places:
        data = picture_uri(picture)
        key = "p" + hashlib.sha1(data.encode()).hexdigest()[:10]
        seen[key] = f'<image id="{key}" width="{width}" height="{height}" xlink:href="{data}"/>'
        parts.append(f'<use xlink:href="#{key}" x="{x}" y="{y}"/>')
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{w}px" height="{h}px" viewBox="0 0 {w} {h}" '
        f'font-family="DejaVu Sans, sans-serif"><g class="fresnel-sheet">'
        f'<rect width="{w}" height="{h}" style="fill: #ffffff"/>'
        f"<defs>{''.join(seen.values())}</defs>{''.join(parts)}</g></svg>"
    )
    put("image/svg+xml", svg, alt, **about)


def contact_sheet(
    rows: Sequence[Sequence[Any]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> np.ndarray:
    """The grid of `show_sheet` as one picture for a file, its columns as wide as the first picture,
    `notes` in red above it: RGB uint8."""
    from PIL import Image, ImageDraw, ImageFont

    (width, height), texts, places = _layout(rows, columns, labels, True, rows[0][0].shape[1])
    lines = [line for note in notes for line in textwrap.wrap(note, width // 7)]
    down = 18 * len(lines) + (8 if lines else 0)
    sheet = Image.new("RGB", (width, height + down), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for k, line in enumerate(lines):
        draw.text((4, 18 * k + 16), line, fill="#b00020", font=font, anchor="ls")
    for x, y, text in texts:
        draw.text((x, y + down), text, fill="#333333", font=font, anchor="ls")
    for x, y, side, picture in places:
        up = picture.shape[1] < side[0]
        how = Image.Resampling.NEAREST if up else Image.Resampling.BOX
        small = Image.fromarray(picture).convert("RGB").resize(side, how)
        sheet.paste(small, (x, y + down))
    return np.asarray(sheet)


def show_pair(before: Any, after: Any, names: tuple[str, str], alt: str, **about: Any) -> None:
    """Put pictures in pairs, each on top of the other, with one slider that parts them all at the
    same place: `before` shows left of it, so that both sides are of the same view.

    before, after: a picture (H, W, 3), uint8 or [0, 1], or several. names: what they are, in a word
    or two each. about: as for `style.put`."""
    ones, twos = (
        [to_uint8(picture) for picture in (given if np.ndim(given[0]) == 3 else [given])]
        for given in (before, after)
    )
    if [one.shape for one in ones] != [two.shape for two in twos] or ones[0].ndim != 3:
        raise ValueError("pictures: got two of different sizes")
    left, right = (html.escape(name) for name in names)
    whole = "display:block;width:100%;height:auto"
    said = [html.escape(alt), *[""] * (len(ones) - 1)]
    cells = [
        f'<div style="position:relative;flex:1 1 200px;max-width:420px">'
        f'<img src="{picture_uri(two)}" alt="{told}" style="{whole}">'
        f'<img src="{picture_uri(one)}" alt="" style="{whole};position:absolute;inset:0;'
        'clip-path:inset(0 calc(100% - var(--at)*1%) 0 0)">'
        '<i aria-hidden="true" style="position:absolute;top:0;bottom:0;left:calc(var(--at)*1%);'
        'width:2px;margin-left:-1px;background:#fff;box-shadow:0 0 0 1px #000"></i></div>'
        for one, two, told in zip(ones, twos, said, strict=True)
    ]
    text = (
        '<figure class="fresnel-pair" style="--at:50;margin:.75rem 0">'
        f'<div style="display:flex;flex-wrap:wrap;gap:4px">{"".join(cells)}</div>'
        f"{_slider(left, right, f'How much of {left} to show, over {right}')}</figure>"
    )
    put("text/html", text, alt, [_SLIDE], **about)


def show_steps(
    rows: Mapping[str, Sequence[Any]],
    steps: Sequence[str],
    alt: str,
    *,
    columns: int = 3,
    start: int = 0,
    **about: Any,
) -> None:
    """Put pictures that change in step under one slider: views around an object, a training's.

    rows: name -> a picture (H, W, 3), uint8 or [0, 1], for each of `steps`, which are named.
    columns: so many of them side by side. start: the step that is shown at first. about: as for
    `style.put`."""
    cells, many = [], len(steps)
    for place, (name, given) in enumerate(rows.items()):
        frames = [to_uint8(picture) for picture in given]
        if len(frames) != many:
            raise ValueError(f"rows: {name!r} has {len(frames)} pictures, want {many}, as steps")
        (height, width), said = frames[0].shape[:2], html.escape(alt) if place == 0 else ""
        strip = picture_uri(np.hstack(frames), lossy=True)
        cells.append(
            f"<div><span>{html.escape(name)}</span>"
            f'<div style="overflow:hidden;aspect-ratio:{width}/{height}"><img src="{strip}" '
            f'alt="{said}" style="display:block;max-width:none;width:{100 * many}%;height:auto;'
            f'transform:translateX(calc(var(--at)*{-100 / many:.6f}%))"></div></div>'
        )
    names = html.escape("|".join(step.replace("|", "/") for step in steps))
    text = (
        f'<figure class="fresnel-steps" style="--at:{start};margin:.75rem 0">'
        '<div class="scroll" style="overflow-x:auto" tabindex="0" role="group" '
        'aria-label="Pictures">'
        f'<div style="display:grid;gap:8px;grid-template-columns:repeat({min(columns, len(cells))},'
        f'minmax(200px,{max(320, width)}px))">{"".join(cells)}</div></div>'
        f"{_slider('', steps[start], 'Step through the pictures', names, many, start)}</figure>"
    )
    put("text/html", text, alt, [_SLIDE], **about)


def _slider(
    left: str, right: str, label: str, steps: str = "", many: int = 101, start: int = 50
) -> str:
    """A slider over 0 to `many` - 1 between two texts; with `steps` it names where it stands, below
    itself where that is a sentence."""
    of = f' data-steps="{steps}"' * bool(steps) + f' value="{start}"'
    own_line = ' style="flex:1 0 100%"' * (len(steps) > 24 * many)
    right = f"<output{own_line}>{html.escape(right)}</output>" if steps else f"<span>{right}</span>"
    return (
        '<div class="pair-slide" style="display:flex;flex-wrap:wrap;gap:.2rem .8rem;'
        'align-items:center">'
        f'<span>{left}</span><input type="range" min="0" max="{many - 1}"{of} style="flex:1" '
        f'aria-label="{label}" oninput="{html.escape(_SLIDE)}">{right}</div>'
    )


def picture_uri(picture: np.ndarray, *, lossy: bool = False) -> str:
    """A data address that holds a picture (H, W, 3) uint8 as PNG, or as WebP of quality 88."""
    if lossy:
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "webp", quality=88, method=6)
        return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
    data = base64.b64encode(to_png(np.ascontiguousarray(picture))).decode()
    return f"data:image/png;base64,{data}"
