"""Pictures under sliders: live in JupyterLab, and made beforehand in a report.

`explore` is given a function that draws and the values of its arguments. Where somebody can move
sliders (ipywidgets, in a kernel that an editor opened), every move calls the function. Everywhere
else it is called for some values of each argument, the others as they are at first.
"""

import html
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.show.pictures import GROUND, contact_sheet, evenly, picture_uri, show_steps
from fresnel.show.style import to_png

Draw = Callable[..., tuple[dict[str, np.ndarray], str]]
"""Values by name -> pictures by name, RGB uint8 (H, W, 3) each, and a sentence about them."""


def explore(
    draw: Draw,
    controls: Mapping[str, Sequence[Any]],
    start: Mapping[str, Any],
    alt: str,
    *,
    frames: int = 13,
    upload: str = "",
    live: bool | None = None,
) -> dict[str, Any]:
    """Put pictures and their sliders into the notebook's output.

    Args:
        controls: what each argument of `draw` can be; texts become a menu.
        start: what each is at first.
        alt: what the pictures show.
        frames: pictures of each slider in a report, at most: evenly spread, and that of `start`.
        upload: the argument that is also given the path of a picture that a person uploads.
        live: with ipywidgets; None: where they are installed and an editor opened this kernel.

    Returns:
        The values, which follow the sliders.
    """
    values = dict(start)
    if live is None:
        opened = "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ
        live = opened and importlib.util.find_spec("ipywidgets") is not None
    if live:
        _live(draw, controls, values, alt, upload)
        return values
    first = draw(**values)
    for name, options in controls.items():
        places, begin = evenly(len(options), frames), [*options].index(values[name])
        at = int(np.abs(np.subtract(places, begin)).argmin())
        places[at] = begin
        made = [first if k == begin else draw(**{**values, name: options[k]}) for k in places]
        every = dict.fromkeys(key for shown, _ in made for key in shown)
        blank = np.full_like(next(iter(first[0].values())), GROUND)
        rows = {key: [shown.get(key, blank) for shown, _ in made] for key in every}
        steps = [
            f"{_word(name)}: {options[k]}. {said}"
            for k, (_, said) in zip(places, made, strict=True)
        ]
        told = f"{alt} What changes: {_word(name)}." if len(controls) > 1 else alt
        wide = len(rows) if len(rows) < 6 else -(-len(rows) // 2)
        show_steps(rows, steps, told, columns=wide, start=at)
    return values


def _word(name: str) -> str:
    return name.removesuffix("_deg").replace("_", " ")


def _live(
    draw: Draw,
    controls: Mapping[str, Sequence[Any]],
    values: dict[str, Any],
    alt: str,
    upload: str,
) -> None:
    """Widgets that draw anew when they move: the newest values, in a thread of their own, so that
    moves don't queue. A picture of the start stands for them where widgets can't be shown."""
    import ipywidgets
    from IPython.display import display

    def sheet(shown: dict[str, np.ndarray]) -> np.ndarray:
        return contact_sheet([[*shown.values()]], columns=[*shown])

    shown, sentence = draw(**values)
    picture = ipywidgets.Image(value=to_png(sheet(shown)), format="png")
    said, moved = ipywidgets.HTML(html.escape(sentence)), threading.Event()

    def redraw() -> None:
        while moved.wait():
            moved.clear()
            try:
                new, sentence = draw(**values)
                picture.value, said.value = to_png(sheet(new)), html.escape(sentence)
            except Exception as error:  # a picture that shows nothing, say
                said.value = html.escape(f"{type(error).__name__}: {error}")

    made: dict[str, Any] = {}
    for name, options in controls.items():
        menu = any(isinstance(option, str) for option in options)
        kind = ipywidgets.Dropdown if menu else ipywidgets.SelectionSlider
        pairs = [(str(option), option) for option in options]
        made[name] = kind(options=pairs, value=values[name], description=_word(name))

        def follow(change: Any, name: str = name) -> None:
            values[name] = change.new
            moved.set()

        made[name].observe(follow, "value")

    def take(change: Any) -> None:
        for file in change.new:
            path = Path(tempfile.mkdtemp()) / Path(file["name"]).name
            path.write_bytes(file["content"])
            made[upload].options = (*made[upload].options, (path.name, str(path)))
            made[upload].value = str(path)

    boxes = [*made.values()]
    if upload:
        boxes.append(ipywidgets.FileUpload(accept="image/*", description="your picture"))
        boxes[-1].observe(take, "value")
    threading.Thread(target=redraw, daemon=True).start()
    box = ipywidgets.VBox([picture, said, *boxes])
    still = f'<img src="{picture_uri(sheet(shown))}" alt="{html.escape(alt)}"><p>{said.value}</p>'
    display({**box._repr_mimebundle_(), "text/html": still}, raw=True)
