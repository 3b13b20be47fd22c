"""Sheets of views, and two pictures under a slider: which pictures stand there, and how.

Widgets are one self-contained piece of SVG or HTML each, so that they work in JupyterLab, in the
report, and without a network.
"""

from __future__ import annotations

import base64
import hashlib
import html
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fresnel.data.dataset import MultiViewDataset, ViewTensors
from fresnel.models import Predictor
from fresnel.scene.cameras import Cameras, relative_azimuth_deg
from fresnel.show.style import put, to_png, to_uint8


def _ordered(cameras: Cameras, source: Cameras, pivot: Tensor) -> tuple[Tensor, list[float]]:
    """The order of views by azimuth relative to the input camera, and their azimuths in it, in
    (-180, 180] degrees."""
    azimuth = relative_azimuth_deg(cameras.reshape(1, -1), source.reshape(1), pivot)[0]
    azimuth = torch.where(azimuth < -179.99, azimuth + 360, azimuth)
    order = azimuth.argsort(stable=True)
    return order.cpu(), azimuth[order].tolist()


def picture_rows(
    data: MultiViewDataset, limit: int = 6
) -> tuple[list[list[np.ndarray]], list[float], list[str]]:
    """Rows of [input, views ordered by azimuth], the azimuths of the first row, and the names."""
    records = [data[i] for i in evenly(len(data), limit)]
    found = [_ordered(r.cameras, r.input_camera, r.pivot) for r in records]
    rows = [
        [record.input_rgb.numpy(), *record.rgb[order].numpy()]
        for record, (order, _) in zip(records, found, strict=True)
    ]
    return rows, found[0][1], [record.name for record in records]


def predicted_rows(
    truth: ViewTensors,
    predictors: Mapping[str, Predictor],
    records: Sequence[int],
    *,
    first: str = "truth",
) -> tuple[list[list[np.ndarray]], list[str], list[float]]:
    """For each record, a row of its own views and one per predictor, ordered by azimuth.

    Args:
        first: what the record's own views are: "truth" of rendered objects and of photographs,
            never of what a decoder made.

    Returns:
        Rows of [input, views...], a label per row, and the azimuths of the first record.
    """
    rows, labels, found = [], [], list[list[float]]()
    for one in (truth[[i]] for i in records):
        order, azimuths = _ordered(one.cameras, one.inputs.cameras, one.pivots)
        found.append(azimuths)
        with torch.no_grad():
            made = {n: predict(one.inputs, one.cameras).rgb for n, predict in predictors.items()}
        for name, views in {first: one.rgb, **made}.items():
            rows.append([to_uint8(one.inputs.rgb[0]), *to_uint8(views[0].cpu()[order])])
            labels.append(f"{one.names[0]}: {name}")
    return rows, labels, found[0]


def identity_pair(data: MultiViewDataset, limit: int = 8) -> tuple[np.ndarray, np.ndarray] | None:
    """Inputs, and what was rendered from the inputs' own cameras: two pictures of one size.

    None for data that has no such renders."""
    records = [data[i] for i in evenly(len(data), limit)]
    if any(record.identity_rgb is None for record in records):
        return None
    return tile([r.input_rgb for r in records]), tile([r.identity_rgb for r in records])


def evenly(count: int, limit: int) -> list[int]:
    """Indices of at most `limit` of `count` things, evenly spread."""
    return np.linspace(0, max(0, count - 1), min(limit, count)).round().astype(int).tolist()


