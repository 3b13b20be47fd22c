"""Pictures, charts, tables and scenes: what is drawn, what is said of it, what is escaped."""

import base64
import io
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from boxes import views_of
from conftest import Shown
from PIL import Image

from fresnel.analysis.stats import Estimate
from fresnel.data import dataset
from fresnel.data.dataset import MultiViewDataset
from fresnel.objects import furniture
from fresnel.render import Views
from fresnel.scene.cameras import orbit
from fresnel.scene.gaussians import Gaussians
from fresnel.show import charts, credits, gate, pictures, scenes, style, widgets


def cloud(count: int = 50) -> widgets.Scene:
    generator = torch.Generator().manual_seed(0)
    gaussians = Gaussians(
        0.2 * torch.randn(count, 3, generator=generator),
        torch.tensor([1.0, 0, 0, 0]).expand(count, 4),
        torch.full((count, 3), 0.03),
        torch.linspace(0, 1, count),
        torch.rand(count, 3, generator=generator),
    )
    azimuth = torch.arange(4) * 90.0
    cameras = orbit(azimuth, 10.0, 2.0, pivot=(0, 0, 0), focal_px=40, width=32, height=32)
    return widgets.scene(gaussians, cameras, cameras[0], torch.zeros(3), most=40)


def test_losses_are_drawn_in_our_style_every_term_whole() -> None:
    rows = [{"step": 1, "loss": 1.0, "rgb": 0.5}, {"step": 2, "loss": 0.5, "rgb": 0.1}]
    light = {"luminance ratio": ([1, 2], [0.0, 0.1])}
    left, right = charts.loss_curves(rows, terms=("loss", "rgb"), against=light).axes
    assert left.get_title(loc="left") and right.get_title(loc="left")
    assert [line.get_color() for line in left.lines] == [style.BLUE, style.VERMILION]
    assert not left.get_legend().get_frame_on() and left.get_yscale() == "log"
    # the acceptable band is in sight even where the light never reaches it
    assert right.get_ylim()[0] == 0 and right.patches
    assert charts.loss_curves(rows).axes[0].get_legend() is None
    terms = [f"term {k}" for k in range(2 * len(style.CYCLE))]
    log = [{"step": step} | {term: 0.5 - step for term in terms} for step in (0, 1)]
    (axis,) = charts.loss_curves(log, terms=terms).axes
    assert [line.get_label() for line in axis.lines] == terms
    assert axis.get_ylim()[0] < -0.5 and axis.get_yscale() == "linear"


