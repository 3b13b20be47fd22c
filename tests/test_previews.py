"""What Gaussians, cameras, views and verdicts look like in a notebook."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import external_requests
from PIL import Image

from fresnel import Cameras, Gaussians, gate, orbit, preview, render
from fresnel.gate.decide import Reason


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