def read(path: Path) -> np.ndarray:
    """A picture file as RGB uint8 array."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def tile(pictures: Sequence[Any], columns: int = 4) -> np.ndarray:
    """Pictures (H, W, 3) of one size in a grid without gaps: RGB uint8 array."""
    cells = [to_uint8(picture) for picture in pictures]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    return np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)])


def _layout(
    rows: Sequence[Sequence[Any]], columns: Sequence[str], labels: Sequence[str], first_apart: bool
) -> tuple[tuple[int, int], list[tuple], list[tuple]]:
    """Where everything of a sheet stands: its (width, height); texts (x, baseline y, text); and
    pictures (x, y, (width, height), uint8 array)."""
    if not rows or not all(len(row) for row in rows):
        raise ValueError("pictures: got none, want at least one row of at least one")
    arrays = [[to_uint8(picture) for picture in row] for row in rows]
    count, gap = max(map(len, arrays)), 4
    cell = min(max(128, 1040 // count), max(96, *(row[0].shape[1] for row in arrays)))
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
) -> None:
    """Put a labelled grid of pictures into the notebook's output: lettering sharp, each different
    picture once, in its own pixels.

    Args:
        rows: pictures (H, W, 3), uint8 or [0, 1]; each row may be of another size.
        columns, labels: a heading per column; a caption per row, above its pictures.
        first_apart: leave a wider gap after the first column (the input).
    """
    (w, h), texts, places = _layout(rows, columns, labels, first_apart)
    seen: dict[str, str] = {}
    parts = [
        f'<text x="{x}" y="{y}" font-size="12">{html.escape(text)}</text>' for x, y, text in texts
    ]
    for x, y, (width, height), picture in places:
        data = picture_uri(picture)
        key = "p" + hashlib.sha1(data.encode()).hexdigest()[:10]
        seen[key] = (
            f'<image id="{key}" width="{width}" height="{height}" '
            f'style="image-rendering: pixelated" xlink:href="{data}"/>'
        )
        parts.append(f'<use xlink:href="#{key}" x="{x}" y="{y}"/>')
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{w}px" height="{h}px" viewBox="0 0 {w} {h}" '
        f'font-family="DejaVu Sans, sans-serif"><g class="fresnel-sheet">'
        f'<rect width="{w}" height="{h}" style="fill: #ffffff"/>'
        f"<defs>{''.join(seen.values())}</defs>{''.join(parts)}</g></svg>"
    )
    put("image/svg+xml", svg, alt)


def contact_sheet(
    rows: Sequence[Sequence[Any]],
    *,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> np.ndarray:
    """The grid of `show_sheet` as one picture for a file, `notes` in red above it: RGB uint8."""
    from PIL import Image, ImageDraw, ImageFont

    (width, height), texts, places = _layout(rows, columns, labels, first_apart=True)
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


def show_pair(before: Any, after: Any, names: tuple[str, str], alt: str) -> None:
    """Put two pictures of one size, (H, W, 3), uint8 or [0, 1], on top of each other, with a slider
    that parts them: `before` shows left of it. `names`: what they are, in a word or two each."""
    one, two = to_uint8(before), to_uint8(after)
    if one.shape != two.shape or one.ndim != 3:
        raise ValueError("pictures: got two of different sizes")
    left, right = (html.escape(name) for name in names)
    whole = "display:block;width:100%;height:auto;border-radius:8px"
    text = (
        f'<figure class="fresnel-pair" style="--at:50%;margin:.75rem 0;max-width:56rem">'
        f'<div style="position:relative">'
        f'<img src="{picture_uri(two)}" alt="{html.escape(alt)}" style="{whole}">'
        f'<img src="{picture_uri(one)}" alt="" style="{whole};position:absolute;inset:0;'
        f'clip-path:inset(0 calc(100% - var(--at)) 0 0)">'
        '<i aria-hidden="true" style="position:absolute;top:0;bottom:0;left:var(--at);width:2px;'
        'margin-left:-1px;background:#fff;box-shadow:0 0 0 1px #000"></i></div>'
        '<div class="pair-slide" style="display:flex;gap:.8rem;align-items:center">'
        f"<span>{left}</span>"
        f'<input type="range" min="0" max="100" value="50" style="flex:1" '
        f'aria-label="How much of {left} to show, over {right}" '
        "oninput=\"this.closest('figure').style.setProperty('--at',this.value+'%')\">"
        f"<span>{right}</span></div></figure>"
    )
    put("text/html", text, alt)


def picture_uri(picture: np.ndarray) -> str:
    """A data address that holds a picture (H, W, 3) uint8 as PNG."""
    data = base64.b64encode(to_png(np.ascontiguousarray(picture))).decode()
    return f"data:image/png;base64,{data}"