def test_dots_bins_and_roses() -> None:
    levels = {"a": 1.0, "b": 1.1, "c": 1.2, "d": 1.3, "far": 90.0, "unknown": math.nan}
    rows = {name: {"0-30": Estimate(x, (x,), x, x)} for name, x in levels.items()}
    (axis,) = charts.dots(rows, label="dB").axes
    assert [text.get_text() for text in axis.texts] == ["90"], "at the edge, with its value"
    marks = [line.get_marker() for line in axis.lines]
    assert marks.count("D") == 4 and marks.count(">") == 1, "what was not measured has no mark"
    (axis,) = charts.dots({"a": {"all": Estimate(1.0)}}, label="dB", names={"a": "what"}).axes
    assert axis.get_yticklabels()[0].get_text() == "what" and axis.texts[-1].get_text() == "a"
    assert axis.texts[-1].get_fontsize() < axis.get_yticklabels()[0].get_fontsize()
    entry = {"bin": "45", "psnr": 20.0, "psnr_low": 19.0, "psnr_high": 22.0}
    both = {"a": [entry], "b": [{**entry, "psnr": 10.0}]}
    one = Estimate(1.0, (0.9, 1.1), 0.5, 1.5), Estimate(2.0, (2.0, 2.0))
    places = {"a": one, "b": (Estimate(3.0), Estimate(3.0))}
    (axis,) = charts.plane(places, labels=("dB", "distance"), better="here").axes
    assert [text.get_text() for text in axis.texts] == ["here \N{SOUTH EAST ARROW}", "a", "b"]
    crowd = {
        f"name {k}": places["a"] for k in range(6)
    }  # at one place: names apart from each other
    (axis,) = charts.plane(crowd, labels=("dB", "distance")).axes
    axis.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("dB", "distance")
    spans = [line.get_segments()[0] for line in axis.collections]
    assert spans[0][:, 0].tolist() == [0.5, 1.5] and len(axis.lines) >= 4
    (axis,) = charts.bins_figure(both, "psnr", label="PSNR, dB", band=(1, 2)).axes
    assert [bar.get_height() for box in axis.containers[::2] for bar in box] == [20.0, 10.0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["45"]
    rose = charts.azimuth_rose([0, 10, 90, 180], {"light": [1.0, 0.5, 0.25, math.nan]})
    heights = [bar.get_height() for bar in rose.axes[0].patches]
    assert heights == [0.75, 0, 0.25, 0, 0, 0, 0, 0]


def test_cameras_are_drawn_in_three_dimensions() -> None:
    scene = cloud()
    figure = charts.camera_frusta(
        scene.cameras, scene.input_camera, pivot=[0, 0, 0], content=scene.gaussians.means.numpy()
    )
    space, above, front = figure.axes
    assert space.name == "3d" and len(space.lines) == len(scene.cameras) + 1
    assert above.yaxis_inverted() and not front.yaxis_inverted()
    # a pyramid's lines start in the camera and end `depth` in front of it
    (line, *_) = charts.frusta(scene.cameras, 0.5)
    np.testing.assert_allclose(line[0], scene.cameras.centers[0], atol=1e-6)
    ahead = (line[1:3] - line[0]) @ scene.cameras.forward[0].numpy()
    np.testing.assert_allclose(ahead, 0.5, atol=1e-6)


def test_a_sheet_holds_every_picture_once_in_its_own_pixels(shown: Shown) -> None:
    one, two = np.zeros((4, 4, 3), np.uint8), np.full((8, 8, 3), 200, np.uint8)
    pictures.show_sheet([[one, two], [one]], "Two.", columns=["a<", "b"], labels=["r", "s"])
    ((data, about),) = shown
    svg = data["image/svg+xml"]
    assert about["image/svg+xml"]["alt"] == "Two." and ">a&lt;</text>" in svg
    found = re.findall(r"data:image/png;base64,([^\"]+)", svg)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in found]
    assert sizes == [(4, 4), (8, 8)] and svg.count("<use ") == 3
    with pytest.raises(ValueError, match="pictures: got none"):
        pictures.show_sheet([[]], "x")
    with pytest.raises(ValueError, match="alt: want a sentence"):
        pictures.show_sheet([[one]], " ")


def test_the_file_of_a_sheet_has_what_the_page_has() -> None:
    dark, light = np.zeros((48, 96, 3), np.uint8), np.full((96, 96, 3), 0.5)
    sheet = pictures.contact_sheet([[dark, light], [dark]], columns=["a"], labels=["r", "s"])
    assert sheet.shape == (22 + 2 * 18 + 96 + 4 + 48 + 4, 4 + 96 + 4 + 8 + 96 + 4, 3)
    assert (sheet[60, 4:100] == 0).all() and (sheet[60, 112:208] == 128).all()


def test_a_pair_wants_two_pictures_of_one_size(shown: Shown) -> None:
    one = np.zeros((4, 6, 3))
    pictures.show_pair(one, one + 1, ("a & b", "c"), "Dark, then light.")
    html = shown[0][0]["text/html"]
    assert 'alt="Dark, then light."' in html and "a &amp; b" in html
    assert 'type="range"' in html and 'aria-label="How much of a &amp; b to show, over c"' in html
    with pytest.raises(ValueError, match="different sizes"):
        pictures.show_pair(one, one[:2], ("a", "b"), "x")
    pictures.show_pair([one, one], [one, one], ("a", "b"), "Two pairs.")
    cells = shown[1][0]["text/html"].split("<img")
    assert len(cells) == 5 and cells[2].count("clip-path") == cells[4].count("clip-path") == 1
    assert cells[1].count("clip-path") == cells[3].count("clip-path") == 0, "each pair is parted"


