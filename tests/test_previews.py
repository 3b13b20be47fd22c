"""What a notebook shows of Gaussians, cameras, views and verdicts, and under sliders."""

import base64
import io
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Shown, external_requests
from PIL import Image

from fresnel import Cameras, Gaussians, gate, orbit, preview, render
from fresnel.gate.decide import Reason
from fresnel.show.explore import explore


def picture(html: str) -> np.ndarray:
    data = re.search(r'src="data:image/webp;base64,([^"]+)"', html)
    assert data and external_requests(html) == []
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("RGB"), float)


def scene(count: int = 60) -> Gaussians:
    """Red, of a radius of a tenth, far away from the origin."""
    means = torch.rand(count, 3, generator=torch.Generator().manual_seed(0)) * 0.2 + 5.0
    turns = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(count, 4)
    red = torch.tensor([0.9, 0.1, 0.1]).expand(count, 3)
    return Gaussians(means, turns, torch.full((count, 3), 0.02), torch.full((count,), 0.9), red)


def cameras() -> Cameras:
    turn = torch.arange(6) * 60.0
    size: Any = {"focal_px": 40.0, "width": 32, "height": 24}
    return orbit(turn, 10.0, 1.0, pivot=(5.1, 5.1, 5.1), **size)


def test_gaussians_and_views_show_what_they_are_of() -> None:
    one = scene()
    assert repr(one) == "Gaussians(60, RGB, cpu)" in one._repr_html_()
    shown = picture(one._repr_html_())
    reds = (shown[..., 0] > 150) & (shown[..., 1] < 100)
    assert 0.2 < reds.mean() < 0.9, "the object fills it, wherever it is"
    two = Gaussians(*(torch.stack([part, part]) for part in vars(one).values()))
    assert two._repr_html_().count("<img") == 2 and repr(two).startswith("Gaussians(2 x 60")
    seen = render(one, cameras())
    assert repr(seen).startswith("Views(6, 32 x 24 px, ") and "<img" in seen._repr_html_()
    shown = picture(seen._repr_html_())
    assert ((shown[..., 0] > 150) & (shown[..., 1] < 100)).mean() > 0.02


def test_cameras_stand_where_they_stand_and_a_verdict_is_escaped() -> None:
    html = cameras()._repr_html_()
    assert repr(cameras()) == "Cameras(6, 32 x 24 px, focal length 40 px, cpu)" in html
    places = [(float(x), float(y)) for x, y in re.findall(r"cx='([\d.]+)' cy='([\d.]+)'", html)]
    assert len(places) == 6 and places[0][1] == max(y for _, y in places), "+Z is below"
    assert preview(cameras()[0]).count("<circle") == 1

    bad = Reason("views_dark", "9 of <b>9</b> are dark", "light them")
    rows = [
        {"object": "a", "view": k, "azimuth_deg": 45.0 * k, "empty": 0.0}
        | {"coverage_ratio": 1.0, "luminance_ratio": 0.5 + 0.5 * (k == 0)}
        for k in range(8)
    ]
    refused = gate.Verdict(False, (bad,), "FAIL: <i>dark</i>", measurements=rows)
    html = refused._repr_html_()
    assert sorted(re.findall(r"height='([\d.]+)'/>", html)) == [*7 * ["17.5"], "35.0"]
    assert "9 of &lt;b&gt;9&lt;/b&gt; are dark" in html and "<i>" not in html
    assert html.count("<rect") == 8 and "views_dark" in repr(refused) and len(repr(refused)) < 200
    with pytest.raises(TypeError, match="got int, want Gaussians"):
        preview(3)


def test_sliders_are_live_where_somebody_can_move_them(shown: Shown) -> None:
    """The newest values are drawn; a picture that is uploaded is one more choice; what goes wrong
    is said and ends nothing."""
    pytest.importorskip("ipywidgets")
    from ipywidgets.widgets.widget import _instances

    calls: list[dict[str, Any]] = []

    def draw(**values: Any) -> tuple[dict[str, np.ndarray], str]:
        calls.append(dict(values))
        if values["what"] == "worst":
            raise ValueError("<nothing> there")
        return {"grey": np.full((8, 8, 3), 2 * values["turn"], np.uint8)}, f"at {values['turn']}"

    def until(widget: Any, text: str) -> None:
        ends = time.monotonic() + 20
        while text not in widget.value:
            assert time.monotonic() < ends, widget.value
            time.sleep(0.01)

    controls = {"what": ["best", "worst"], "turn": range(100)}
    values = explore(draw, controls, {"what": "best", "turn": 3}, "Grey.", upload="what", live=True)
    ((data, _),) = shown
    box = _instances[data["application/vnd.jupyter.widget-view+json"]["model_id"]]
    picture, said, menu, slider, upload = box.children
    assert said.value == "at 3" and "<img" in data["text/html"] and len(calls) == 1
    before = picture.value
    for turn in range(40, 60):
        slider.value = turn
    until(said, "at 59")
    assert values == {"what": "best", "turn": 59} == calls[-1] and picture.value != before
    menu.value = "worst"
    until(said, "ValueError: &lt;nothing&gt; there")
    file = {"name": "../a.png", "type": "image/png", "size": 3, "content": b"abc"}
    upload.value = ({**file, "last_modified": datetime.now(UTC)},)
    until(said, "at 59")
    assert Path(values["what"]).name == "a.png" and Path(values["what"]).read_bytes() == b"abc"


def test_sliders_of_a_report_have_their_pictures(shown: Shown) -> None:
    def draw(turn: int, what: str) -> tuple[dict[str, np.ndarray], str]:
        more = {"b": np.zeros((8, 8, 3), np.uint8)} if what == "two" else {}
        return {"a": np.full((8, 8, 3), turn, np.uint8), **more}, f"at {turn} <{what}>"

    controls: dict[str, Any] = {"turn": range(0, 101, 5), "what": ["one", "two"]}
    explore(draw, controls, {"turn": 15, "what": "one"}, "Grey.", frames=5, live=False)
    turn, what = (data["text/html"] for data, _ in shown)
    assert [int(n) for n in re.findall(r"turn: (\d+)\. at", turn.split("data-steps")[1])] == [
        *(0, 15, 50, 75, 100),
        15,
    ], "the start is among them, and named at first"
    assert 'value="1"' in turn and "--at:1" in turn and "at 15 &lt;one&gt;" in turn
    assert turn.count("<img") == 1 and what.count("<img") == 2, "where one has no b it is grey"
    assert external_requests(turn + what) == []
