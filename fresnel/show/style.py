"""One style for every figure, and the one way into a notebook's output: always with alt text.

Colours are those of Okabe and Ito (2008), told apart by readers of any colour vision.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#777777",
)  # fmt: skip
CYCLE = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY]
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
    "axes.prop_cycle": f"cycler(color={CYCLE})",
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "fresnel",
}


def show(picture: Figure | np.ndarray, alt: str, **about: Any) -> None:
    """Put a figure (as SVG) or an RGB uint8 array (H, W, 3) into the notebook's output; `alt` says
    the finding, not the axes, to a reader who cannot see it. about: as for `put`."""
    import matplotlib as mpl

    if isinstance(picture, np.ndarray):
        put("image/png", base64.b64encode(to_png(picture)).decode(), alt, **about)
        return
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        picture.savefig(buffer, format="svg", dpi=192, metadata={"Date": None})
    put("image/svg+xml", buffer.getvalue(), alt, **about)


def script_hash(script: str) -> str:
    """What a page's Content-Security-Policy calls a script that may run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def put(
    mime: str,
    content: str,
    alt: str,
    scripts: Sequence[str] = (),
    *,
    caption: str = "",
    key: str = "",
    lead: bool = False,
) -> None:
    """Display `content`, with `alt` for whoever cannot see it.

    Args:
        scripts: all those in it that may run in the report, handlers of events too.
        caption: what a reader should take away, below the picture in the report ("": `alt`).
        key: text may refer to it, "[Figure](#fig-KEY)"; the report writes its number there.
        lead: the one picture that shows the answer: the report has it above everything else.
    """
    from IPython.display import display

    if not alt.strip():
        raise ValueError("alt: want a sentence that says what the picture shows")
    hashes = [script_hash(script) for script in scripts]
    about = {"alt": alt, "scripts": hashes, "caption": caption, "key": key, "lead": lead}
    about = {name: said for name, said in about.items() if said}
    display({mime: content, "text/plain": alt}, raw=True, metadata={mime: about})


def show_table(
    table: str | pd.DataFrame | Sequence[Mapping[str, Any]], *, links: Sequence[str] = ()
) -> None:
    """Put a table into the notebook's output: rows (missing cells stay empty), a data frame without
    its index, or Markdown, in which a dollar is money and no mathematics.  Cells are escaped, but
    those of the columns `links`, which are HTML of our own making; numbers get two decimals."""
    from IPython.display import Markdown, display

    if isinstance(table, str):
        display(Markdown(table.replace("$", r"\$")))
        return
    import pandas as pd

    frame = pd.DataFrame(table).astype(object).fillna("")
    plain = frame.to_string(index=False)
    numbers = [
        all(isinstance(cell, (int, float)) or cell == "" for cell in frame[name])
        for name in frame.columns
    ]
    for name in frame.columns.difference(list(links)):
        frame[name] = [
            f"{cell:,.2f}" if isinstance(cell, float) else html.escape(str(cell))
            for cell in frame[name]
        ]
    frame.columns = [
        f'<span class="{"number" if numeric else "words"}">{html.escape(str(name))}</span>'
        for name, numeric in zip(frame.columns, numbers, strict=True)
    ]
    with pd.option_context("display.max_colwidth", None):
        text = frame.to_html(escape=False, index=False, border=0, justify="left")
    display({"text/html": text, "text/plain": plain}, raw=True)


def link(text: str, address: str) -> str:
    """HTML of a link, or of the text alone where the address is no web address."""
    shown = html.escape(text)
    if not address.startswith("https://"):
        return shown
    return f'<a href="{html.escape(address)}">{shown}</a>'


def to_png(picture: np.ndarray) -> bytes:
    """PNG bytes of an RGB uint8 array (H, W, 3)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def save_png(path: Path, picture: np.ndarray) -> Path:
    """Write an RGB uint8 array as PNG."""
    path.write_bytes(to_png(picture))
    return path


def to_uint8(images: Any) -> np.ndarray:
    """Pictures in [0, 1] (tensor or array) or uint8 -> uint8 array."""
    array = images.detach().cpu().numpy() if hasattr(images, "detach") else np.asarray(images)
    if array.dtype == np.uint8:
        return array
    return (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)


def azimuth_labels(azimuth_deg: Sequence[float]) -> list[str]:
    """Column headings: whole degrees with a sign, and 0 without one."""
    signed = (f"{round(a):+d}" if round(a) else "0" for a in azimuth_deg)
    return [f"{text}\N{DEGREE SIGN}" for text in signed]