def test_pictures_change_in_step_and_each_step_has_a_name(shown: Shown) -> None:
    views = [np.full((4, 8, 3), 60 * k, np.uint8) for k in range(3)]
    pictures.show_steps({"a<": views, "b": views[::-1]}, ["0", "9|0", "180"], "Turned.", key="k")
    html, about = shown[0][0]["text/html"], shown[0][1]["text/html"]
    strips = re.findall(r"data:image/webp;base64,([^\"]+)", html)
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(strips[0]))))
    assert first.shape == (4, 24, 3) and first[:, 16:].mean() > first[:, :8].mean() + 100
    assert 'max="2"' in html and 'data-steps="0|9/0|180"' in html and "a&lt;" in html
    assert html.count("width:300%") == 2 and len(about.pop("scripts")) == 1
    assert about == {"alt": "Turned.", "key": "k"}
    with pytest.raises(ValueError, match="'b' has 2 pictures, want 3"):
        pictures.show_steps({"b": views[:2]}, ["0", "90", "180"], "x")


def test_a_scene_keeps_what_can_be_seen_and_survives_its_file(tmp_path: Path) -> None:
    scene = cloud()
    assert scene.gaussians.num == 40 and scene.gaussians.opacities.min() >= 0.02
    again = widgets.Scene.load(scene.save(tmp_path / "scene.npz"))
    torch.testing.assert_close(again.gaussians.means, scene.gaussians.means, atol=1e-3, rtol=0)
    torch.testing.assert_close(again.gaussians.colors, scene.gaussians.colors, atol=3e-3, rtol=0)
    torch.testing.assert_close(again.cameras.viewmats, scene.cameras.viewmats)
    torch.testing.assert_close(again.input_camera.Ks, scene.input_camera.Ks)
    picture = scenes.still(again, 48)
    assert picture.shape == (48, 48, 3) and picture.max() > 60


def test_a_table_escapes_what_it_is_given_and_keeps_our_links(shown: Shown) -> None:
    evil = "<img src=x onerror=alert(1)>"
    rows = [
        {"what": evil, "is": 0.12345, "link": style.link("CC<0>", "https://a/?b&c")},
        {evil: "x", "link": style.link("no", "javascript:alert(1)")},
    ]
    style.show_table(rows, links=("link",))
    text = shown[0][0]["text/html"]
    assert "<img" not in text and text.count("&lt;img src=x") == 2, "cell and heading"
    assert "0.12<" in text and "nan" not in text.lower()
    assert '<a href="https://a/?b&amp;c">CC&lt;0&gt;</a>' in text and "javascript" not in text


def by_azimuth(record: Any) -> np.ndarray:
    azimuth = record.cameras.azimuth_deg(record.pivot) - record.input_camera.azimuth_deg(
        record.pivot
    )
    return np.argsort(180 - (180 - azimuth.numpy()) % 360)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    path = tmp_path_factory.mktemp("data") / "set"
    return dataset.write(path, [views_of(i, size=16, views=4) for i in (0, 1)], meta={})


def test_views_stand_by_azimuth_and_only_true_ones_are_called_truth(data: MultiViewDataset) -> None:
    rows, azimuths, names = pictures.picture_rows(data)
    assert azimuths == sorted(azimuths) and azimuths[0] > -180 and len(azimuths) == 4
    assert names == list(data.names) and len(rows[0]) == 5
    rgb, alpha = (views[by_azimuth(data[0])].numpy() for views in (data[0].rgb, data[0].alpha))
    np.testing.assert_array_equal(np.stack(rows[0][1:])[alpha == 255], rgb[alpha == 255])
    assert (np.stack(rows[0][1:])[alpha == 0] == pictures.GROUND).all(), "empty is not dark"

    def grey(inputs: Any, cameras: Any) -> Views:
        """As bright as the view comes late."""
        shape = (*cameras.batch_shape, cameras.height, cameras.width)
        picture = torch.linspace(0, 1, shape[1])[None, :, None, None, None].expand(*shape, 1)
        return Views(picture.expand(*shape, 3), picture, picture)

    tensors = data.tensors()
    made, labels, again = pictures.predicted_rows(tensors, {"ours": grey}, [1], first="target")
    assert labels == [f"{data.names[1]}: target", f"{data.names[1]}: ours"]
    assert again == pytest.approx(azimuths, abs=1e-3)
    np.testing.assert_array_equal(made[0][1:], rows[1][1:])
    seen = by_azimuth(data[1]) / 3  # as opaque as bright
    means = [
        (view.mean() - (1 - alpha) * pictures.GROUND) / 255
        for view, alpha in zip(made[1][1:], seen, strict=True)
    ]
    np.testing.assert_allclose(means, seen, atol=4e-3)
    with pytest.raises(TypeError, match="first"):
        pictures.predicted_rows(tensors, {}, [0])  # whether views are true nobody may assume


def verdict(rows: list[dict[str, Any]], reasons: tuple[Any, ...] = ()) -> Any:
    return SimpleNamespace(
        measurements=rows, reasons=reasons, notes=("poses",), duration_s=1.0, figures={}
    )


def test_what_the_gate_measured_by_azimuth() -> None:
    def seen(azimuth_deg: float, coverage: float, luminance: float) -> dict[str, Any]:
        ratios = {"coverage_ratio": coverage, "luminance_ratio": luminance}
        return {"azimuth_deg": azimuth_deg, "empty": coverage == 0, "object": "a", **ratios}

    found = verdict([seen(44, 1.0, 0.5), seen(50, 0.5, 1.0), seen(-180, 0.0, float("nan"))])
    profile = gate.azimuth_profile(found)
    at = dict(
        zip(profile["azimuth_deg"], zip(*list(profile.values())[1:], strict=True), strict=True)
    )
    assert at[45] == (0.75, 0.75, 0.5, 2) and at[180][:1] == (0.0,) and at[180][2:] == (0.0, 1)
    assert "+45 degrees: 0.75 of the input's area, 0.50 of its light" in gate.describe_profile(
        profile
    )
    assert "1 of 3 views are empty" in gate.describe_views(found)
    metrics = gate.gate_metrics(found)
    assert metrics["empty_views"] == pytest.approx(1 / 3) and metrics["gate_codes"] == []
    assert metrics["frame_luminance_ratio"] == pytest.approx(1 / 3)
    assert [row["what"] for row in gate.reasons_rows(found)] == ["No check failed.", "poses"]
    reason = SimpleNamespace(code="dark", message="m", hint="h", symptom_of="empty")
    first = gate.reasons_rows(verdict([], (reason,)))[0]
    assert (first["finding"], first["what"], first["symptom of"]) == ("dark", "m", "empty")


def test_the_worst_views_have_the_least_light(data: MultiViewDataset) -> None:
    rows = [
        {"object": data.names[i], "view": view, "azimuth_deg": 90.0 * view, "empty": False,
         "coverage_ratio": 1.0, "luminance_ratio": light}
        for i, view, light in ((0, 0, 1), (0, 1, 0.2), (1, 0, 0.5), (1, 1, 2))
    ]  # fmt: skip
    worst, captions, whose = gate.worst_views(data, verdict(rows), count=2)
    assert whose == list(data.names)
    assert captions == ["+90\N{DEGREE SIGN}, 1.00", "+0\N{DEGREE SIGN}, 1.00"]
    view = data[0].rgb[1], data[0].alpha[1]
    np.testing.assert_array_equal(worst[0], pictures.on_ground(*view))


def test_a_record_in_3d_is_its_covered_pixels(tmp_path: Path) -> None:
    record = views_of(0, size=32, views=4)
    content = widgets.content_points(record)
    assert len(content) > 50
    half = (record.input_depth > 0) & (record.input_alpha >= 128)
    means = widgets.covered_pixels(record)[0][: int(half.sum())]
    along = (means - record.input_camera.centers) @ record.input_camera.forward
    torch.testing.assert_close(along, record.input_depth[half])
    assert np.abs(content - record.pivot.numpy()).max() < 1.0, "on the object, around its pivot"
    shown = widgets.record_scene(record)
    assert shown is not None and 0 < shown.gaussians.num <= 16_000
    assert "4 cameras stand" in widgets.describe_geometry(record, content)


def test_gaussians_are_shown_as_large_as_decoders_are_trained_to_be_drawn() -> None:
    """1.2 focal lengths and 2.2 units away, as in the corrected bootstrap, at any size."""
    points = torch.tensor([[-0.1, 0.0, 0.0], [0.1, 0.0, 0.0]])
    tiny = Gaussians(points, torch.tensor([[1.0, 0, 0, 0]] * 2), torch.full((2, 3), 1e-4),
                     torch.ones(2), torch.ones(2, 3))  # fmt: skip
    for size in (32, 256):
        camera = orbit(torch.zeros(1), 0.0, 2.2, pivot=(0, 0, 0), focal_px=1.2 * size, width=size,
                       height=size)  # fmt: skip
        shown = widgets.scene(tiny, camera, camera[0], torch.zeros(3))
        expected = torch.full((2, 3), 0.3**0.5 * 2.2 / (1.2 * 128))
        torch.testing.assert_close(shown.gaussians.scales, expected, atol=1e-5, rtol=1e-3)


def test_what_is_drawn_fills_the_frame_from_all_sides_wherever_the_pivot_is() -> None:
    """Of the original it lies three units away from the object."""
    torch.manual_seed(0)
    means = torch.randn(200, 3) * torch.tensor([0.05, 0.2, 0.1]) + torch.tensor([0.0, 0.3, 3.0])
    turns, scales = torch.tensor([[1.0, 0, 0, 0]]).expand(200, 4), torch.full((200, 3), 0.02)
    many = Gaussians(means, turns, scales, torch.full((200,), 0.9), torch.zeros(200, 3))
    size = {"focal_px": 80, "width": 64, "height": 64}
    camera = orbit(torch.tensor([20.0]), 10.0, 5.0, pivot=(0, 0, 0), **size)
    one = scenes.scene(many, camera, camera[0], torch.zeros(3))
    torch.testing.assert_close(one.middle, torch.tensor([0.0, 0.3, 3.0]), atol=0.06, rtol=0)
    frames = np.stack(scenes.turntable(one, 64))
    assert frames.shape == (36, 64, 64, 3) and (frames[:, :2, :2] == scenes.GROUND).all()
    there = frames[..., 0] < scenes.GROUND / 2
    rows, columns = (there.any(axis=axes).nonzero()[0] for axes in ((0, 2), (0, 1)))
    assert 44 < rows[-1] - rows[0] + 1 <= 64 and abs(rows.mean() - 31.5) < 5
    areas = there.mean(axis=(1, 2))
    assert abs(columns.mean() - 31.5) < 5 and areas.min() > 0.05
    assert areas.max() > 1.2 * areas.min(), "it turns: it is twice as deep as wide"


def test_a_page_to_turn_a_scene_in_hides_its_cameras(monkeypatch: pytest.MonkeyPatch) -> None:
    viser, rig = pytest.importorskip("viser"), list[Any]()
    for what in ("add_frame", "add_camera_frustum", "add_icosphere", "add_gaussian_splats"):
        add = getattr(viser.SceneApi, what)

        def spy(space: Any, name: str, *a: Any, add: Any = add, **k: Any) -> Any:
            rig.append((name, k.get("visible", True)) if "Axes" not in name else None)
            return add(space, name, *a, **k)

        monkeypatch.setattr(viser.SceneApi, what, spy)
    assert "matchMedia" in scenes.page(cloud(), "A cloud")
    first, second, *others = filter(None, rig)
    assert (first, second) == (("/object", True), ("/rig", False)) and len(others) > 5
    assert all(name.startswith("/rig/") for name, _ in others)


def test_smoke_is_nothing_and_colours_are_straight() -> None:
    alpha = torch.tensor([0.0, 0.04, 0.53, 1.0])[:, None, None, None]
    drawn = scenes.straight(Views(0.5 * alpha.expand(4, 1, 1, 3), alpha, alpha))
    wanted = [[0] * 4, [0] * 4, [128] * 3 + [128], [128] * 3 + [255]]
    np.testing.assert_allclose(drawn[:, 0, 0], wanted, atol=1)
    np.testing.assert_allclose(scenes.on_ground(drawn)[:, 0, 0, 0], [236, 236, 182, 128], atol=1)


def test_furniture_is_named_with_author_licence_and_source(tmp_path: Path) -> None:
    known = furniture.listing()
    chosen = [
        next(e for e in known["objects"] if known["libraries"][e["library"]]["licence"] == licence)
        for licence in ("CC-BY-3.0", "CC-BY-3.0-US", "CC0-1.0")
    ]
    records = [
        replace(
            views_of(i, size=8, views=1),
            name=f"{entry['file']}__0",
            attribution=furniture.attribution(entry, known["libraries"][entry["library"]]),
        )
        for i, entry in enumerate(chosen)
    ]
    data = dataset.write(tmp_path / "set", records, meta={})
    entries = credits.credits([*data.names, data.names[0]], data)
    assert [entry["title"] for entry in entries] == [entry["name"] for entry in chosen]
    assert all(
        entry["creator"] in made["author"] for entry, made in zip(chosen, entries, strict=True)
    )
    assert entries == credits.credits(data.names, str(data.path)), "by path as by data"
    assert all(entry["author"] and "sweethome3d" in entry["source"] for entry in entries)
    rows = credits.credit_rows([*entries, entries[0]])
    assert len(rows) == 3, "two of CC BY, and one that names what is CC0"
    assert "https://creativecommons.org/licenses/by/3.0/us/" in str(rows[:2])
    assert "packages.debian.org" in rows[0]["source"] and "rendered" in rows[0]["changed"]
    assert "zero/1.0" in rows[2]["licence"] and chosen[2]["name"] in rows[2]["object pictured"]


def test_a_set_of_sets_names_everybody_and_their_words_are_only_words(
    tmp_path: Path, shown: Shown
) -> None:
    evil = "<script>alert(1)</script>"
    for part, author in (("a", "Ann"), ("b", evil)):
        record = replace(
            views_of(0, size=8, views=2), name=f"chair {part}__0",
            attribution=f"Chair {part} by {author} (CC-BY-4.0)",
        )  # fmt: skip
        dataset.write(tmp_path / "both" / part, [record], meta={})
    data = dataset.open(tmp_path / "both")
    entries = credits.credits(data.names, data)
    assert [entry["author"] for entry in entries] == ["Ann", evil]
    credits.show_credits(entries)
    credits.show_credits([])
    ((found, _),) = shown
    text = found["text/html"]
    assert "<script" not in text and "&lt;script&gt;" in text
    assert '<a href="https://creativecommons.org/licenses/by/4.0/">CC-BY-4.0</a>' in text


def test_embedded_objects_are_cc0_and_of_photographs_nothing_is_known(tmp_path: Path) -> None:
    entries = credits.credits(["dark_couch__0"], "embedded")
    assert entries[0]["licence"] == "CC0-1.0" and entries[0]["author"]
    Image.new("RGB", (16, 16)).save(tmp_path / "0000.png")
    assert credits.credits(["0000"], str(tmp_path)) == [] == credits.credit_rows([])


def test_scenes_abreast_turn_in_step_and_records_keep_their_colours() -> None:
    one = cloud()
    both = scenes.abreast([[one, one], [one]])
    assert both.gaussians.num == 3 * one.gaussians.num
    parts = both.gaussians.means.split(one.gaussians.num)
    below, aside = (parts[k] - parts[0] for k in (1, 2))
    assert (below[:, 1] < -0.5).all() and (aside[:, 0] > 0.5).all(), "down and across"
    assert below.std(dim=0).max() < 1e-5 and below[:, 0].abs().max() < 1e-5, "as they are"
    record = views_of(0, size=16, views=2)
    solid = (record.alpha == 255)[..., None]
    whole = replace(
        record, rgb=record.rgb * solid, alpha=record.alpha * solid[..., 0], input_depth=None
    )
    parts = {name: (getattr(whole, name) * 0.75).round().byte() for name in ("rgb", "alpha")}
    part = replace(whole, **parts)
    (_, colors, _), (_, seen, _) = map(widgets.covered_pixels, (whole, part))
    torch.testing.assert_close(colors, seen, atol=0.05, rtol=0)
    edge = whole.alpha.clone()
    edge[whole.alpha > 0] = 2  # a fiftieth of a pixel, whose colour is green by rounding alone
    rgb = torch.zeros_like(whole.rgb)
    rgb[..., 1] = 2
    assert not len(widgets.covered_pixels(replace(whole, rgb=rgb, alpha=edge))[0]), "specks"
    few = widgets.record_scene(whole, most=40)
    assert few is not None and 20 < few.gaussians.num <= 40
